"""What a merge has done, what should be noted of it, and what is likely wrong."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lit_merge.expert.info import ExpertInfo
from lit_merge.parameters import TensorPlan
from lit_merge.streaming.findings import Findings
from lit_merge.streaming.inputs import MergeInputs
from lit_merge.streaming.plan import MergePlan

MAX_TRACE_RATIO = 30.0
"""How far the experts' Hessian traces may lie apart before a merge warns of it."""


class MergeWarning(UserWarning):
    """A merge that went through and is likely not what was wanted."""


@dataclass(frozen=True)
class MergeResult:
    """What :func:`merge` did; ``merge.json`` in the folder says the same and more.

    Attributes:
        path: The merged folder, or its URL.
        record: What was done with each tensor.
        tasks: The experts' names, in order.
        seconds: How long it took.
        traces: The sum of each expert's Hessian over the merged tensors, by task; empty for a
            method without curvature.
        notes: What a user should know about the inputs.
        warnings: What is likely wrong.
        num_bytes: How much was read, each input once, and written.
    """

    path: Path | str
    record: tuple[TensorPlan, ...]
    tasks: tuple[str, ...]
    seconds: float
    traces: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    num_bytes: int = 0


def notes_and_warnings(
    inputs: MergeInputs, plan: MergePlan, seen: Findings, traces: Mapping[str, float]
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
    if traces:
        kinds = {task: _kind(info) for task, info in inputs.infos.items() if info.estimator}
        if len(set(kinds.values())) > 1:
            listed = ", ".join(f"{task!r}: {kind}" for task, kind in kinds.items())
            alarms.append(
                f"the Hessians of the experts come from different estimators ({listed}), whose "
                f"sizes may not compare. Compute all of them alike."
            )
        low = min(traces, key=lambda task: traces[task])
        high = max(traces, key=lambda task: traces[task])
        least, most = traces[low], traces[high]
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


def warn(alarms: Sequence[str]) -> None:
    """Issue a warning for each text, in the name of the caller's caller."""
    for alarm in alarms:
        warnings.warn(alarm, MergeWarning, stacklevel=4)
