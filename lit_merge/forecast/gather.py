"""Reading what a forecast needs: sums over the pieces of a planned merge, nothing kept of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lit_merge.checkpoint import Checkpoint
from lit_merge.errors import InputError
from lit_merge.forecast.quadratic import LineTerms, line_terms, loss_increase
from lit_merge.methods import MergeMethod, ParameterSlice
from lit_merge.methods.method import LookAtAll
from lit_merge.parameters import ParametersPolicy, TensorPlan
from lit_merge.streaming.inputs import MergeInputs, stored_name
from lit_merge.streaming.overrides import Override, with_setting
from lit_merge.streaming.pieces import chunks
from lit_merge.streaming.plan import MergePlan, plan_merge
from lit_merge.streaming.stream import MergeStream
from lit_merge.streaming.values import check_hessian, check_values

R = TypeVar("R")

StartPass = Callable[[str, int], Callable[[int], None]]
"""Begins a pass of a name and a number of bytes; what it returns is told the bytes gone through."""

Increases = tuple[float, ...]
"""The increase of each task's loss, summed over its examples, in the tasks' order."""


class ReadingHessians(MergeMethod):
    """A method that is given the experts' Hessians in any case; see :func:`reading_hessians`."""

    @property
    @abstractmethod
    def inner(self) -> MergeMethod:
        """What it does."""

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that the settings fit the tasks."""
        self.inner.check_tasks(tasks)

    def survey(self, look_at_all: LookAtAll) -> Any:
        """Look at all slices."""
        return self.inner.survey(look_at_all)

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice."""
        return self.inner(p)


def reading_hessians(method: MergeMethod) -> ReadingHessians:
    """Return a method that merges as another and is given the experts' Hessians as well."""

    class Reading(ReadingHessians):  # local, so that no parser offers it as a choice
        inner = method
        elementwise: ClassVar[bool] = method.elementwise
        needs = method.needs | {"hessian"}

    Reading.__name__ = type(method).__name__  # what messages call it
    return Reading()


def silent(description: str, num_bytes: int) -> Callable[[int], None]:
    """Begin a pass that nobody watches."""
    return lambda done: None


def plan_forecast(
    inputs: MergeInputs,
    method: ReadingHessians,
    *,
    policy: ParametersPolicy,
    overrides: Mapping[str, Override],
) -> MergePlan:
    """Plan a merge of which every expert has a Hessian.

    Raises:
        InputError: As :func:`lit_merge.streaming.plan.plan_merge`, or a Hessian is missing.
    """
    for task, expert in inputs.experts.items():
        if task not in inputs.hessians:
            raise InputError(
                f"{expert.path}: must have a Hessian for a forecast (task {task!r}); got none. "
                f'Run "lit-merge curvature" on these weights.'
            )
    reading = {}
    for pattern, override in overrides.items():
        other = override.method
        if override.scale is not None:
            other = with_setting(method.inner, "scale", override.scale, f"overrides[{pattern!r}]")
        reading[pattern] = override if other is None else Override(method=reading_hessians(other))
    return plan_merge(inputs, method, policy=policy, dtype=None, overrides=reading)


