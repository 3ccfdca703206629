from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

import lit_merge.methods as methods_package
from lit_merge.errors import InputError
from lit_merge.forecast import (
    at_best_scale,
    forecast_inputs,
)
from lit_merge.methods import (
    DARE,
    DELLA,
    TIES,
    Average,
    GradientMatching,
    MergeMethod,
    ParameterSlice,
    TaskArithmetic,
)
from lit_merge.streaming.overrides import Override
from tests.forecast_experts import (
    BASE,
    COUNTS,
    EXPERTS,
    HESSIANS,
    TASKS,
    State,
    best_of,
    inputs_of,
    loop_increase,
    merged_by,
    total_of,
)


@pytest.mark.parametrize("weighting", ["mean", "sum"])
@pytest.mark.parametrize(
    "method",
    [TaskArithmetic(), TIES(0.5), TIES(0.3, scope="tensor", sign="frequency")],
    ids=repr,
)
def test_the_best_scale_is_where_a_search_finds_the_smallest_total(
    method: MergeMethod, weighting: Any
) -> None:
    weights = {t: 1.0 / COUNTS[t] if weighting == "mean" else 1.0 for t in TASKS}

    def total(scale: float) -> float:
        return total_of(dataclasses.replace(method, scale=float(scale)), weights)  # type: ignore[type-var]

    found = minimize_scalar(total, bracket=(0.0, 1.0), options={"xtol": 1e-9})
    forecast = forecast_inputs(inputs_of(), method, weighting=weighting)
    assert forecast.closed_form
    assert best_of(forecast) == pytest.approx(found.x, abs=1e-6)
    assert forecast.best is not None
    assert forecast.total(forecast.best.increases) == pytest.approx(found.fun, rel=1e-9)
    for point in forecast.curve[::5]:
        assert forecast.total(point.increases) == pytest.approx(total(point.scale), rel=1e-9)


def test_scales_by_task_are_scaled_together() -> None:
    unit = {"svhn": 0.5, "dtd": 0.1, "cars": 2.0}
    weights = {task: 1.0 / COUNTS[task] for task in TASKS}
    forecast = forecast_inputs(inputs_of(), TaskArithmetic(unit))
    best = best_of(forecast)

    def total(scale: float) -> float:
        return total_of(TaskArithmetic({t: float(scale) * x for t, x in unit.items()}), weights)

    assert (forecast.scale, forecast.unit) == (1.0, unit)
    assert best == pytest.approx(minimize_scalar(total, bracket=(0.0, 1.0)).x, abs=1e-6)


def test_weightings_differ_where_the_numbers_of_examples_do() -> None:
    by_mean = best_of(forecast_inputs(inputs_of(), TaskArithmetic()))
    by_sum = best_of(forecast_inputs(inputs_of(), TaskArithmetic(), weighting="sum"))
    assert abs(by_mean - by_sum) > 0.01


def test_a_scale_that_is_not_linear_is_looked_for_on_the_list() -> None:
    method = GradientMatching(damping=20.0)
    scales = [0.2, 0.5, 0.8, 1.4]
    weights = {task: 1.0 / COUNTS[task] for task in TASKS}
    forecast = forecast_inputs(inputs_of(), method, scales=scales)
    totals = {
        scale: total_of(dataclasses.replace(method, scale=scale), weights)
        for scale in (*scales, 1.0)
    }
    assert {p.scale: forecast.total(p.increases) for p in forecast.curve} == pytest.approx(
        totals, rel=1e-9
    )
    assert best_of(forecast) == min(totals, key=lambda scale: totals[scale])
    assert not forecast.closed_form
    assert forecast.total(forecast.increases) == pytest.approx(totals[1.0], rel=1e-9)


def test_a_scale_that_cancels_is_said_to_and_left_at_one() -> None:
    forecast = forecast_inputs(inputs_of(), GradientMatching(0.7))
    assert best_of(forecast) == 1.0
    assert any("hardly depends on the scale" in note for note in forecast.notes)
    damped = forecast_inputs(inputs_of(), GradientMatching(damping=20.0))
    assert not any("hardly depends" in note for note in damped.notes)


def test_the_end_of_the_list_is_noted() -> None:
    forecast = forecast_inputs(inputs_of(), GradientMatching(damping=1e4), scales=[2.0, 3.0, 1.0])
    assert best_of(forecast) == 1.0
    assert any("least at the end of the scales, 1" in note for note in forecast.notes)


def test_overrides_stay_as_planned_at_every_scale() -> None:
    overrides = {
        "emb.*": Override(method=Average()),
        "blocks.*.bias": Override(scale=0.9),
        "top": Override(action="keep"),
    }
    forecast = forecast_inputs(inputs_of(), TaskArithmetic(0.4), overrides=overrides)
    weights = {task: 1.0 / COUNTS[task] for task in TASKS}

    def merged_at(scale: float) -> State:
        shared = merged_by(TaskArithmetic(float(scale)))
        return {
            "emb.weight": merged_by(Average())["emb.weight"],
            "blocks.0.weight": shared["blocks.0.weight"],
            "blocks.0.bias": merged_by(TaskArithmetic(0.9))["blocks.0.bias"],
            "top": BASE["top"],
        }

    def total(scale: float) -> float:
        return sum(
            weights[t] * sum(loop_increase(merged_at(scale), EXPERTS[t], HESSIANS[t]).values())
            for t in TASKS
        )

    assert forecast.total(forecast.increases) == pytest.approx(total(0.4), rel=1e-9)
    found = minimize_scalar(total, bracket=(0.0, 1.0))
    assert best_of(forecast) == pytest.approx(found.x, abs=1e-6)
    assert forecast.best is not None
    assert forecast.total(forecast.best.increases) == pytest.approx(found.fun, rel=1e-9)


