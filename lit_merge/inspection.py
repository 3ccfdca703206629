"""What a path holds: kind, tensors, sizes, types, and a summary of its curvature.

Headers tell all of it but the curvature's trace and share of zeros, for which
``hessian.safetensors`` is read once in chunks.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_merge.checkpoint import Checkpoint, fingerprint, open_state_dict
from lit_merge.checkpoint.bit_masks import scale_of, share_of_ones
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from lit_merge.merge_record import method_text
from lit_merge.merged.folder import CORRECTION, MERGE, open_merged

if TYPE_CHECKING:
    from lit_merge.expert import Expert, ExpertInfo

Kind = Literal["expert", "merged", "corrected", "checkpoint"]

_EXPERT = "expert.json"
_HESSIAN = "hessian.safetensors"
_CHUNK = 1 << 20  # elements of a Hessian in memory at a time
_QUALITY = {"relative_error", "rank_correlation", "num_examples", "worst"}


@dataclass(frozen=True)
class Part:
    """One set of tensors in one file or its shards.

    Attributes:
        name: "weights", "hessian", "activations", "gram", "kronecker", "corrections",
            "head <task>" or "mask <task>".
        file: The file, as seen from the inspected path, or the number of shards.
        num_tensors: Number of tensors.
        num_elements: Number of elements of all of them.
        num_bytes: Size of the elements.
        dtypes: Number of tensors by type, as torch calls it.
    """

    name: str
    file: str
    num_tensors: int
    num_elements: int
    num_bytes: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True)
class CurvatureSummary:
    """How sure an expert is of its weights.

    Attributes:
        trace: Sum of all entries of the diagonal, over the expert's examples.
        mean_trace: The trace per training example; None when the number of examples is unknown.
        num_examples: Number N of training examples; None when it is unknown.
        estimator: What measured it; None when it is unknown.
        labels: "sampled" or "observed"; None when it is unknown.
        zero_share: Share of the entries that are zero: weights that no example has moved.
        largest: The tensors with the largest traces, at most five, with their share of the whole.
        quality: How far two halves of the examples are apart, as
            :meth:`~lit_merge.curvature.quality.Quality.as_dict` has it; None when it is unknown.
    """

    trace: float
    mean_trace: float | None
    num_examples: int | None
    estimator: str | None
    labels: str | None
    zero_share: float
    largest: Mapping[str, float]
    quality: Mapping[str, Any] | None


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of the weights."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trace: float | None


@dataclass(frozen=True)
class Inspection:
    """What a path holds.

    Attributes:
        path: What was inspected.
        kind: What it is; "checkpoint" for weights of no known origin.
        source: How the weights are stored: "safetensors", "lightning", "huggingface", "torch".
        fingerprint: Of the weights.
        parts: Every set of tensors.
        tensors: The tensors of the weights.
        curvature: Summary of the Hessian; None where there is none.
        facts: Entries of ``expert.json``, ``merge.json`` or ``correction.json`` worth showing.
        notes: What a user should be told.
    """

    path: str
    kind: Kind
    source: str
    fingerprint: str
    parts: tuple[Part, ...]
    tensors: tuple[TensorSummary, ...]
    curvature: CurvatureSummary | None
    facts: Mapping[str, Any]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the inspection as JSON primitives."""
        return dataclasses.asdict(self)


def inspect_path(
    path: str | Path, *, advance: Callable[[int, int], None] | None = None
) -> Inspection:
    """Find out what a path holds.

    Args:
        path: A checkpoint file, or the folder of a checkpoint, a run, an expert, a merge or a
            correction.
        advance: Called with the bytes read so far and in all while a Hessian is read.

    Raises:
        InputError: If there is nothing at the path, or it cannot be read.
    """
    folder = Path(path)
    if (folder / CORRECTION).is_file():
        return _inspect_folder(folder, "corrected", advance)
    if (folder / MERGE).is_file():
        return _inspect_folder(folder, "merged", advance)
    expert = open_expert(path)
    try:
        return _inspect_expert(folder, expert, advance)
    finally:
        expert.close()


