"""The stream of a merge: read a chunk of every model, merge it, write it, go on.

Chunks do not depend on each other, and sinks take them in any order. Memory is a few chunks per
model whatever the size of the models, but for methods that need whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_merge.checkpoint import Checkpoint, TensorInfo
from lit_merge.errors import InputError
from lit_merge.methods import Average, MergeMethod, ParameterSlice
from lit_merge.parameters import TensorPlan
from lit_merge.streaming.inputs import (
    MergeInputs,
    all_finite,
    check_values,
    first_not_finite,
    unravel,
)
from lit_merge.streaming.plan import MergePlan, chunks, same_values


class Sink(Protocol):
    """What takes the merged tensors, in chunks."""

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Take the flat elements from ``start`` on."""


class StateDictSink:
    """A sink into tensors in memory.

    Args:
        infos: Shape and type of every tensor by name.
        aliases: Names of tied tensors, with the name of the tensor that they share.
    """

    def __init__(
        self, infos: Mapping[str, TensorInfo], aliases: Mapping[str, str] | None = None
    ) -> None:
        self._infos = infos
        self._aliases = {
            name: leader for name, leader in (aliases or {}).items() if leader in infos
        }
        self._tensors: dict[str, Tensor] = {}

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Take the flat elements from ``start`` on; the first decide the tensor's device."""
        if name in self._aliases:  # comes under its leader's name as well
            return
        if name not in self._tensors:
            info = self._infos[name]
            self._tensors[name] = torch.empty(info.numel, dtype=info.dtype, device=values.device)
        self._tensors[name][start : start + values.numel()] = values.flatten()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name, in the order of the infos; aliases share their leader's."""
        own = {
            name: self._tensors.get(name, torch.empty(0, dtype=info.dtype)).reshape(info.shape)
            for name, info in self._infos.items()
            if name not in self._aliases
        }
        return {name: own[self._aliases.get(name, name)] for name in self._infos}


@dataclass
class Observations:
    """What was seen on the way, over the merged tensors.

    Attributes:
        traces: Sum of each expert's Hessian, by task; empty for methods without.
        unchanged: Tasks whose experts equal the base so far; empty for methods without a base.
        equal: Pairs of tasks whose experts equal each other so far.
    """

    traces: dict[str, float] = field(default_factory=dict)
    unchanged: set[str] = field(default_factory=set)
    equal: set[tuple[str, str]] = field(default_factory=set)

    @classmethod
    def of(cls, inputs: MergeInputs, method: MergeMethod) -> Observations:
        """Return what is true before anything has been seen."""
        return cls(
            traces=dict.fromkeys(inputs.tasks, 0.0) if "hessian" in method.needs else {},
            unchanged=set(inputs.tasks) if "base" in method.needs else set(),
            equal=set(combinations(inputs.tasks, 2)),
        )

    def see(self, p: ParameterSlice) -> None:
        """Take in one merged slice."""
        by_task = dict(zip(p.tasks, p.experts, strict=True))
        for task in list(self.unchanged):
            if p.base is None or not torch.equal(by_task[task], p.base):
                self.unchanged.discard(task)
        for pair in list(self.equal):
            if not torch.equal(by_task[pair[0]], by_task[pair[1]]):
                self.equal.discard(pair)
        for task, hessian in zip(p.tasks, p.hessians or (), strict=p.hessians is not None):
            self.traces[task] += float(hessian.sum(dtype=torch.float64))