def slices_of(
    inputs: MergeInputs,
    plan: MergePlan,
    tensors: Iterable[TensorPlan],
    method: MergeMethod,
    start_pass: StartPass,
    *,
    threads: int | None,
) -> LookAtAll:
    """Return passes over tensors with what a method needs.

    Args:
        inputs: What is merged.
        plan: What is done with each tensor.
        tensors: Those that the method merges.
        method: As :func:`reading_hessians` returns it.
        start_pass: Called at the start of each pass.
        threads: How many pieces are looked at at once; None for one per core.
    """
    merged = tuple(tensors)
    size = sum(tensor.info.nbytes for tensor in merged)
    stream = MergeStream(inputs, [plan], threads=threads)

    def look_at_all(look: Callable[[ParameterSlice], R], every: int = 1) -> Iterable[tuple[str, R]]:
        advance = start_pass("forecast", size // every)
        return stream.slices(stream.jobs[0], method, merged, look, every=every, advance=advance)

    return look_at_all


def along_the_line(look_at_all: LookAtAll, method: MergeMethod) -> dict[str, list[LineTerms]]:
    """Return every task's parabola by tensor, for a method that is linear in its scale.

    Args:
        look_at_all: Starts a pass.
        method: The method at a scale of one.
    """
    fact = method.survey(look_at_all)

    def look(p: ParameterSlice) -> list[LineTerms]:
        base = p.require_base().double()
        direction = method(replace(p, fact=fact)).double() - base
        return [
            line_terms(direction, expert.double() - base, hessian)
            for expert, hessian in zip(p.experts, p.require_hessians(), strict=True)
        ]

    found: dict[str, list[LineTerms]] = {}
    for name, terms in look_at_all(look):
        so_far = found.get(name, [LineTerms()] * len(terms))
        found[name] = [a + b for a, b in zip(so_far, terms, strict=True)]
    return found


def at_each(look_at_all: LookAtAll, methods: Sequence[MergeMethod]) -> dict[str, list[Increases]]:
    """Return the increases under several methods by tensor, a list in the methods' order.

    Args:
        look_at_all: Starts a pass, over what any of the methods needs.
        methods: The methods, at least one; besides their surveys they share one reading.
    """
    facts = [method.survey(look_at_all) for method in methods]

    def look(p: ParameterSlice) -> list[Increases]:
        found = []
        for method, fact in zip(methods, facts, strict=True):
            models = models_of_tasks(method, replace(p, fact=fact))
            found.append(
                tuple(
                    loss_increase(model, expert, hessian)
                    for model, expert, hessian in zip(
                        models, p.experts, p.require_hessians(), strict=True
                    )
                )
            )
        return found

    sums: dict[str, list[Increases]] = {}
    for name, increases in look_at_all(look):
        so_far = sums.get(name)
        sums[name] = (
            increases
            if so_far is None
            else [added(a, b) for a, b in zip(so_far, increases, strict=True)]
        )
    return sums


def models_of_tasks(method: MergeMethod, p: ParameterSlice) -> tuple[Tensor, ...]:
    """Return the slice of the model that each task gets: of its own where the method has masks."""
    merged = method(p)
    if not method.masks:
        return (merged,) * len(p.tasks)
    base = p.require_base()
    scales = method.task_scales(p.fact, p.tasks)
    return tuple(
        torch.where(mask, base + scale * (merged - base), base)
        for mask, scale in zip(method.task_masks(p), scales, strict=True)
    )


def not_merged(inputs: MergeInputs, plan: MergePlan) -> dict[str, Increases]:
    """Return what it costs, by tensor, to keep the base's or to average where experts differ.

    Only tensors that some expert's Hessian has an entry for, and the tasks whose Hessian has one
    and whose expert has the tensor's shape. A task's own tensors cost it nothing.
    """
    found: dict[str, Increases] = {}
    for tensor in plan.tensors:
        if tensor.action not in ("keep", "average") or tensor.alias_of is not None:
            continue
        names = plan.names(tensor)
        charged = [task for task in inputs.hessians if _is_charged(inputs, tensor, names, task)]
        if charged:
            found[tensor.name] = tuple(
                _increase_unmerged(inputs, tensor, names, task) if task in charged else 0.0
                for task in inputs.tasks
            )
    return found


def added(one: Increases, other: Increases) -> Increases:
    """Return the sums of two parts' increases."""
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _is_charged(inputs: MergeInputs, tensor: TensorPlan, names: Sequence[str], task: str) -> bool:
    hessian, expert = inputs.hessians[task], inputs.experts[task]
    return (
        stored_name(hessian, names) in hessian
        and stored_name(expert, names) in expert
        and expert.infos[stored_name(expert, names)].shape == tensor.info.shape
    )


def _increase_unmerged(
    inputs: MergeInputs, tensor: TensorPlan, names: Sequence[str], task: str
) -> float:
    keeps = tensor.action == "keep"
    models = [inputs.reference] if keeps else list(inputs.experts.values())
    total = 0.0
    for start, stop in chunks(tensor.info.numel):
        result = torch.stack([_weights(model, names, start, stop) for model in models]).mean(0)
        expert = _weights(inputs.experts[task], names, start, stop)
        hessian = inputs.hessians[task]
        curvature = hessian.read(stored_name(hessian, names), start, stop)
        check_hessian(curvature, hessian, stored_name(hessian, names), start, finite=True)
        total += loss_increase(result, expert, curvature)
    return total


def _weights(checkpoint: Checkpoint, names: Sequence[str], start: int, stop: int) -> Tensor:
    name = stored_name(checkpoint, names)
    values = checkpoint.read(name, start, stop).double()
    check_values(values, checkpoint, name, start)
    return values
