"""What an inspection says: parts with their sizes, tensors, curvature, facts, notes, warnings."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lit_merge.checkpoint import Checkpoint, TensorInfo

Kind = Literal[
    "expert",
    "merged",
    "corrected",
    "aligned",
    "exported",
    "checkpoint",
    "adapter",
    "hessian",
    "gram",
    "kronecker",
    "activations",
    "evaluation",
    "forecast",
    "configuration",
    "run",
]


@dataclass(frozen=True)
class Part:
    """One set of tensors in one file or its shards.

    Attributes:
        name: "weights", "hessian", "activations", "gram", "kronecker", "corrections",
            "head <task>", "mask <task>", "optimizer <n>" and so on.
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
        trace: Sum of all finite entries of the diagonal, over the expert's examples.
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
    """One tensor of the weights; ``trace`` is that of its Hessian, None without one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trace: float | None


@dataclass(frozen=True)
class Inspection:
    """What a path holds.

    Attributes:
        path: What was inspected.
        kind: What it is; "checkpoint" for weights of no known origin, "run" for the folder of a
            recipe.
        source: How it is stored: "safetensors", "lightning", "huggingface", "torch", "peft",
            "json", "yaml" or "folder".
        fingerprint: Of the weights; None where there are none, or not all of them.
        parts: Every set of tensors.
        tensors: The tensors of the weights, or of what the file holds instead.
        curvature: Summary of the Hessian; None where there is none.
        facts: What else is worth knowing, such as the entries of ``expert.json``.
        notes: What a user should be told.
        warnings: What is probably wrong.
    """

    path: str
    kind: Kind
    source: str
    fingerprint: str | None = None
    parts: tuple[Part, ...] = ()
    tensors: tuple[TensorSummary, ...] = ()
    curvature: CurvatureSummary | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the inspection as JSON primitives."""
        return dataclasses.asdict(self)


def part_of(name: str, checkpoint: Checkpoint, root: Path) -> Part:
    """Return the sizes of a checkpoint.

    Args:
        name: What to call it.
        checkpoint: Only its headers are looked at.
        root: What was inspected; files inside it are named from there.
    """
    files = {checkpoint.file_of(tensor) for tensor in checkpoint}
    file = next(iter(files), checkpoint.path)
    inside = isinstance(file, Path) and file != root and file.is_relative_to(root)
    shown = file.relative_to(root) if isinstance(file, Path) and inside else file.name
    if len(files) > 1:
        shown = f"{len(files)} shards"
    return sized_part(name, str(shown), checkpoint.infos.values())


def sized_part(name: str, file: str, infos: Iterable[TensorInfo]) -> Part:
    """Return the sizes of tensors of which shape and type are known."""
    every = list(infos)
    return Part(
        name=name,
        file=file,
        num_tensors=len(every),
        num_elements=sum(info.numel for info in every),
        num_bytes=sum(info.nbytes for info in every),
        dtypes=dict(Counter(dtype_name(info.dtype) for info in every)),
    )


def tensors_of(
    checkpoint: Checkpoint, traces: Mapping[str, float] | None = None
) -> tuple[TensorSummary, ...]:
    """Return name, shape, type and trace of every tensor."""
    known = traces or {}
    return tuple(
        TensorSummary(name, info.shape, dtype_name(info.dtype), known.get(name))
        for name, info in checkpoint.infos.items()
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return what torch calls a type, without its module."""
    return str(dtype).removeprefix("torch.")