def test_an_override_for_everything_leaves_no_scale_to_find() -> None:
    forecast = forecast_inputs(
        inputs_of(), TaskArithmetic(), overrides={"*": Override(method=Average())}
    )
    assert forecast.best is None
    assert forecast.increases == pytest.approx(forecast_inputs(inputs_of(), Average()).increases)


def methods_with_a_scale() -> list[Any]:
    found = [getattr(methods_package, name) for name in methods_package.__all__]
    kinds = [c for c in found if isinstance(c, type) and dataclasses.is_dataclass(c)]
    return [
        *(kind() for kind in kinds if "scale" in {f.name for f in dataclasses.fields(kind)}),
        DARE(combine="ties"),
        DARE(combine="ties", divide="weights", density=0.7),
        DELLA(combine="linear"),
        DELLA(divide="weights"),
    ]


def is_linear(method: Any, p: ParameterSlice) -> bool:
    assert p.base is not None
    one, third = (dataclasses.replace(method, scale=s)(p) - p.base for s in (1.0, 1 / 3))
    return torch.allclose(third, one / 3, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", methods_with_a_scale(), ids=repr)
def test_methods_that_are_linear_in_their_scale_say_so(method: Any) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def gram(size: int) -> Tensor:
        rows = draw(2 * size, size)
        return rows.mT @ rows

    p = ParameterSlice(
        name="blocks.0.weight",
        tasks=("a", "b"),
        base=draw(6, 5),
        experts=(draw(6, 5), draw(6, 5)),
        hessians=(draw(6, 5).abs(), draw(6, 5).abs()),
        base_hessian=draw(6, 5).abs(),
        grams=(gram(5), gram(5)),
        kronecker=((gram(5), gram(6)), (gram(5), gram(6))),
    )
    if not method.masks:  # the tasks' models depend on the scale in another way than the shared
        assert method.linear_in_scale == is_linear(method, p)


def test_the_best_scale_is_that_of_the_forecast() -> None:
    for method in (TaskArithmetic(0.9), GradientMatching(0.3, damping=20.0)):
        chosen, scale = at_best_scale(inputs_of(), method)
        assert scale == best_of(forecast_inputs(inputs_of(), method))
        assert chosen == dataclasses.replace(method, scale=scale)


def test_scales_by_task_keep_their_proportions() -> None:
    shares = dict(zip(TASKS, (0.5, 1.0, 2.0), strict=False))
    chosen, scale = at_best_scale(inputs_of(), TaskArithmetic(shares))
    assert chosen == TaskArithmetic({task: scale * share for task, share in shares.items()})


def test_a_method_without_a_scale_has_no_best_one() -> None:
    message = r"^scale: must be a setting of .* got {}, which has none, or which overrides leave"
    with pytest.raises(InputError, match=message.format("Average")):
        at_best_scale(inputs_of(), Average())
    everything = {"*": Override(method=Average())}
    with pytest.raises(InputError, match=message.format("TaskArithmetic")):
        at_best_scale(inputs_of(), TaskArithmetic(), overrides=everything)


def test_a_negative_best_scale_is_noted_and_refused_for_a_merge() -> None:
    # The second task is stiff where the first one goes the other way.
    base = {"w": torch.zeros(2, dtype=torch.float64)}
    experts = {
        "a": {"w": torch.tensor([-2.0, 0.0], dtype=torch.float64)},
        "b": {"w": torch.tensor([1.0, 0.0], dtype=torch.float64)},
    }
    hessians = {
        "a": {"w": torch.tensor([1.0, 1.0], dtype=torch.float64)},
        "b": {"w": torch.tensor([9.0, 1.0], dtype=torch.float64)},
    }
    inputs = inputs_of(experts, hessians, base=base)
    forecast = forecast_inputs(inputs, TaskArithmetic(), weighting="sum")
    # u = -1: (u·h·τ) = 2 - 9, (u·h·u) = 1 + 9
    assert best_of(forecast) == pytest.approx(-0.7)
    assert any("best scale is negative, -0.7" in note for note in forecast.notes)
    with pytest.raises(InputError, match=r"^scale: must be positive for a merge; got -0\.7"):
        at_best_scale(inputs, TaskArithmetic(), weighting="sum")


def test_curvature_that_says_nothing_of_the_direction_is_refused() -> None:
    nothing = {task: {n: torch.zeros_like(v) for n, v in h.items()} for task, h in HESSIANS.items()}
    with pytest.raises(InputError, match=r"^hessians: must be positive somewhere .* got zero"):
        forecast_inputs(inputs_of(hessians=nothing), TaskArithmetic())
