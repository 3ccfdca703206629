"""Merging: from files to a folder in constant memory, or in memory.

The same steps in either case: open the inputs under one set of names
(:mod:`lit_merge.streaming.inputs`), decide what happens to each tensor
(:mod:`lit_merge.streaming.plan`), and stream the data through the method
(:mod:`lit_merge.streaming.stream`). Sums are made in float32, in float64 for tensors of float64,
and rounded once to the type that is written.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.checkpoint import (
    SafetensorsWriter,
    TensorInfo,
    fingerprint,
    open_checkpoint,
)
from lit_merge.errors import InputError
from lit_merge.expert.info import ExpertInfo
from lit_merge.methods import GradientMatching, MergeMethod
from lit_merge.output import new_folder, require_free
from lit_merge.parameters import ParametersPolicy, TensorPlan
from lit_merge.streaming.inputs import MergeInputs
from lit_merge.streaming.open_inputs import inputs_in_memory, open_inputs, tasks_of
from lit_merge.streaming.plan import MergePlan, plan_merge
from lit_merge.streaming.progress import MergeProgress, merge_progress
from lit_merge.streaming.provenance import copy_companions, merge_record, write_record
from lit_merge.streaming.stream import MergeStream, Observations, StateDictSink

MAX_TRACE_RATIO = 30.0
"""How far the experts' Hessian traces may lie apart before a merge warns of it."""

_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class MergeWarning(UserWarning):
    """A merge that went through and is likely not what was wanted."""


@dataclass(frozen=True)
class MergeResult:
    """What :func:`merge` did; ``merge.json`` in the folder says the same and more.

    Attributes:
        path: The merged folder.
        record: What was done with each tensor.
        tasks: The experts' names, in order.
        seconds: How long it took.
        traces: The sum of each expert's Hessian over the merged tensors, by task; empty for a
            method without curvature.
        notes: What a user should know about the inputs.
        warnings: What is likely wrong.
    """

    path: Path
    record: tuple[TensorPlan, ...]
    tasks: tuple[str, ...]
    seconds: float
    traces: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


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


def merge(
    base: str | Path | None,
    experts: Mapping[str, str | Path] | Sequence[str | Path],
    method: MergeMethod = GradientMatching(),  # noqa: B008 - frozen
    output: str | Path = "merged",
    *,
    policy: ParametersPolicy = ParametersPolicy(),  # noqa: B008 - frozen
    base_hessian: str | Path | None = None,
    dtype: str | None = None,
    replace: bool = False,
    progress: bool = True,
) -> MergeResult:
    """Merge experts, from files to a folder, in memory that does not grow with the model.

    The folder holds ``model.safetensors`` under the base's names, ``heads/<task>.safetensors`` with
    the tensors that each task keeps of its own, ``merge.json``
    (:mod:`lit_merge.streaming.provenance`), and what a Hugging Face base has beside its weights. It
    appears whole or not at all.

    Args:
        base: What the experts were fine-tuned from: a checkpoint file, an expert folder or a
            Hugging Face folder. None only for methods that do not need it.
        experts: Expert folders or checkpoints by task name, or a list of them, named by their
            paths.
        method: How to merge.
        output: The folder to write.
        policy: What is done with heads, embeddings, buffers and tensors that rules name.
        base_hessian: The base's own Hessian: a file, or a folder with one. None for an isotropic
            prior.
        dtype: The floating type to write ("float32", "bfloat16", "float16", "float64"); None to
            keep the base's, tensor by tensor.
        replace: Whether a folder that exists may be replaced.
        progress: Whether to show progress on the standard error.

    Raises:
        InputError: An input is missing, damaged or does not fit the others, or the output is not
            free; as far as headers tell, before data is read.
    """
    started = time.perf_counter()
    paths = tasks_of(experts)
    target = _dtype(dtype)
    require_free(output, replace=replace)
    if replace:
        _require_outside(output, [base, base_hessian, *paths.values()])
    with open_inputs(base, paths, base_hessian) as inputs:
        plan = plan_merge(inputs, method, policy=policy, dtype=target)
        with merge_progress(shown=progress) as shown, new_folder(output, replace=replace) as folder:
            seen = _write_tensors(MergeStream(inputs, plan, method), folder, shown)
            notes, alarms = _findings(inputs, plan, seen)
            with open_checkpoint(folder / "model.safetensors") as merged:
                found = fingerprint(merged)
            copy_companions(base, folder, dtype=dtype)
            seconds = time.perf_counter() - started
            record = merge_record(
                base=base,
                experts=paths,
                base_hessian=base_hessian,
                method=method,
                policy=policy,
                dtype=dtype,
                inputs=inputs,
                plan=plan,
                fingerprint=found,
                traces=seen.traces,
                notes=notes,
                warnings=alarms,
                seconds=seconds,
            )
            write_record(folder / "merge.json", record)
    _warn(alarms)
    return MergeResult(
        Path(output), plan.tensors, inputs.tasks, seconds, seen.traces, notes, alarms
    )


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
        merged = _merged(inputs, method, policy, _dtype(dtype))
    _warn(merged.warnings)
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
    _warn(merged.warnings)
    return merged.state


