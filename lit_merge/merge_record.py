"""Reading ``merge.json``: what a merge did, for tables and the report.

The file is written by :mod:`lit_merge.streaming.provenance`, which says what is in it. Checked here
is what is shown; the rest is handed through.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_merge.errors import InputError
from lit_merge.evaluation.file import read_json_object

MERGE_FILE = "merge.json"
FORMAT_VERSION = 1

_SHOWN_APART = {"tensors", "traces", "notes", "warnings", "tasks", "format_version"}


@dataclass(frozen=True)
class TensorRecord:
    """What was done with one tensor.

    Attributes:
        name: The tensor's name in the merged model.
        action: "merge", "keep", "average" or "per-task".
        reason: Why.
        shape: Its shape.
        dtype: Its type, as torch calls it.
    """

    name: str
    action: str
    reason: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class MergeRecord:
    """What ``merge.json`` says.

    Attributes:
        name: What to call the merge: its folder.
        method: The method with its settings, as one would write it in Python.
        tasks: Names of the experts.
        tensors: One record per tensor.
        traces: Sum of the Hessian by expert; empty for a merge without curvature.
        warnings: What the merge warned of.
        notes: What it noted.
        provenance: The rest of the file: inputs with fingerprints, settings, versions.
    """

    name: str
    method: str
    tasks: tuple[str, ...]
    tensors: tuple[TensorRecord, ...]
    traces: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def actions(self) -> dict[str, tuple[int, int]]:
        """Return the numbers of tensors and of elements by action."""
        return count_actions((t.action, math.prod(t.shape)) for t in self.tensors)


def count_actions(tensors: Iterable[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """Return the numbers of tensors and of elements by action.

    Args:
        tensors: Action and number of elements of each tensor.

    >>> count_actions([("merge", 10), ("keep", 1), ("merge", 5)])
    {'merge': (2, 15), 'keep': (1, 1)}
    """
    counts: dict[str, tuple[int, int]] = {}
    for action, elements in tensors:
        before = counts.get(action, (0, 0))
        counts[action] = (before[0] + 1, before[1] + elements)
    return counts


def method_text(method: Mapping[str, Any]) -> str:
    """Return a method's configuration as one would write it in Python.

    >>> method_text({"class_path": "lit_merge.methods.TIES", "init_args": {"density": 0.2}})
    'TIES(density=0.2)'
    """
    settings = ", ".join(f"{key}={value!r}" for key, value in method["init_args"].items())
    return f"{method['class_path'].rpartition('.')[2]}({settings})"


def read_merge_record(path: str | Path) -> MergeRecord:
    """Read and check a ``merge.json``.

    Raises:
        InputError: If the file is missing, no JSON, of another format, or an entry is wrong.
    """
    content = read_json_object(path)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: must be the record of a merge with format_version {FORMAT_VERSION}; got "
            f'{version!r}. Give the merge.json that "lit-merge merge" wrote.'
        )
    try:
        return MergeRecord(
            name=str(Path(path).parent),
            method=method_text(content["method"]),
            tasks=tuple(str(task) for task in content["tasks"]),
            tensors=tuple(
                TensorRecord(
                    name=str(tensor["name"]),
                    action=str(tensor["action"]),
                    reason=str(tensor["reason"]),
                    shape=tuple(int(size) for size in tensor["shape"]),
                    dtype=str(tensor["dtype"]),
                )
                for tensor in content["tensors"]
            ),
            traces={str(task): float(trace) for task, trace in content["traces"].items()},
            warnings=tuple(str(text) for text in content["warnings"]),
            notes=tuple(str(text) for text in content["notes"]),
            provenance={k: v for k, v in content.items() if k not in _SHOWN_APART},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: must hold the record of a merge; got a damaged one "
            f"({type(error).__name__}: {error}). Merge again."
        ) from error
