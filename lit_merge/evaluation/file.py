"""``evaluation.json``: writing and reading an :class:`~lit_merge.evaluation.Evaluation`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lit_merge.errors import InputError
from lit_merge.evaluation import FORMAT_VERSION, Evaluation, EvaluationRow, VarianceRow
from lit_merge.output import new_file

_Row = TypeVar("_Row", EvaluationRow, VarianceRow)

_JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "Kind": (str,),
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "float | None": (int, float, type(None)),
}


def write_evaluation(path: str | Path, evaluation: Evaluation, *, replace: bool = False) -> Path:
    """Write ``evaluation.json``, whole or not at all.

    Args:
        path: The file to write.
        evaluation: What was measured.
        replace: Whether an existing file may be replaced.

    Raises:
        InputError: If the file is there already and ``replace`` is false.
    """
    text = json.dumps(evaluation.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    with new_file(path, replace=replace) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    return Path(path)


def read_evaluation(path: str | Path) -> Evaluation:
    """Read and check an ``evaluation.json``.

    Raises:
        InputError: If the file is missing, no JSON, of another format, or a row is wrong.
    """
    content = read_json_object(path)
    if "rows" not in content or "format_version" not in content:
        raise InputError(
            f'{path}: must be an evaluation with "format_version" and "rows"; got the keys '
            f'{sorted(content)[:8]}. Write one with "lit-merge evaluate".'
        )
    version = content["format_version"]
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version must be 1 to {FORMAT_VERSION}; got {version!r}. "
            "Evaluate again, or install the lit-merge that wrote it."
        )
    notes, provenance = content.get("notes", []), content.get("provenance", {})
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise InputError(f"{path}: notes must be a list of strings; got {notes!r}.")
    if not isinstance(provenance, dict):
        raise InputError(f"{path}: provenance must be an object; got {provenance!r}.")
    try:
        return Evaluation(
            rows=_read_rows(EvaluationRow, content["rows"], "rows"),
            variances=_read_rows(VarianceRow, content.get("variances", []), "variances"),
            notes=tuple(notes),
            provenance=provenance,
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        InputError: If the file is missing, unreadable, no JSON or another JSON value.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: must be a readable file; got {error.strerror}. Check the path."
        ) from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise InputError(f"{path}: must be JSON; got {error}. Write the file again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object; got {type(content).__name__}.")
    return content


def _read_rows(kind: type[_Row], values: object, name: str) -> tuple[_Row, ...]:
    if not isinstance(values, list):
        raise InputError(f"{name}: must be a list; got {type(values).__name__}.")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    rows: list[_Row] = []
    for index, value in enumerate(values):
        place = f"{name}[{index}]"
        if not isinstance(value, dict):
            raise InputError(f"{place}: must be an object; got {type(value).__name__}.")
        unknown = sorted(set(value) - set(fields))
        missing = sorted(
            key
            for key, f in fields.items()
            if f.default is dataclasses.MISSING and key not in value
        )
        if unknown or missing:
            raise InputError(f"{place}: must have the keys {list(fields)}; got {sorted(value)}.")
        for key, entry in value.items():
            types = _JSON_TYPES[str(fields[key].type)]
            if not isinstance(entry, types) or isinstance(entry, bool):
                raise InputError(f"{place}: {key} must be {fields[key].type}; got {entry!r}.")
        rows.append(kind(**value))
    return tuple(rows)
