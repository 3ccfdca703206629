"""Finding again what records name: the merges of an evaluation's models, and moved files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_merge.errors import InputError
from lit_merge.evaluation import Evaluation
from lit_merge.merge_record import MERGE_FILE, MergeRecord, read_merge_record


def place_now(path: str, beside: str | Path) -> str:
    """Return where a recorded path is now.

    Args:
        path: The path, as it was given when the record was written.
        beside: The record or its folder: a relative path that is not found from here is looked for
            from the folders above it, since people run their commands there.

    Returns:
        The path as it is where nothing is found.
    """
    if "://" in path or Path(path).is_absolute() or Path(path).exists():
        return path
    above = (parent / path for parent in Path(beside).absolute().parents)
    return str(next((place for place in above if place.exists()), path))


def evaluated_merges(
    evaluation: Evaluation, given: Sequence[MergeRecord] = (), *, beside: str | Path = "."
) -> dict[str, MergeRecord]:
    """Return the records of the merges among an evaluation's models, by model.

    Models whose folders are gone or damaged are left out.

    Args:
        evaluation: Its provenance says where each model was.
        given: Records that are at hand.
        beside: The evaluation's file.
    """
    models = evaluation.provenance.get("models")
    kinds = {row.model: row.kind for row in evaluation.rows}
    at_hand = {Path(record.name).resolve(): record for record in given}
    found: dict[str, MergeRecord] = {}
    for name, entry in models.items() if isinstance(models, Mapping) else ():
        path = entry.get("path") if isinstance(entry, Mapping) else None
        if not isinstance(path, str) or kinds.get(name) != "merged":
            continue
        folder = Path(place_now(path, beside))
        if folder.resolve() in at_hand:
            found[name] = at_hand[folder.resolve()]
            continue
        try:
            found[name] = read_merge_record(folder / MERGE_FILE)
        except InputError:
            continue
    return found