@dataclass(frozen=True)
class MergeStream:
    """A merge that is planned, to be run through.

    Attributes:
        inputs: What is merged.
        plan: What is done with each tensor.
        method: How.
        fact: What the method's survey found.
    """

    inputs: MergeInputs
    plan: MergePlan
    method: MergeMethod
    fact: Any = None

    def surveyed(self, on_pass: Callable[[int], Callable[[int], None]]) -> MergeStream:
        """Let the method look at all slices before the first is merged.

        Args:
            on_pass: Called at the start of each pass with its size in bytes; what it returns is
                called with the bytes gone through.

        Returns:
            The stream with the method's fact. A method without a survey reads nothing.

        Raises:
            InputError: A value is NaN or infinite, or the method refuses what it sees.
        """
        if type(self.method).survey is MergeMethod.survey:
            return self

        def slices() -> Iterator[ParameterSlice]:
            advance = on_pass(sum(tensor.info.nbytes for tensor in self.plan.merged()))
            for tensor in self.plan.merged():
                for start, stop in self._ranges(tensor):
                    yield self._slice(tensor, start, stop)
                    advance((stop - start) * tensor.info.dtype.itemsize)

        with torch.no_grad():
            return replace(self, fact=self.method.survey(slices))

    def run(
        self, sink: Sink, heads: Mapping[str, Sink], *, advance: Callable[[int], None]
    ) -> Observations:
        """Write everything that the plan says.

        Args:
            sink: Takes the merged model.
            heads: Take the tensors of each task's own.
            advance: Called with the number of bytes written.

        Raises:
            InputError: A value is NaN or infinite, or an expert differs where it says it does not.
        """
        seen = Observations.of(self.inputs, self.method)
        with torch.no_grad():
            for tensor in self.plan.tensors:
                for start, stop in self._ranges(tensor):
                    for name, values in self._chunk(tensor, start, stop, seen):
                        sink.write(name, start, values)
                        advance(values.nbytes)
            for task, infos in self.plan.heads.items():
                for name, info in infos.items():
                    for start, stop in chunks(info.numel):
                        values = self._copied(self.inputs.experts[task], name, info, start, stop)
                        heads[task].write(name, start, values)
                        advance(values.nbytes)
        return seen

    def _ranges(self, tensor: TensorPlan) -> Iterable[tuple[int, int]]:
        if tensor.action == "merge" and not self.method.elementwise:
            return [(0, tensor.info.numel)]
        return chunks(tensor.info.numel)

    def _slice(self, tensor: TensorPlan, start: int, stop: int) -> ParameterSlice:
        method = self.method if tensor.action == "merge" else Average()
        p = self.inputs.read(
            self.plan.names(tensor),
            start,
            stop,
            method=method,
            shape=None if method.elementwise else tensor.info.shape,
        )
        return replace(p, fact=self.fact)

    def _chunk(
        self, tensor: TensorPlan, start: int, stop: int, seen: Observations
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what one range of one tensor becomes, under every name that it is written to."""
        if tensor.action in ("merge", "average"):
            if tensor.alias_of is not None:  # written with its leader
                return
            p = self._slice(tensor, start, stop)
            if tensor.action == "merge":
                seen.see(p)
                merged = self.method(p)
            else:
                merged = Average()(p)
            for name in self.plan.names(tensor):
                if name in self.plan.infos:
                    yield name, _rounded(merged, name, self.plan.infos[name], start)
        elif tensor.name in self.plan.infos:
            info = self.plan.infos[tensor.name]
            if self._is_declared_frozen(tensor):
                self._check_frozen(tensor.name, start, stop)
            copied = self._copied(self.inputs.reference, tensor.name, info, start, stop)
            yield tensor.name, copied

    def _copied(
        self, checkpoint: Checkpoint, name: str, info: TensorInfo, start: int, stop: int
    ) -> Tensor:
        values = checkpoint.read(name, start, stop)
        if not values.dtype.is_floating_point or name in self.plan.as_is:
            return values.to(info.dtype)
        check_values(values, checkpoint, name, start)
        return _rounded(values, name, info, start)

    def _is_declared_frozen(self, tensor: TensorPlan) -> bool:
        return (
            tensor.action == "keep"
            and tensor.name in self.inputs.frozen
            and tensor.name not in self.plan.as_is
        )

    def _check_frozen(self, name: str, start: int, stop: int) -> None:
        reference = self.inputs.reference
        values = reference.read(name, start, stop)
        for task, expert in self.inputs.experts.items():
            if not same_values(values, expert.read(name, start, stop)):
                raise InputError(
                    f"{expert.file_of(name)}: tensor {name!r}, which expert.json says was frozen, "
                    f"must equal {reference.file_of(name)}'s; got other values (task {task!r}). "
                    f"Give the base that this expert was fine-tuned from, or a rule: "
                    f"{{{name}: keep}}."
                )


def _rounded(values: Tensor, name: str, info: TensorInfo, start: int) -> Tensor:
    """Return finite values in the type to write.

    Raises:
        InputError: They do not fit that type.
    """
    rounded = values.to(info.dtype)
    if all_finite(rounded):
        return rounded
    flat, stored = values.flatten(), rounded.flatten()
    first = first_not_finite(stored)
    at = f"at {unravel(start + first, info.shape)} of tensor {name!r}"
    if not all_finite(flat[first]):
        raise InputError(
            f"method: must give finite values; got {flat[first].item():g} {at} from finite inputs. "
            f"Take smaller scales, or Hessians of smaller sums."
        )
    raise InputError(
        f"dtype: must hold the merged values; got {flat[first].item():g} {at}, which is "
        f"{stored[first].item():g} in {str(info.dtype).removeprefix('torch.')}. Write a wider "
        f"type, or take smaller scales."
    )
