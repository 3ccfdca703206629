"""Merged and corrected models as folders, as MergeModule reads and writes them.

============================ ======================================================================
``model.safetensors``        the merged weights that all tasks share
``heads/<task>.safetensors`` the tensors of a task's own, where there are any
``merge.json``               how the merge was made: in a merged folder, from ``lit_merge.merge``
``corrections.safetensors``  ``<site>.weight`` and so on, with ``/`` for the dots of the site's name
``correction.json``          tasks, classes, sites and origin of the corrections: likewise
============================ ======================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_merge.checkpoint import Checkpoint, is_inside, open_checkpoint, save_tensors
from lit_merge.correction import Site
from lit_merge.errors import InputError
from lit_merge.expert.info import current_versions
from lit_merge.output import new_folder

FORMAT_VERSION = 1

WEIGHTS = "model.safetensors"
HEADS = "heads"
MERGE = "merge.json"
CORRECTIONS = "corrections.safetensors"
CORRECTION = "correction.json"


@dataclass(frozen=True)
class CorrectionRecord:
    """What ``correction.json`` says; Lightning checkpoints of a MergeModule carry it along.

    Attributes:
        tasks: Names of the tasks in the order of their indices.
        num_classes: Number of classes of each task; None where it is not known.
        sites: Where the corrections are.
        correction: Qualified name of the module that corrects a site.
        calibrated: Whether the closed form or a fit has set the corrections.
        settings: Options of the fit.
        merge: Contents of the ``merge.json`` of the merge that was corrected.
    """

    tasks: tuple[str, ...]
    num_classes: tuple[int | None, ...]
    sites: tuple[Site, ...]
    correction: str
    calibrated: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    merge: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON primitives."""
        content = {
            "format_version": FORMAT_VERSION,
            **asdict(self),
            "versions": current_versions(),
        }
        return dict(json.loads(json.dumps(content)))

    @classmethod
    def from_dict(cls, content: object, *, source: str) -> CorrectionRecord:
        """Return the record of JSON primitives.

        Args:
            content: What :meth:`as_dict` has returned.
            source: The file, for messages.

        Raises:
            InputError: If it is no such record, or one of another format version.
        """
        fix = "Correct the merged model again."
        if not isinstance(content, Mapping):
            raise InputError(f"{source}: must hold the record of a correction; got none. {fix}")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{source}: must have format_version {FORMAT_VERSION}; got {version!r}. Use the "
                "lit-merge that wrote it."
            )
        try:
            sites = tuple(
                Site(str(site["name"]), int(site["num_features"]), int(site["channel_dim"]))
                for site in content["sites"]
            )
            classes = [None if n is None else int(n) for n in content["num_classes"]]
            record = cls(
                tasks=_task_names(content["tasks"], source=source),
                num_classes=tuple(classes),
                sites=sites,
                correction=str(content["correction"]),
                calibrated=bool(content["calibrated"]),
                settings=dict(content["settings"]),
                merge=dict(content["merge"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{source}: must hold tasks, num_classes, sites, correction, calibrated, settings "
                f"and merge; got a damaged record ({type(error).__name__}: {error}). {fix}"
            ) from error
        if len(record.tasks) != len(record.num_classes):
            raise InputError(
                f"{source}: must have num_classes for each task; got {len(record.num_classes)} for "
                f"{list(record.tasks)}. {fix}"
            )
        return record


@dataclass(frozen=True)
class MergedParts:
    """What a merged or corrected model consists of.

    Attributes:
        weights: The tensors that all tasks share.
        heads: The tensors of each task's own; empty where the tasks share everything.
        tasks: Names of the tasks.
        merge: Contents of ``merge.json``, or what is known of a merge in memory.
        record: The record of the correction; None for a model that is only merged.
        corrections: The corrections' tensors; None for a model that is only merged.
    """

    weights: Checkpoint | Mapping[str, Tensor]
    heads: Mapping[str, Checkpoint | Mapping[str, Tensor]]
    tasks: tuple[str, ...]
    merge: Mapping[str, Any]
    record: CorrectionRecord | None = None
    corrections: Checkpoint | None = None


@contextmanager
def open_merged(path: str | Path) -> Iterator[MergedParts]:
    """Open what ``lit_merge.merge`` or :func:`write_corrected` has written.

    Yields:
        Its parts; the files are closed at the end of the block.

    Raises:
        InputError: If it is no such folder, or its files do not belong together.
    """
    folder = Path(path)
    corrected, merged = folder / CORRECTION, folder / MERGE
    if not corrected.is_file() and not merged.is_file():
        raise InputError(
            f"{path}: must be a folder with {MERGE} or {CORRECTION}; got neither in it. Name the "
            'output of "lit-merge merge" or "lit-merge correct".'
        )
    record, merge = None, {}
    if corrected.is_file():
        record = CorrectionRecord.from_dict(_read_json(corrected), source=str(corrected))
        tasks, merge = record.tasks, dict(record.merge)
    else:
        merge = _read_json(merged)
        tasks = _task_names(merge.get("tasks"), source=str(merged))
    opened: list[Checkpoint] = []

    def opening(file: Path) -> Checkpoint:
        opened.append(open_checkpoint(file))
        return opened[-1]

    try:
        weights = opening(folder / WEIGHTS)
        heads: dict[str, Checkpoint] = {}
        if (folder / HEADS).is_dir():
            for task in tasks:
                if not (folder / HEADS / f"{task}.safetensors").is_file():
                    raise InputError(
                        f"{folder / HEADS}: must hold the head of every task; got none for "
                        f"{task!r}. Merge again."
                    )
                heads[task] = opening(folder / HEADS / f"{task}.safetensors")
        corrections = None
        if record is not None and record.sites:
            corrections = opening(folder / CORRECTIONS)
        yield MergedParts(weights, heads, tasks, merge, record, corrections)
    finally:
        for checkpoint in opened:
            checkpoint.close()


def write_corrected(
    path: str | Path,
    *,
    weights: Mapping[str, Tensor],
    heads: Mapping[str, Mapping[str, Tensor]],
    corrections: Mapping[str, Tensor],
    record: CorrectionRecord,
    replace: bool = False,
) -> Path:
    """Write a corrected folder, whole or not at all.

    Args:
        path: The folder.
        weights: The tensors that all tasks share, by name in the network.
        heads: The tensors of each task's own.
        corrections: The corrections' tensors by site.
        record: What to say about them.
        replace: Whether an existing non-empty folder may be replaced.

    Returns:
        The path.

    Raises:
        InputError: If the folder may not be written.
    """
    with new_folder(path, replace=replace) as folder:
        save_tensors(folder / WEIGHTS, weights, {"format": "pt"})
        if heads:
            (folder / HEADS).mkdir()
        for task, own in heads.items():
            save_tensors(folder / HEADS / f"{task}.safetensors", own, {"format": "pt"})
        if corrections:
            save_tensors(folder / CORRECTIONS, corrections, {"format": "pt"})
        text = json.dumps(record.as_dict(), indent=2, ensure_ascii=False)
        (folder / CORRECTION).write_text(text + "\n", encoding="utf-8")
    return Path(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: must be JSON; got {error}. Write the folder again.") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: must hold entries by name; got a {type(content).__name__}. "
            "Write the folder again."
        )
    return content


def _task_names(value: object, *, source: str) -> tuple[str, ...]:
    """Return task names after checking that each can name a file in the folder of the heads."""
    tasks = value if isinstance(value, list) else []
    names = [t for t in tasks if isinstance(t, str) and is_inside(t) and not set(t) & set("/\\")]
    if not tasks or len(names) != len(tasks):
        raise InputError(
            f"{source}: must hold the names of the tasks; got {value!r}. Write the folder again."
        )
    return tuple(names)
