"""Merging in memory: from files or state dicts to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.methods import GradientMatching, MergeMethod
from lit_merge.parameters import ParametersPolicy, TensorPlan
from lit_merge.streaming.inputs import MergeInputs
from lit_merge.streaming.open_inputs import inputs_in_memory, open_inputs, tasks_of
from lit_merge.streaming.pieces import Part
from lit_merge.streaming.plan import plan_merge
from lit_merge.streaming.request import dtype_of
from lit_merge.streaming.result import notes_and_warnings, warn
from lit_merge.streaming.sinks import Sinks, StateDictSink
from lit_merge.streaming.stream import MergeStream


@dataclass(frozen=True)
class MergedTensors:
    """What :func:`merge_in_memory` made.

    Attributes:
        state: The merged model's tensors by the base's names.
        heads: The tensors that each task has of its own, by task and name.
        record: What was done with each tensor.
        tasks: The experts' names, in order.
        traces: As in :class:`MergeResult`.
        notes: As in :class:`MergeResult`.
        warnings: As in :class:`MergeResult`.
    """

    state: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]
    record: tuple[TensorPlan, ...]
    tasks: tuple[str, ...]
    traces: Mapping[str, float]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def merge_in_memory(
    base: str | Path | None,
    experts: Mapping[str, str | Path] | Sequence[str | Path],
    method: MergeMethod = GradientMatching(),  # noqa: B008 - frozen
    *,
    policy: ParametersPolicy = ParametersPolicy(),  # noqa: B008 - frozen
    base_hessian: str | Path | None = None,
    dtype: str | None = None,
) -> MergedTensors:
    """Merge experts from files, and return the tensors instead of writing them.

    Args:
        base: As for :func:`merge`.
        experts: As for :func:`merge`.
        method: As for :func:`merge`.
        policy: As for :func:`merge`.
        base_hessian: As for :func:`merge`.
        dtype: As for :func:`merge`.

    Raises:
        InputError: As for :func:`merge`.
    """
    with open_inputs(base, tasks_of(experts), base_hessian) as inputs:
        merged = _merged(inputs, method, policy, dtype_of(dtype))
    warn(merged.warnings)
    return merged


def merge_state_dicts(
    base: Mapping[str, Tensor] | None,
    experts: Mapping[str, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]],
    method: MergeMethod,
    *,
    hessians: Mapping[str, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]] | None = None,
    base_hessian: Mapping[str, Tensor] | None = None,
    policy: ParametersPolicy = ParametersPolicy(),  # noqa: B008 - frozen
) -> dict[str, Tensor]:
    """Merge state dicts in memory.

    Args:
        base: The tensors of what the experts were fine-tuned from, by name. None only for methods
            that do not need it.
        experts: The experts' tensors by name; by task, or in a list.
        method: How to merge.
        hessians: The experts' Hessians, sums over their examples, by parameter name; by task or in
            a list, as the experts are.
        base_hessian: The base's own Hessian by parameter name. None for an isotropic prior.
        policy: As for :func:`merge`. A head that every task keeps of its own is the base's in the
            result.

    Returns:
        New tensors under the base's names, in its types and on its devices; the first expert's
        without a base. Names of one tied tensor have one tensor.

    Raises:
        InputError: Names, shapes or values do not fit; names the model and the tensor.
    """
    inputs = inputs_in_memory(base, experts, hessians, base_hessian)
    merged = _merged(inputs, method, policy, None)
    warn(merged.warnings)
    return merged.state


def _merged(
    inputs: MergeInputs, method: MergeMethod, policy: ParametersPolicy, dtype: torch.dtype | None
) -> MergedTensors:
    plan = plan_merge(inputs, method, policy=policy, dtype=dtype)
    stream = MergeStream(inputs, [plan])
    stream.survey(lambda _: _ignore)
    sink = StateDictSink(plan.infos, {t.name: t.alias_of for t in plan.tensors if t.alias_of})
    heads = {task: StateDictSink(infos) for task, infos in plan.heads.items()}
    everything = Part(0, tuple(stream.pieces()))
    (seen,) = stream.run(everything, [Sinks(sink, heads)], advance=_ignore)
    traces = seen.trace_of(inputs.tasks)
    notes, alarms = notes_and_warnings(inputs, plan, seen, traces)
    return MergedTensors(
        state=sink.state_dict(),
        heads={task: head.state_dict() for task, head in heads.items()},
        record=plan.tensors,
        tasks=inputs.tasks,
        traces=traces,
        notes=(*notes, *stream.jobs[0].notes()),
        warnings=alarms,
    )


def _ignore(num_bytes: int) -> None:
    """Take a number of bytes where no progress is shown."""
