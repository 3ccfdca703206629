"""A merge that is not made: what would happen to each tensor, how large, and how long.

Every header is opened and checked as for the merge itself. The time is that of a few pieces, read
and merged for real, times their number.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lit_merge.checkpoint import TensorInfo
from lit_merge.methods import MergeMethod
from lit_merge.parameters import TensorPlan
from lit_merge.streaming.folders import HESSIAN, hessian_infos, mask_infos
from lit_merge.streaming.pieces import Part, Piece
from lit_merge.streaming.plan import MergePlan, bytes_read
from lit_merge.streaming.request import Output, Request
from lit_merge.streaming.shards import shards_of
from lit_merge.streaming.sinks import Sinks
from lit_merge.streaming.stream import MergeStream

_SAMPLE = 64  # pieces that are merged to measure the speed


@dataclass(frozen=True)
class PlanReport:
    """What a merge would do.

    Attributes:
        path: The folder that would be written.
        tasks: The experts' names, in order.
        record: What would be done with each tensor.
        methods: What would merge each tensor, by name, as one would write it in Python.
        files: Bytes by file of weights, heads and curvature that would be written.
        bytes_read: Bytes that one reading of the inputs takes.
        seconds: How long all merges of this reading would take together, without their surveys.
        survey: Whether the method reads inputs beforehand, which takes time of its own.
        notes: What a user should know about the inputs.
    """

    path: Path
    tasks: tuple[str, ...]
    record: tuple[TensorPlan, ...]
    methods: dict[str, str]
    files: dict[str, int]
    bytes_read: int
    seconds: float
    survey: bool
    notes: tuple[str, ...]


def report_plans(
    stream: MergeStream, outputs: Sequence[Output], request: Request
) -> list[PlanReport]:
    """Return what the merges of a stream would do.

    Args:
        stream: Of all merges.
        outputs: The merges, in the stream's order.
        request: What was asked for.
    """
    seconds = _expected_seconds(stream)
    return [
        PlanReport(
            path=Path(output.path),
            tasks=stream.inputs.tasks,
            record=output.plan.tensors,
            methods={name: repr(method) for name, method in output.plan.methods.items()},
            files=_files(output.plan, request, stream.inputs.tasks),
            bytes_read=bytes_read(stream.inputs, output.plan),
            seconds=seconds,
            survey=any(
                type(method).survey is not MergeMethod.survey
                for method in output.plan.methods.values()
            ),
            notes=(*stream.inputs.notes, *output.plan.notes),
        )
        for output in outputs
    ]


def _files(plan: MergePlan, request: Request, tasks: Sequence[str]) -> dict[str, int]:
    tensors: dict[str, Mapping[str, TensorInfo]] = {**shards_of(plan.infos, request.shard_bytes)}
    tensors |= {f"heads/{task}.safetensors": infos for task, infos in plan.heads.items()}
    if request.hessian and (curved := hessian_infos(plan)):
        tensors[HESSIAN] = curved
    if masks := mask_infos(plan):
        tensors |= {f"masks/{task}.safetensors": masks for task in tasks}
    return {file: sum(info.nbytes for info in infos.values()) for file, infos in tensors.items()}


class _Nowhere:
    """A sink that keeps nothing."""

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Take elements and forget them."""


def _expected_seconds(stream: MergeStream) -> float:
    pieces = stream.pieces()
    sample = _spread(pieces, _SAMPLE)
    nowhere = _Nowhere()
    sinks = [
        Sinks(nowhere, dict.fromkeys(stream.inputs.tasks, nowhere), nowhere) for _ in stream.jobs
    ]
    started = time.perf_counter()
    stream.run(Part(0, sample), sinks, advance=lambda _: None)
    seconds = time.perf_counter() - started
    done = sum(piece.numel for piece in sample)
    return seconds * sum(piece.numel for piece in pieces) / max(done, 1)


def _spread(pieces: Sequence[Piece], number: int) -> tuple[Piece, ...]:
    """Return so many pieces, evenly spaced; whole tensors, which may take long, only one."""
    cut = [piece for piece in pieces if not piece.whole]
    whole = sorted((piece for piece in pieces if piece.whole), key=lambda piece: piece.numel)
    step = max(1, len(cut) // number)
    return (*cut[::step], *whole[len(whole) // 2 :][:1])
