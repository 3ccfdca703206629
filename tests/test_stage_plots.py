from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

from lit_merge.evaluation import Evaluation, EvaluationRow, Kind
from lit_merge.report import stage_plots
from lit_merge.report.drawing import KIND_COLOURS, STAGES
from lit_merge.report.stage_plots import controls_of, spread, stage_panels

SHARES: dict[str, tuple[Kind, float, float]] = {
    "base": ("base", 0.05, 0.05),
    "fit on the base": ("control", 0.1, 0.2),
    "probe": ("control", 0.7, 0.6),
    "TIES": ("merged", 0.3, 0.3),
    "average": ("merged", 0.2, 0.4),
    "average + least squares": ("corrected", 0.5, 0.6),
    "average + least squares + learned": ("corrected", 0.8, 0.75),
}
STEPS = [name for name in SHARES if name.startswith("average")]
EXPERT = {"a": 0.8, "b": 0.9}


def evaluation(*, tasks: tuple[str, ...] = ("a", "b")) -> Evaluation:
    rows = [EvaluationRow(f"expert {t}", "expert", t, EXPERT[t], 100) for t in tasks]
    for name, (kind, *shares) in SHARES.items():
        stage = STEPS.index(name) + 1 if name in STEPS else None
        rows += [
            EvaluationRow(name, kind, task, share, 100, stage=stage)
            for task, share in zip(("a", "b"), shares, strict=True)
            if task in tasks
        ]
    return Evaluation(tuple(rows))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect what is drawn instead of its SVG."""
    found: list[Any] = []
    monkeypatch.setattr(stage_plots, "to_svg", lambda figure, name: found.append(figure) or "")
    return found


def steps_in(figure: Any) -> list[float]:
    (line,) = [
        line
        for line in figure.axes[0].lines
        if line.get_color() == STAGES[-1] and len(line.get_xdata()) > 1
    ]
    return [float(y) for y in line.get_ydata()]


def test_the_line_goes_through_the_share_of_the_expert_at_every_step(figures: list[Any]) -> None:
    panels = stage_panels(evaluation())
    assert [panel.title.partition(",")[0] for panel in panels] == ["mean of the tasks", "a", "b"]
    by_task = {
        task: [100 * SHARES[name][index + 1] / EXPERT[task] for name in STEPS]  # type: ignore[operator]
        for index, task in enumerate(EXPERT)
    }
    assert steps_in(figures[1]) == pytest.approx(by_task["a"])
    assert steps_in(figures[2]) == pytest.approx(by_task["b"])
    means = [(a + b) / 2 for a, b in zip(by_task["a"], by_task["b"], strict=True)]
    assert steps_in(figures[0]) == pytest.approx(means)


def test_controls_are_dashed_lines_with_the_letters_of_the_legend(figures: list[Any]) -> None:
    found = evaluation()
    stage_panels(found)
    controls = controls_of(found)
    assert [(control.letter, control.model) for control in controls] == [
        ("A", "fit on the base"),
        ("B", "probe"),
    ]
    axes = figures[1].axes[0]
    dashed = [x.get_ydata()[0] for x in axes.lines if x.get_color() == KIND_COLOURS["control"]]
    assert dashed == pytest.approx([100 * 0.1 / 0.8, 100 * 0.7 / 0.8])
    places = {text.get_text(): text.xy[1] for text in axes.texts if text.get_text() in "AB"}
    assert places == pytest.approx({"A": 12.5, "B": 87.5})


def test_all_panels_have_one_axis_that_shows_every_step_and_control(figures: list[Any]) -> None:
    stage_panels(evaluation())
    ((low, high),) = {figure.axes[0].get_ylim() for figure in figures}
    assert 0 <= low < 12.5
    assert high > 100


def test_steps_are_named_by_what_they_add() -> None:
    panel = stage_panels(evaluation())[1]
    assert "average 25.0, + least squares 62.5, + learned 100.0." in panel.description
    assert "Controls: fit on the base 12.5, probe 87.5." in panel.description
    assert "TIES" not in panel.description


def test_one_task_needs_no_panel_of_the_mean() -> None:
    (panel,) = stage_panels(evaluation(tasks=("a",)))
    assert panel.title == "a, % of the expert"


def test_without_a_pipeline_or_experts_there_is_nothing_to_draw() -> None:
    rows = evaluation().rows
    assert stage_panels(Evaluation(tuple(r for r in rows if r.kind != "expert"))) == ()
    assert stage_panels(Evaluation(tuple(r for r in rows if r.stage in {None, 1}))) == ()


def test_a_step_that_was_not_run_on_a_task_is_left_out_there(figures: list[Any]) -> None:
    rows = [r for r in evaluation().rows if not (r.model == STEPS[1] and r.task == "b")]
    stage_panels(Evaluation(tuple(rows)))
    assert len(steps_in(figures[1])) == 3
    assert len(steps_in(figures[2])) == 2


def test_labels_keep_their_distance_and_order_and_the_middle_of_their_values() -> None:
    numbers = random.Random(0)
    for _ in range(50):
        values = [numbers.uniform(0, 10) for _ in range(6)]
        places = spread(values, 1.5)
        order = sorted(range(6), key=lambda i: values[i])
        gaps = [places[b] - places[a] for a, b in pairwise(order)]
        assert min(gaps) >= 1.5 - 1e-9
        assert sum(places) == pytest.approx(sum(values))
    assert spread([1.0, 9.0], 1.5) == (1.0, 9.0)
