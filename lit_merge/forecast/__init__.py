"""What a merge will cost each task, from the experts' curvature alone: no data, nothing written.

:mod:`lit_merge.forecast.quadratic` is the formula, :mod:`lit_merge.forecast.gather` its sums over
the files, :mod:`lit_merge.forecast.over_scales` the search for a scale and
:mod:`lit_merge.forecast.result` what comes out.

- A method whose result is :math:`θ_0 + α u` in its scale α makes every task's forecast a parabola
  in α. Three inner products per task and tensor, from one reading, give it at any scale, and the
  scale of the smallest total in closed form.
- A method with another kind of scale, as gradient matching, is evaluated at a list of scales in
  one reading; the best is the best of that list.
- A method without a scale is evaluated as it is.

Tensors that overrides give a method or a scale of their own stay as planned at every scale.

How near it comes, for task arithmetic on test data that no forecast saw:

================================== ========== ============= ========= =================
experts                            best scale best accuracy best NLL  too small by
                                   forecast   at            at        a factor of
================================== ========== ============= ========= =================
ViT on digits, 4 tasks             0.24       0.4           0.5       33 to 245
MiniLM on two texts, 1 epoch       0.41       0.6           0.8       96 to 29,500
================================== ========== ============= ========= =================

On the digits the accuracy is about 42 % at the forecast's scale and 48 % at the best, on the texts
75 % and 84 %: a start for a search where there is no data, and no more. Over these scales the total
of the forecast has a rank correlation of 0.27 and -0.14 with the true one; over the tasks of one
merge it has 0.4 to 1.0 on the digits, while the two texts come out in the wrong order. Most of what
is missing is not in a diagonal: along a task vector of the digits, the whole Fisher information of
the same expert says 40 to 70 times as much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_merge.errors import InputError
from lit_merge.forecast.gather import (
    Increases,
    StartPass,
    at_each,
    not_merged,
    plan_forecast,
    reading_hessians,
    silent,
    slices_of,
)
from lit_merge.forecast.over_scales import measure
from lit_merge.forecast.result import (
    Forecast,
    PartForecast,
    Weighting,
    sums_of,
    task_weights,
)
from lit_merge.forecast.scaled import ScaledMethod
from lit_merge.methods import GradientMatching, MergeMethod
from lit_merge.methods.method import LookAtAll
from lit_merge.methods.settings import check_choice, check_numbers
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming.inputs import MergeInputs
from lit_merge.streaming.open_inputs import open_inputs, tasks_of
from lit_merge.streaming.overrides import Override
from lit_merge.streaming.progress import merge_progress

__all__ = [
    "DEFAULT_SCALES",
    "Forecast",
    "Weighting",
    "at_best_scale",
    "forecast_inputs",
    "forecast_merge",
]

DEFAULT_SCALES = tuple(index / 10 for index in range(11))
"""The scales of a forecast's curve: 0, 0.1, … 1."""


def forecast_merge(
    base: str | Path | None,
    experts: Mapping[str, str | Path] | Sequence[str | Path],
    method: MergeMethod = GradientMatching(),  # noqa: B008 - frozen
    *,
    policy: ParametersPolicy = ParametersPolicy(),  # noqa: B008 - frozen
    base_hessian: str | Path | None = None,
    overrides: Mapping[str, Override] | None = None,
    weighting: Weighting = "mean",
    scales: Sequence[float] = DEFAULT_SCALES,
    threads: int | None = None,
    progress: bool = True,
) -> Forecast:
    """Forecast what a merge will cost each task, by tensor and by scale, without merging.

    Args:
        base: What the experts were fine-tuned from, as in :func:`lit_merge.merge`.
        experts: Expert folders by task name, or a list of them; every one with a Hessian, whatever
            the method.
        method: How the merge is planned.
        policy: What is done with heads, embeddings, buffers and tensors that rules name.
        base_hessian: The base's own Hessian: a file, or a folder with one.
        overrides: Another method, scale or action for some tensors, by pattern.
        weighting: What the total is of: the increases of the tasks' mean losses ("mean"), in which
            every task counts alike, or of their sums over the training examples ("sum").
        scales: The scales of the curve.
        threads: How many pieces are computed at once; None for one per core.
        progress: Whether to show progress on the standard error.

    Raises:
        InputError: As :func:`lit_merge.merge` before it writes, and as :func:`forecast_inputs`.
    """
    with (
        open_inputs(base, tasks_of(experts), base_hessian) as inputs,
        merge_progress(shown=progress) as shown,
    ):
        return forecast_inputs(
            inputs,
            method,
            policy=policy,
            overrides=overrides,
            weighting=weighting,
            scales=scales,
            threads=threads,
            start=shown.start,
        )