def _inspect_expert(
    path: Path, expert: Expert, advance: Callable[[int, int], None] | None
) -> Inspection:
    parts = [_part("weights", expert.weights, path)]
    traces: dict[str, float] = {}
    curvature = None
    if expert.hessian is not None:
        parts.append(_part("hessian", expert.hessian, path))
        traces, zeros = _traces(expert.hessian, advance)
        curvature = _summary(expert.info, traces, zeros, num_elements=parts[-1].num_elements)
    if expert.activations is not None:
        parts.append(_part("activations", expert.activations, path))
    if expert.gram is not None:
        parts.append(_part("gram", expert.gram, path))
    if expert.kronecker is not None:
        parts.append(_part("kronecker", expert.kronecker, path))
    known = expert.info.fingerprint is not None
    return Inspection(
        path=str(path),
        kind="expert" if known or curvature is not None else "checkpoint",
        source=expert.weights.source,
        fingerprint=fingerprint(expert.weights),
        parts=tuple(parts),
        tensors=_tensors(expert.weights, traces),
        curvature=curvature,
        facts=_facts(expert.info) if known else {},
        notes=expert.notes,
    )


def _inspect_folder(
    folder: Path, kind: Kind, advance: Callable[[int, int], None] | None
) -> Inspection:
    with ExitStack() as stack:
        merged = stack.enter_context(open_merged(folder))
        weights = _as_checkpoint(merged.weights)
        parts = [_part("weights", weights, folder)]
        parts += [
            _part(f"head {task}", _as_checkpoint(head), folder)
            for task, head in merged.heads.items()
        ]
        parts += [_part(f"mask {task}", mask, folder) for task, mask in merged.masks.items()]
        if merged.corrections is not None:
            parts.append(_part("corrections", merged.corrections, folder))
        traces: dict[str, float] = {}
        curvature = None
        if (folder / _EXPERT).is_file() and (folder / _HESSIAN).is_file():  # an expert again
            expert = stack.enter_context(closing(open_expert(folder)))
            assert expert.hessian is not None, "it is there"
            parts.append(_part("hessian", expert.hessian, folder))
            traces, zeros = _traces(expert.hessian, advance)
            curvature = _summary(expert.info, traces, zeros, num_elements=parts[-1].num_elements)
        facts: dict[str, Any] = {"tasks": list(merged.tasks)}
        if merged.record is not None:
            record = merged.record.as_dict()
            facts |= {key: record[key] for key in ("correction", "calibrated", "settings")}
            facts["sites"] = len(merged.record.sites)
        facts |= _merge_facts(merged.merge, folder)
        if merged.masks:
            shares = {t: share_of_ones(m, weights.infos) for t, m in merged.masks.items()}
            facts["mask_shares"] = shares
            facts["mask_scales"] = {task: scale_of(mask) for task, mask in merged.masks.items()}
        said = [*merged.merge.get("warnings", ()), *merged.merge.get("notes", ())]
        return Inspection(
            path=str(folder),
            kind=kind,
            source=weights.source,
            fingerprint=fingerprint(weights),
            parts=tuple(parts),
            tensors=_tensors(weights, traces),
            curvature=curvature,
            facts=facts,
            notes=tuple(str(note) for note in said),
        )