def _merged(
    inputs: MergeInputs, method: MergeMethod, policy: ParametersPolicy, dtype: torch.dtype | None
) -> MergedTensors:
    plan = plan_merge(inputs, method, policy=policy, dtype=dtype)
    stream = MergeStream(inputs, plan, method).surveyed(lambda _: _ignore)
    sink = StateDictSink(plan.infos, {t.name: t.alias_of for t in plan.tensors if t.alias_of})
    heads = {task: StateDictSink(infos) for task, infos in plan.heads.items()}
    seen = stream.run(sink, heads, advance=_ignore)
    notes, alarms = _findings(inputs, plan, seen)
    return MergedTensors(
        state=sink.state_dict(),
        heads={task: head.state_dict() for task, head in heads.items()},
        record=plan.tensors,
        tasks=inputs.tasks,
        traces=seen.traces,
        notes=notes,
        warnings=alarms,
    )


def _write_tensors(stream: MergeStream, folder: Path, shown: MergeProgress) -> Observations:
    plan = stream.plan
    with ExitStack() as stack:

        def writer(path: Path, infos: Mapping[str, TensorInfo]) -> SafetensorsWriter:
            path.parent.mkdir(exist_ok=True)
            return stack.enter_context(SafetensorsWriter(path, infos, {"format": "pt"}))

        model = writer(folder / "model.safetensors", plan.infos)
        heads = {
            task: writer(folder / "heads" / f"{task}.safetensors", infos)
            for task, infos in plan.heads.items()
        }
        ready = stream.surveyed(lambda total: shown.start("reading ahead", total))
        return ready.run(model, heads, advance=shown.start("merging", plan.num_bytes))


def _findings(
    inputs: MergeInputs, plan: MergePlan, seen: Observations
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what to note and what to warn of."""
    notes = [*inputs.notes, *plan.notes]
    notes += [
        f"expert {task!r} equals the base in every merged tensor: it changes nothing but the "
        f"weights of the others"
        for task in inputs.tasks
        if task in seen.unchanged
    ]
    notes += [
        f"experts {one!r} and {two!r} equal each other in every merged tensor"
        for one, two in sorted(seen.equal)
    ]
    alarms = []
    if seen.traces:
        kinds = {task: _kind(info) for task, info in inputs.infos.items() if info.estimator}
        if len(set(kinds.values())) > 1:
            listed = ", ".join(f"{task!r}: {kind}" for task, kind in kinds.items())
            alarms.append(
                f"the Hessians of the experts come from different estimators ({listed}), whose "
                f"sizes may not compare. Compute all of them alike."
            )
        low = min(seen.traces, key=lambda task: seen.traces[task])
        high = max(seen.traces, key=lambda task: seen.traces[task])
        least, most = seen.traces[low], seen.traces[high]
        if most > MAX_TRACE_RATIO * least:
            ratio = f"by a factor of {most / least:.0f}" if least > 0 else "without bound"
            alarms.append(
                f"the Hessian traces of the experts differ {ratio} ({low!r} {least:.3g}, {high!r} "
                f"{most:.3g}), so that {high!r} decides most weights: an expert that fits its "
                f"training data closely has nearly no curvature left there. Compare with "
                f"TaskArithmetic and Average, or take an earlier checkpoint of {low!r}."
            )
    return tuple(notes), tuple(alarms)


def _kind(info: ExpertInfo) -> str:
    return f"{info.estimator}, {info.labels} labels" if info.labels else str(info.estimator)


def _require_outside(output: str | Path, inputs: Iterable[str | Path | None]) -> None:
    folder = Path(output).resolve()
    for path in inputs:
        if path is not None and Path(path).resolve().is_relative_to(folder):
            raise InputError(
                f"{output}: must not hold the inputs when it is replaced; got {str(path)!r} in it. "
                f"Name another output folder."
            )


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in _DTYPES:
        raise InputError(
            f"dtype: must be one of {', '.join(_DTYPES)}, or None for the base's; got {name!r}. "
            f"Correct it."
        )
    return _DTYPES[name]


def _warn(alarms: Sequence[str]) -> None:
    for alarm in alarms:
        warnings.warn(alarm, MergeWarning, stacklevel=3)


def _ignore(num_bytes: int) -> None:
    """Take a number of bytes where no progress is shown."""