def forecast_inputs(
    inputs: MergeInputs,
    method: MergeMethod,
    *,
    policy: ParametersPolicy = ParametersPolicy(),  # noqa: B008 - frozen
    overrides: Mapping[str, Override] | None = None,
    weighting: Weighting = "mean",
    scales: Sequence[float] = DEFAULT_SCALES,
    threads: int | None = None,
    start: StartPass = silent,
) -> Forecast:
    """Forecast a merge of opened inputs.

    Args:
        inputs: What is merged.
        method: As in :func:`forecast_merge`, and the rest.
        policy: As there.
        overrides: As there.
        weighting: As there.
        scales: As there.
        threads: As there.
        start: Called at the start of each pass with its name and bytes; what it returns is called
            with the bytes gone through.

    Raises:
        InputError: A Hessian or a number of examples is missing, a value cannot be used, or no
            Hessian says anything about the scale.
    """
    check_choice("weighting", weighting, ("mean", "sum"))
    check_numbers("scales", scales)
    if weighting == "mean":
        _require_counts(inputs)
    counts = tuple(inputs.infos[task].num_examples for task in inputs.tasks)
    scaled = ScaledMethod.of(method)
    shared = reading_hessians(scaled.method)
    plan = plan_forecast(inputs, shared, policy=policy, overrides=overrides or {})
    by_tensor: dict[str, Increases] = not_merged(inputs, plan)
    look_at_shared: LookAtAll | None = None
    for used, tensors in plan.groups():
        look_at_all = slices_of(inputs, plan, tensors, used, start, threads=threads)
        if used is shared:
            look_at_shared = look_at_all
        else:
            found = at_each(look_at_all, [used])
            by_tensor |= {name: increases for name, (increases,) in found.items()}
    measured = measure(
        look_at_shared,
        scaled,
        sorted({float(scale) for scale in scales}),
        task_weights(counts, weighting),
        sums_of(by_tensor.values(), len(counts)),
    )
    by_tensor |= measured.tensors
    return Forecast(
        method=repr(method),
        tasks=inputs.tasks,
        num_examples=counts,
        weighting=weighting,
        tensors=tuple(
            PartForecast(tensor.name, by_tensor[tensor.name])
            for tensor in plan.tensors
            if tensor.name in by_tensor
        ),
        scale=measured.scale,
        unit=scaled.unit,
        best=measured.best,
        closed_form=scaled.linear and measured.best is not None,
        curve=measured.curve,
        notes=(*inputs.notes, *plan.notes, *measured.notes),
    )


def at_best_scale(
    inputs: MergeInputs,
    method: MergeMethod,
    *,
    policy: ParametersPolicy = ParametersPolicy(),  # noqa: B008 - frozen
    overrides: Mapping[str, Override] | None = None,
    weighting: Weighting = "mean",
    threads: int | None = None,
    start: StartPass = silent,
) -> tuple[MergeMethod, float]:
    """Return a method at the scale at which it is expected to cost the tasks the least together.

    The scale is the closed form for methods that are linear in their scale, otherwise the best of
    :data:`DEFAULT_SCALES`; for a method with one scale per task, what to multiply these with.

    Args:
        inputs: What is merged.
        method: The method; its own scale does not matter.
        policy: As in :func:`forecast_merge`, and the rest.
        overrides: As there.
        weighting: As there.
        threads: As there.
        start: As in :func:`forecast_inputs`.

    Raises:
        InputError: As :func:`forecast_inputs`; the method has no scale, or none above zero is
            better than the base.
    """
    best = forecast_inputs(
        inputs,
        method,
        policy=policy,
        overrides=overrides,
        weighting=weighting,
        threads=threads,
        start=start,
    ).best
    if best is None:
        raise InputError(
            f"scale: must be a setting of a method that merges tensors to be found by a forecast; "
            f"got {type(method).__name__}, which has none, or which overrides leave nothing to "
            f"merge. Choose TaskArithmetic, TIES or another method with a scale."
        )
    if best.scale <= 0:
        raise InputError(
            f"scale: must be positive for a merge; got {best.scale:.3g} as the forecast's best: by "
            f"the curvature every step from the base costs the tasks together more than it gains. "
            f"Give a number, or leave out an expert."
        )
    return ScaledMethod.of(method).at(best.scale), best.scale


def _require_counts(inputs: MergeInputs) -> None:
    for task, info in inputs.infos.items():
        if info.num_examples is None:
            raise InputError(
                f"{inputs.experts[task].path}: must have num_examples in expert.json for the "
                f"increase of the mean loss (task {task!r}); got none. Add it, or set weighting "
                f'to "sum".'
            )