def _merge_facts(merge: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the method of a merge, and the entries in which it differs from a plain one."""
    facts: dict[str, Any] = {}
    try:
        if "method" in merge:
            facts["method"] = method_text(merge["method"])
        if merge.get("overrides"):
            facts["overrides"] = {p: _override(entry) for p, entry in merge["overrides"].items()}
        if int(merge.get("leaves", 0)) > len(merge.get("tasks", ())):
            facts["experts_in_all"] = merge["leaves"]  # those of merges that were merged
        if merge.get("traces"):
            facts["traces"] = dict(merge["traces"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{folder}: must hold the record of a merge; got a damaged one "
            f"({type(error).__name__}: {error}). Merge again."
        ) from error
    if merge.get("dtype"):
        facts["dtype"] = merge["dtype"]
    if merge.get("accumulate", "float32") != "float32":
        facts["accumulate"] = merge["accumulate"]
    return facts


def _override(entry: Mapping[str, Any]) -> str:
    """Return what is different for a pattern of tensors, in words."""
    if entry.get("method") is not None:
        return method_text(entry["method"])
    return str(entry["action"]) if entry.get("scale") is None else f"scale={entry['scale']}"


def _as_checkpoint(tensors: Checkpoint | Mapping[str, Tensor]) -> Checkpoint:
    return tensors if isinstance(tensors, Checkpoint) else open_state_dict(tensors)


def _part(name: str, checkpoint: Checkpoint, root: Path) -> Part:
    infos = checkpoint.infos.values()
    files = {checkpoint.file_of(tensor) for tensor in checkpoint}
    file = next(iter(files), checkpoint.path)
    inside = isinstance(file, Path) and file != root and file.is_relative_to(root)
    shown = file.relative_to(root) if isinstance(file, Path) and inside else file.name
    if len(files) > 1:
        shown = f"{len(files)} shards"
    return Part(
        name=name,
        file=str(shown),
        num_tensors=len(checkpoint),
        num_elements=sum(info.numel for info in infos),
        num_bytes=sum(info.nbytes for info in infos),
        dtypes=dict(Counter(_dtype(info.dtype) for info in infos)),
    )


def _tensors(weights: Checkpoint, traces: Mapping[str, float]) -> tuple[TensorSummary, ...]:
    return tuple(
        TensorSummary(name, info.shape, _dtype(info.dtype), traces.get(name))
        for name, info in weights.infos.items()
    )


def _traces(
    hessian: Checkpoint, advance: Callable[[int, int], None] | None
) -> tuple[dict[str, float], int]:
    """Return the trace by tensor and the number of entries that are zero."""
    total = sum(info.nbytes for info in hessian.infos.values())
    done, zeros = 0, 0
    traces: dict[str, float] = {}
    for name, info in hessian.infos.items():
        trace = 0.0
        for start in range(0, info.numel, _CHUNK):
            values = hessian.read(name, start, min(start + _CHUNK, info.numel))
            trace += float(values.sum(dtype=torch.float64))
            zeros += int((values == 0).sum())
            done += values.nbytes
            if advance is not None:
                advance(done, total)
        if not math.isfinite(trace):
            raise InputError(
                f"{hessian.file_of(name)}: tensor {name!r} must be finite; got NaN or infinity. "
                'Run "lit-merge curvature" on these weights.'
            )
        traces[name] = trace
    return traces, zeros


def _summary(
    info: ExpertInfo, traces: Mapping[str, float], zeros: int, *, num_elements: int
) -> CurvatureSummary:
    trace = sum(traces.values())
    top = sorted(traces, key=lambda name: -traces[name])[:5]
    return CurvatureSummary(
        trace=trace,
        mean_trace=trace / info.num_examples if info.num_examples else None,
        num_examples=info.num_examples,
        estimator=info.estimator,
        labels=info.labels,
        zero_share=zeros / num_elements if num_elements else 0.0,
        largest={name: traces[name] / trace for name in top if trace > 0},
        quality=_quality(info),
    )


def _quality(info: ExpertInfo) -> Mapping[str, Any] | None:
    curvature = info.details.get("curvature")
    found = curvature.get("quality") if isinstance(curvature, Mapping) else None
    known = isinstance(found, Mapping) and found.keys() >= _QUALITY
    return found if known else None


def _facts(info: ExpertInfo) -> dict[str, Any]:
    """Return the entries of ``expert.json`` that are shown as they are."""
    left_out = {"weights", "fingerprint", "reduction"}
    facts = {
        key: value
        for key, value in dataclasses.asdict(info).items()
        if value not in (None, (), {}) and key not in left_out
    }
    if _quality(info) is not None:  # it stands with the curvature
        del facts["details"]["curvature"]["quality"]
    return facts


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
