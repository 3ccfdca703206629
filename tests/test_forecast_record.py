"""Reading forecasts, and setting them against what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from lit_merge.errors import InputError
from lit_merge.evaluation import Evaluation, EvaluationRow
from lit_merge.forecast import forecast_inputs
from lit_merge.merge_record import MergeRecord, method_text
from lit_merge.methods import Average, GradientMatching, MergeMethod, TaskArithmetic
from lit_merge.report.comparison_plots import forecast_panels, forecast_section
from lit_merge.report.forecast_record import (
    ForecastRecord,
    comparisons,
    rank_correlation,
    read_forecast,
)
from lit_merge.streaming.provenance import method_settings
from tests.forecast_experts import TASKS, inputs_of


def written(folder: Path, method: MergeMethod) -> ForecastRecord:
    forecast = forecast_inputs(inputs_of(), method, scales=[0.25, 0.5, 1.0])
    (folder / "forecast.json").write_text(json.dumps(forecast.as_dict()))
    return read_forecast(folder / "forecast.json")


def merged(method: MergeMethod, tasks: tuple[str, ...] = TASKS) -> MergeRecord:
    return MergeRecord("m", method_text(method_settings(method)), tasks, ())


def measured(losses: dict[str, float]) -> Evaluation:
    """Return models whose loss is the given one on the first task, and twice it on the second."""
    rows = [EvaluationRow(f"expert {task}", "expert", task, 0.9, 10, 0.25) for task in TASKS[:2]]
    for model, nll in losses.items():
        rows += [
            EvaluationRow(model, "merged", task, 0.5, 10, nll * (1 + index))
            for index, task in enumerate(TASKS[:2])
        ]
    return Evaluation(tuple(rows))


def test_everything_of_a_forecast_is_read_back(tmp_path: Path) -> None:
    forecast = forecast_inputs(inputs_of(), TaskArithmetic(0.4), scales=[0.25, 0.5])
    record = written(tmp_path, TaskArithmetic(0.4))
    assert record.tasks == TASKS
    assert (record.planned, record.best) == (0.4, forecast.best.scale if forecast.best else None)
    assert record.increases[0.4] == pytest.approx(forecast.mean_increases(forecast.increases))
    assert record.increases[0.25] == pytest.approx(
        forecast.mean_increases(forecast.curve[0].increases)
    )
    assert list(record.modules) == [part.name for part in forecast.worst_modules()]


def test_models_of_the_method_at_a_forecast_scale_are_compared(tmp_path: Path) -> None:
    record = written(tmp_path, GradientMatching(0.4))
    models = {
        "at 0.5": merged(GradientMatching(0.5)),
        "planned": merged(GradientMatching(0.4)),
        "between": merged(GradientMatching(0.6)),
        "damped": merged(GradientMatching(0.5, damping=1.0)),
        "another": merged(TaskArithmetic(0.5)),
        "fewer": merged(GradientMatching(0.5), TASKS[:2]),
    }
    evaluation = measured(dict.fromkeys(models, 1.0) | {"unknown": 1.0})
    found = comparisons(record, evaluation, models)
    assert [(one.model, one.task, one.scale) for one in found] == [
        (model, task, scale)
        for model, scale in (("at 0.5", 0.5), ("planned", 0.4))
        for task in TASKS[:2]
    ]
    assert [one.measured for one in found[:2]] == [0.75, 1.75]
    assert found[0].forecast == record.increases[0.5][0]


def test_a_method_without_a_scale_is_compared_as_planned(tmp_path: Path) -> None:
    record = written(tmp_path, Average())
    found = comparisons(record, measured({"average": 1.0}), {"average": merged(Average())})
    assert [one.forecast for one in found] == [record.increases[None][i] for i in range(2)]


def test_the_section_says_what_was_found(tmp_path: Path) -> None:
    record = written(tmp_path, TaskArithmetic(0.5))
    losses = {"a": 0.5, "b": 0.6, "c": 0.9}
    models = {
        name: merged(TaskArithmetic(scale))
        for name, scale in zip(losses, (0.25, 0.5, 1.0), strict=True)
    }
    found = comparisons(record, measured(losses), models)
    section = forecast_section(record, found, with_evaluation=True)
    assert [line["measured"] for line in section["lines"]][:2] == ["+0.250", "+0.750"]
    expected = spearmanr([p.forecast for p in found], [p.measured for p in found]).statistic
    assert section["ranks"][-1] == f"over all 6 points {expected:.2f}"
    curve, scatter = forecast_panels(record, found, name="f")
    assert "smallest total" in curve.description
    assert "a on svhn: expected" in scatter.description
    nothing = forecast_section(record, (), with_evaluation=True)
    assert "No evaluated model was merged by this method" in nothing["sentence"]
    assert len(forecast_panels(record, (), name="f")) == 1


def test_numbers_that_are_equal_but_for_rounding_are_not_ranked(tmp_path: Path) -> None:
    record = written(tmp_path, TaskArithmetic(0.5))
    losses = {"a": 0.5, "b": 0.5 + 1e-7, "c": 0.5 + 2e-7}
    models = {
        name: merged(TaskArithmetic(scale))
        for name, scale in zip(losses, (0.25, 0.5, 1.0), strict=True)
    }
    section = forecast_section(
        record, comparisons(record, measured(losses), models), with_evaluation=True
    )
    assert [text for text in section["ranks"] if "on one task" in text] == []


@pytest.mark.parametrize("pairs", [[(1, 2), (3, 1), (2, 5), (2, 2)], [(0, 0), (1, -1), (5, -9)]])
def test_rank_correlation_is_that_of_scipy(pairs: list[tuple[float, float]]) -> None:
    assert rank_correlation(pairs) == pytest.approx(spearmanr(pairs).statistic)


def test_two_points_or_equal_numbers_have_no_rank_correlation() -> None:
    assert rank_correlation([(1.0, 2.0), (2.0, 3.0)]) is None
    assert rank_correlation([(1.0, 2.0), (1.0, 3.0), (1.0, 4.0)]) is None


@pytest.mark.parametrize(
    "change", [{"planned": {}}, {"curve": [{"scale": math.inf}]}, {"notes": 3}]
)
def test_a_damaged_forecast_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    content = forecast_inputs(inputs_of(), TaskArithmetic(0.5)).as_dict() | change
    (tmp_path / "forecast.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"forecast\.json: must hold a forecast; got a damaged"):
        read_forecast(tmp_path / "forecast.json")
