"""The stream of a merge: read a piece of every model, merge it, write it, go on.

Several merges of the same inputs share one reading. Pieces are computed in several threads; they do
not depend on each other, and sinks take them in any order, so that the result is the same bits
however many threads or processes there are; but for what torch's own threads do to whole tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from lit_merge.checkpoint import Checkpoint, TensorInfo
from lit_merge.checkpoint.bit_masks import pack_bits
from lit_merge.errors import InputError
from lit_merge.methods import MergeMethod, ParameterSlice, WeightedAverage
from lit_merge.parameters import TensorPlan
from lit_merge.streaming.findings import Findings
from lit_merge.streaming.inputs import MergeInputs
from lit_merge.streaming.pieces import Part, Piece, batches_of, pieces_of
from lit_merge.streaming.plan import MergePlan
from lit_merge.streaming.reading import PieceReader
from lit_merge.streaming.sinks import Sinks
from lit_merge.streaming.threads import in_order, num_cores
from lit_merge.streaming.values import all_finite, check_values, rounded

R = TypeVar("R")


@dataclass(frozen=True)
class Job:
    """One merge of the stream's inputs.

    Attributes:
        plan: What is done with each tensor.
        facts: What the methods' surveys found, by the methods' ids.
    """

    plan: MergePlan
    facts: dict[int, Any] = field(default_factory=dict)

    def notes(self) -> tuple[str, ...]:
        """Return what the methods have to say of what their surveys found."""
        return tuple(
            note for method, _ in self.plan.groups() for note in method.notes(self.fact(method))
        )

    def fact(self, method: MergeMethod) -> Any:
        """Return what a method's survey found."""
        return self.facts.get(id(method))


