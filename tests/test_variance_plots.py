from __future__ import annotations

import math
from typing import Any

import pytest

from lit_merge.evaluation import EXPERTS, Evaluation, EvaluationRow, Kind, VarianceRow
from lit_merge.report import variance_plots
from lit_merge.report.drawing import KIND_COLOURS, SERIES, STAGES
from lit_merge.report.variance_plots import variance_legend, variance_lines, variance_panels

SITES = ("s0", "s1", "s2")


def variances(model: str, kind: Kind, task: str, values: list[float]) -> tuple[VarianceRow, ...]:
    return tuple(VarianceRow(model, kind, task, s, v) for s, v in zip(SITES, values, strict=True))


EXPERT = {"a": [2.0, 4.0, 8.0], "b": [1.0, 1.0, 4.0]}
MERGED = {"a": [1.0, 1.0, 0.8], "b": [0.9, 0.5, 1.0]}
TACT = {"a": [2.0, 4.4, 8.0], "b": [1.1, 1.0, 4.0]}
STAGED = Evaluation(
    tuple(
        EvaluationRow(model, kind, task, 0.5, 10)
        for task in EXPERT
        for model, kind in (
            (f"expert {task}", "expert"),
            ("average", "merged"),
            ("average + TACT", "corrected"),
        )
    ),  # type: ignore[arg-type]
    tuple(
        row
        for task in EXPERT
        for row in (
            *variances(f"expert {task}", "expert", task, EXPERT[task]),
            *variances("average", "merged", task, MERGED[task]),
            *variances("average + TACT", "corrected", task, TACT[task]),
        )
    ),
)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect what is drawn instead of its SVG."""
    found: list[Any] = []
    monkeypatch.setattr(variance_plots, "to_svg", lambda figure, name: found.append(figure) or "")
    return found


def drawn(figure: Any, colour: str) -> list[float]:
    (line,) = [line for line in figure.axes[0].lines if line.get_color() == colour]
    return [float(y) for y in line.get_ydata()]


def test_every_panel_draws_the_ratio_to_the_expert_layer_by_layer(figures: list[Any]) -> None:
    panels = variance_panels(STAGED)
    assert [panel.title.partition(":")[0] for panel in panels] == ["mean of the tasks", "a", "b"]
    for task, figure in zip(EXPERT, figures[1:], strict=True):
        for colour, values in ((STAGES[0], MERGED[task]), (STAGES[-1], TACT[task])):
            ratios = [value / unit for value, unit in zip(values, EXPERT[task], strict=True)]
            assert drawn(figure, colour) == pytest.approx(ratios)
        assert drawn(figure, KIND_COLOURS["expert"]) == [1.0, 1.0, 1.0]
        assert figure.axes[0].get_yscale() == "log"


def test_the_first_panel_is_the_geometric_mean_of_the_tasks(figures: list[Any]) -> None:
    variance_panels(STAGED)
    expected = [
        math.sqrt(MERGED["a"][i] / EXPERT["a"][i] * MERGED["b"][i] / EXPERT["b"][i])
        for i in range(3)
    ]
    assert drawn(figures[0], STAGES[0]) == pytest.approx(expected)


def test_all_panels_of_ratios_have_one_axis_that_shows_all_of_them(figures: list[Any]) -> None:
    variance_panels(STAGED)
    bounds = {figure.axes[0].get_ylim() for figure in figures}
    ((low, high),) = bounds
    assert low < 0.8 / 8.0
    assert high > 1.1


def test_a_dead_layer_interrupts_its_line(figures: list[Any]) -> None:
    rows = (
        *variances("e", "expert", "a", [1.0, 1.0, 1.0]),
        *variances("m", "merged", "a", [0.5, 0.0, 0.25]),
    )
    variance_panels(Evaluation((), rows))
    values = drawn(figures[0], SERIES[0])
    assert (values[0], math.isnan(values[1]), values[2]) == (0.5, True, 0.25)


def test_without_an_expert_the_variance_is_drawn_as_it_is(figures: list[Any]) -> None:
    (panel,) = variance_panels(Evaluation((), variances("m", "merged", "a", [3.0, 2.0, 1.0])))
    assert panel.title == "a: variance"
    assert "3 sites" in panel.description
    assert drawn(figures[0], SERIES[0]) == [3.0, 2.0, 1.0]


def test_sites_that_do_not_vary_at_all_can_be_drawn() -> None:
    (panel,) = variance_panels(Evaluation((), variances("m", "merged", "a", [0.0, 0.0, 0.0])))
    assert "</svg>" in panel.svg


def test_without_a_pipeline_every_model_has_its_colour_and_the_experts_come_first() -> None:
    rows = tuple(
        row for index in range(3) for row in variances(f"m{index}", "merged", "a", [1.0, 1.0, 1.0])
    )
    expert = variances("e", "expert", "a", [2.0, 2.0, 2.0])
    lines = variance_lines(Evaluation((), (*rows, *expert)))
    assert list(lines) == [EXPERTS, "m0", "m1", "m2"]
    assert [line.colour for line in lines.values()][1:] == list(SERIES[:3])


def test_legend_names_the_steps_shortly_and_the_other_merges_together() -> None:
    others = tuple(
        VarianceRow(name, "merged", "a", "s0", 1.0) for name in ("TIES", "task arithmetic")
    )
    rows = tuple(
        EvaluationRow(model, kind, "a", 0.5, 10, stage=stage)
        for model, kind, stage in (
            ("TIES", "merged", None),
            ("average", "merged", 1),
            ("average + TACT", "corrected", 2),
        )
    )  # type: ignore[arg-type]
    staged = variances("average + TACT", "corrected", "a", TACT["a"])
    first = variances("average", "merged", "a", MERGED["a"])
    legend = variance_legend(variance_lines(Evaluation(rows, (*staged, *others, *first))))
    assert [label for label, _ in legend] == [
        "average",
        "+ TACT",
        "other merges: TIES, task arithmetic",
    ]
