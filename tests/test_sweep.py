"""Which models are one method at several scales, and the curves drawn of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from lit_merge.evaluation import Evaluation, EvaluationRow
from lit_merge.merge_record import MergeRecord
from lit_merge.report.sweep import Merging, merging_of, sweep_of
from lit_merge.report.sweep_plots import mean_panels, sweep_lines, sweep_table, task_panels


def record(method: str, tasks: tuple[str, ...] = ("a", "b"), **settings: Any) -> MergeRecord:
    experts = {task: {"path": f"runs/{task}"} for task in tasks}
    provenance = {
        "method": {"class_path": f"lit_merge.methods.{method}", "init_args": settings},
        "experts": experts,
    }
    return MergeRecord("m", method, tasks, (), provenance=provenance)


def evaluation(values: Mapping[str, tuple[float, float]], *, kind: Any = "merged") -> Evaluation:
    """Return rows of two tasks: the given accuracy and NLL on a, half and double of it on b."""
    rows = []
    for model, (accuracy, nll) in values.items():
        rows.append(EvaluationRow(model, kind, "a", accuracy, 100, nll))
        rows.append(EvaluationRow(model, kind, "b", accuracy / 2, 100, 2 * nll))
    return Evaluation(tuple(rows))


VALUES = {
    "ta 1": (0.6, 1.0),
    "ta 0.5": (0.8, 0.5),
    "gm 0.5": (0.7, 0.6),
    "gm 1": (0.78, 0.52),
    "average": (0.76, 0.55),
}
RECORDS = {
    "ta 1": record("TaskArithmetic", scale=1.0),
    "ta 0.5": record("TaskArithmetic", scale=0.5),
    "gm 0.5": record("GradientMatching", scale=0.5, damping=0.0),
    "gm 1": record("GradientMatching", scale={"a": 1, "b": 1}, damping=0.0),
    "average": record("Average"),
}


def mergings(records: Mapping[str, MergeRecord]) -> dict[str, Merging]:
    found = {name: merging_of(one) for name, one in records.items()}
    return {name: one for name, one in found.items() if one is not None}


def test_models_of_one_method_are_a_curve_in_the_order_of_the_scales() -> None:
    sweep = sweep_of(evaluation(VALUES), mergings(RECORDS))
    assert sweep is not None
    assert {c.label: [(s, line.model) for s, line in c.points] for c in sweep.curves} == {
        "TaskArithmetic": [(0.5, "ta 0.5"), (1.0, "ta 1")],
        "GradientMatching": [(0.5, "gm 0.5"), (1.0, "gm 1")],
    }
    assert [line.model for line in sweep.levels] == ["average"]


def test_other_settings_make_another_curve_and_are_told() -> None:
    records = {
        "ta 1": record("TIES", scale=1.0, density=0.2),
        "ta 0.5": record("TIES", scale=0.5, density=0.2),
        "gm 1": record("TIES", scale=1.0, density=0.5),
        "gm 0.5": record("TIES", scale=1.0, density=0.5),  # once more: the first one counts
    }
    sweep = sweep_of(evaluation(VALUES), mergings(records))
    assert sweep is not None
    assert [curve.label for curve in sweep.curves] == ["TIES(density=0.2)", "TIES(density=0.5)"]
    assert [line.model for _, line in sweep.curves[1].points] == ["gm 0.5"]


def test_other_experts_make_another_curve() -> None:
    records = {
        "ta 1": record("TaskArithmetic", scale=1.0),
        "ta 0.5": record("TaskArithmetic", ("a",), scale=0.5),
    }
    assert sweep_of(evaluation(VALUES), mergings(records)) is None


def test_scales_that_differ_by_task_are_no_point_of_a_curve() -> None:
    one = merging_of(record("TaskArithmetic", scale={"a": 1.0, "b": -1.0}))
    assert one is not None
    assert one.scale is None


@pytest.mark.parametrize("method", [None, {"class_path": "X"}, {"init_args": 3}])
def test_a_record_without_a_method_is_left_out(method: object) -> None:
    assert merging_of(MergeRecord("m", "X", (), (), provenance={"method": method})) is None


def test_one_scale_is_no_curve_and_corrected_models_are_none() -> None:
    assert sweep_of(evaluation({"ta 1": (0.5, 1.0)}), mergings(RECORDS)) is None
    assert sweep_of(evaluation(VALUES, kind="corrected"), mergings(RECORDS)) is None


def test_table_says_what_tuning_would_bring() -> None:
    sweep = sweep_of(evaluation(VALUES), mergings(RECORDS))
    assert sweep is not None
    ours = {line["method"]: line for line in sweep_table(sweep)}["TaskArithmetic"]
    assert (ours["accuracy_at"], ours["accuracy"], ours["accuracy_untuned"]) == (
        "0.5",
        "60.0",  # (0.8 + 0.4) / 2
        "45.0",
    )
    assert (ours["nll_at"], ours["nll"], ours["nll_untuned"]) == ("0.5", "0.750", "1.500")
    assert (ours["ratio"], ours["scales"]) == ("2.00", "0.5 – 1")


def test_panels_tell_every_number_and_mark_every_curve() -> None:
    measured = evaluation(VALUES)
    sweep = sweep_of(measured, mergings(RECORDS))
    assert sweep is not None
    accuracy, nll = mean_panels(sweep)
    assert "TaskArithmetic 60.0 at 0.5, 45.0 at 1" in accuracy.description
    assert "average 57.0 without a scale" in accuracy.description
    assert "GradientMatching 0.900 at 0.5, 0.780 at 1" in nll.description
    tasks = task_panels(sweep, measured)
    assert [panel.title for panel in tasks] == [
        f"{task}: {what}" for task in ("a", "b") for what in ("accuracy in %", "NLL")
    ]
    assert "TaskArithmetic 40.0 at 0.5, 30.0 at 1" in tasks[2].description
    assert [line.label for line in sweep_lines(sweep)] == [
        "TaskArithmetic",
        "GradientMatching",
        "average",
    ]
    assert len({line.colour for line in sweep_lines(sweep)}) == 3
    assert all(set(re.findall(r"#0102\w\w", panel.svg)) == set() for panel in tasks)


def test_a_loss_that_explodes_is_drawn_on_a_logarithmic_axis() -> None:
    values = {**VALUES, "ta 1": (0.2, 30.0)}
    sweep = sweep_of(evaluation(values), mergings(RECORDS))
    assert sweep is not None
    accuracy, nll = mean_panels(sweep)
    assert nll.title.endswith("logarithmic")
    assert not accuracy.title.endswith("logarithmic")


def test_models_without_a_loss_have_curves_of_the_accuracy_alone() -> None:
    rows = tuple(
        EvaluationRow(model, "merged", "a", accuracy, 10) for model, (accuracy, _) in VALUES.items()
    )
    sweep = sweep_of(Evaluation(rows), mergings(RECORDS))
    assert sweep is not None
    assert [panel.title for panel in mean_panels(sweep)] == ["mean of the tasks: accuracy in %"]
    assert task_panels(sweep, Evaluation(rows)) == ()
    assert sweep_table(sweep)[0]["ratio"] == "–"