class MergeStream:
    """Merges that are planned, to be run through together.

    Args:
        inputs: What is merged.
        plans: What is done with each tensor, by one merge or several.
        threads: How many pieces are computed at once; None for one per core.
        device: Where to compute.
        accumulate: The least type to compute in.
    """

    def __init__(
        self,
        inputs: MergeInputs,
        plans: Sequence[MergePlan],
        *,
        threads: int | None = None,
        device: torch.device | None = None,
        accumulate: torch.dtype = torch.float32,
    ) -> None:
        self.inputs = inputs
        self.jobs = tuple(Job(plan) for plan in plans)
        self._device = device or torch.device("cpu")
        self._threads = threads or (num_cores() if self._device.type == "cpu" else 1)
        self._accumulate = accumulate
        self._local = threading.local()
        self._average = WeightedAverage(inputs.leaves)

    @property
    def whole(self) -> frozenset[str]:
        """Names of the tensors that some merge takes as a whole."""
        return frozenset(
            name
            for job in self.jobs
            for name, method in job.plan.methods.items()
            if not method.elementwise
        )

    def pieces(self) -> list[Piece]:
        """Return the pieces of all that is written, in order."""
        return self.jobs[0].plan.pieces(whole=self.whole)

    def survey(self, on_pass: Callable[[int], Callable[[int], None]]) -> None:
        """Let the methods look at all slices before the first is merged.

        Args:
            on_pass: Called at the start of each pass with its size in bytes; what it returns is
                called with the bytes gone through. A method without a survey makes no pass.

        Raises:
            InputError: A value is NaN or infinite, or a method refuses what it sees.
        """
        for job in self.jobs:
            for method, tensors in job.plan.groups():
                if type(method).survey is not MergeMethod.survey:
                    passes = _Passes(self, job, method, tensors, on_pass)
                    job.facts[id(method)] = method.survey(passes)

    def slices(
        self,
        job: Job,
        method: MergeMethod,
        tensors: Sequence[TensorPlan],
        look: Callable[[ParameterSlice], R],
        *,
        every: int = 1,
        advance: Callable[[int], None],
    ) -> Iterator[tuple[str, R]]:
        """Yield the name of a tensor and what was found in one slice of it, slice by slice.

        Args:
            job: The merge.
            method: Whose needs are read.
            tensors: What to look at.
            look: Called with each slice, from several threads.
            every: Look at each so-manieth piece of a tensor only, its first among them.
            advance: Called with the bytes gone through.
        """

        def work(batch: tuple[Piece, ...]) -> list[tuple[str, R]]:
            reader = self._reader()
            with torch.no_grad():
                return [(p.name, look(self._slice(reader, job, p, method))) for p in batch]

        infos = {tensor.name: tensor.info for tensor in tensors}
        whole = () if method.elementwise else infos
        pieces = [
            piece
            for name, info in infos.items()
            for piece in list(pieces_of({name: info}, whole=whole))[::every]
        ]
        batches = batches_of(pieces)
        results = in_order(work, batches, self._threads) if not whole else map(work, batches)
        for batch, found in zip(batches, results, strict=True):
            yield from found
            advance(sum(piece.numel * infos[piece.name].dtype.itemsize for piece in batch))

    def run(
        self, part: Part, sinks: Sequence[Sinks], *, advance: Callable[[int], None]
    ) -> list[Findings]:
        """Merge one part and write it.

        Args:
            part: The pieces.
            sinks: Where each merge goes, in the plans' order.
            advance: Called with the number of bytes written.

        Returns:
            What was seen, by merge.

        Raises:
            InputError: A value is NaN or infinite, or an expert differs where it says it does not.
        """
        total = [Findings.before(self.inputs) for _ in self.jobs]

        def work(batch: tuple[Piece, ...]) -> tuple[list[Findings], int]:
            reader = self._reader()
            seen = [findings.still() for findings in total]
            written = 0
            with torch.no_grad():
                for piece in batch:
                    reader.open(self._names(piece), piece.start, piece.stop)
                    for job, sink, findings in zip(self.jobs, sinks, seen, strict=True):
                        written += self._do(reader, job, piece, sink, findings)
            return seen, written

        chunked = batches_of([piece for piece in part.pieces if not piece.whole])
        whole = batches_of([piece for piece in part.pieces if piece.whole])
        # Whole tensors one after the other, each by torch's own threads.
        for seen, written in chain(in_order(work, chunked, self._threads), map(work, whole)):
            for findings, more in zip(total, seen, strict=True):
                findings.add(more)
            advance(written)
        return total

    def _reader(self) -> PieceReader:
        """Return this thread's reader."""
        if not hasattr(self._local, "reader"):
            self._local.reader = PieceReader(
                self.inputs, device=self._device, accumulate=self._accumulate
            )
        reader: PieceReader = self._local.reader
        return reader

    def _names(self, piece: Piece) -> tuple[str, ...]:
        plan = self.jobs[0].plan
        return (piece.name,) if piece.task else plan.names(plan.by_name[piece.name])

    def _slice(
        self, reader: PieceReader, job: Job, piece: Piece, method: MergeMethod
    ) -> ParameterSlice:
        reader.open(self._names(piece), piece.start, piece.stop)
        shape = job.plan.by_name[piece.name].info.shape
        whole, check = not method.elementwise, not method.carries_nan
        return reader.slice(method, shape=shape, whole=whole, check=check)

    def _do(
        self, reader: PieceReader, job: Job, piece: Piece, sinks: Sinks, findings: Findings
    ) -> int:
        """Write what one piece becomes in one merge; return the number of bytes."""
        written = 0
        if piece.task is not None:
            if piece.task in job.plan.heads:
                info = job.plan.heads[piece.task][piece.name]
                expert = self.inputs.experts[piece.task]
                values = self._copied(reader, job, expert, piece, info)
                sinks.heads[piece.task].write(piece.name, piece.start, values)
                written = values.nbytes
            return written
        plan, tensor = job.plan, job.plan.by_name[piece.name]
        if tensor.action in ("merge", "average"):
            if tensor.alias_of is None:  # an alias is written with its leader
                written = self._merge(reader, job, tensor, piece, sinks, findings)
        elif tensor.name in plan.infos:
            info = plan.infos[tensor.name]
            if self._is_declared_frozen(plan, tensor):
                self._check_frozen(reader, piece)
            values = self._copied(reader, job, self.inputs.reference, piece, info)
            sinks.model.write(tensor.name, piece.start, values)
            written = values.nbytes
        return written

    def _merge(
        self,
        reader: PieceReader,
        job: Job,
        tensor: TensorPlan,
        piece: Piece,
        sinks: Sinks,
        findings: Findings,
    ) -> int:
        plan = job.plan
        is_merged = tensor.action == "merge"
        method = plan.methods[tensor.name] if is_merged else self._average
        p = reader.slice(
            method,
            shape=tensor.info.shape,
            whole=not method.elementwise,
            check=not method.carries_nan,
            fact=job.fact(method),
        )
        curved = is_merged and sinks.hessian is not None
        merged, hessian = method.merge_with_hessian(p) if curved else (method(p), None)
        written = 0
        for name in plan.names(tensor):
            if name in plan.infos:
                values = _written(reader, method, merged, name, plan.infos[name], piece.start)
                sinks.model.write(name, piece.start, values)
                written += values.nbytes
        if is_merged:
            findings.see(p)
            if sinks.hessian is not None and hessian is not None:
                info = TensorInfo(tensor.info.shape, torch.float32)
                values = _written(reader, method, hessian, tensor.name, info, piece.start)
                sinks.hessian.write(tensor.name, piece.start, values)
                written += values.nbytes
            if method.masks and sinks.masks:
                for task, mask in zip(p.tasks, method.task_masks(p), strict=True):
                    sinks.masks[task].write(tensor.name, piece.start // 8, pack_bits(mask))
        return written

    def _copied(
        self, reader: PieceReader, job: Job, checkpoint: Checkpoint, piece: Piece, info: TensorInfo
    ) -> Tensor:
        values = reader.stored(checkpoint, piece.name, piece.start, piece.stop)
        kept = piece.name in job.plan.as_is  # NaN and infinities, too
        if not values.dtype.is_floating_point or (kept and not all_finite(values)):
            return values.to(info.dtype)
        check_values(values, checkpoint, piece.name, piece.start)
        same = values.dtype == info.dtype
        return values if same else rounded(values, piece.name, info, piece.start)

    def _is_declared_frozen(self, plan: MergePlan, tensor: TensorPlan) -> bool:
        return (
            tensor.action == "keep"
            and tensor.name in self.inputs.frozen
            and tensor.name not in plan.as_is
        )

    def _check_frozen(self, reader: PieceReader, piece: Piece) -> None:
        reference, name = self.inputs.reference, piece.name
        values = reader.stored(reference, name, piece.start, piece.stop)
        for task, expert in self.inputs.experts.items():
            if not reader.same_values(values, expert, name, piece.start):
                raise InputError(
                    f"{expert.file_of(name)}: tensor {name!r}, which expert.json says was frozen, "
                    f"must equal {reference.file_of(name)}'s; got other values (task {task!r}). "
                    f"Give the base that this expert was fine-tuned from, or a rule: "
                    f"{{{name}: keep}}."
                )


class _Passes:
    """What a method's survey calls: passes over the tensors that it merges."""

    def __init__(
        self,
        stream: MergeStream,
        job: Job,
        method: MergeMethod,
        tensors: Sequence[TensorPlan],
        on_pass: Callable[[int], Callable[[int], None]],
    ) -> None:
        self._stream = stream
        self._job = job
        self._method = method
        self._tensors = tensors
        self._on_pass = on_pass

    def __call__(
        self, look: Callable[[ParameterSlice], R], every: int = 1
    ) -> Iterable[tuple[str, R]]:
        size = sum(tensor.info.nbytes for tensor in self._tensors)
        advance = self._on_pass(size // every)
        return self._stream.slices(
            self._job, self._method, self._tensors, look, every=every, advance=advance
        )


def _written(
    reader: PieceReader,
    method: MergeMethod,
    values: Tensor,
    name: str,
    info: TensorInfo,
    start: int,
) -> Tensor:
    try:
        return rounded(values, name, info, start)
    except InputError:
        if method.carries_nan:  # the inputs were not looked at before
            reader.check_weights(method)
        raise
