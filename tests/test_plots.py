from __future__ import annotations

import re

from lit_merge.evaluation import EXPERTS, Evaluation, EvaluationRow, VarianceRow
from lit_merge.report.plots import NUM_SERIES, accuracy_panels, variance_panels, variance_series

ROWS = (
    EvaluationRow("e", "expert", "a", 0.8, 100),
    EvaluationRow("average", "merged", "a", 0.6, 100),
    EvaluationRow("a model with a name that goes on and on for ever", "corrected", "a", 0.7, 100),
)


def variances(num_models: int, value: float = 1.0) -> tuple[VarianceRow, ...]:
    return tuple(
        VarianceRow(f"m{index}", "merged", "a", site, value)
        for index in range(num_models)
        for site in ("s0", "s1")
    )


def test_panels_are_the_mean_and_one_per_task() -> None:
    panels = accuracy_panels(Evaluation(ROWS))
    assert [panel.title for panel in panels] == [
        "Mean over the tasks, % of the experts",
        "a, accuracy in %",
    ]
    assert "average 75.0" in panels[0].description
    assert "e 80.0, average 60.0" in panels[1].description


def test_without_experts_there_is_no_panel_of_the_mean() -> None:
    assert len(accuracy_panels(Evaluation(ROWS[1:]))) == 1


def test_experts_alone_are_no_bars() -> None:
    assert accuracy_panels(Evaluation(ROWS[:1])) == ()


def test_colours_come_from_the_page_alone() -> None:
    svg = accuracy_panels(Evaluation(ROWS))[0].svg
    assert "var(--merged)" in svg
    assert "var(--corrected)" in svg
    assert "currentColor" in svg
    assert not re.search(r"(fill|stroke): #0102", svg)


def test_long_names_take_two_lines_and_are_cut() -> None:
    svg = accuracy_panels(Evaluation(ROWS))[1].svg
    assert "a model with a name" in svg
    assert "…" in svg


def test_drawing_the_same_twice_gives_the_same_bytes() -> None:
    assert accuracy_panels(Evaluation(ROWS)) == accuracy_panels(Evaluation(ROWS))


def test_series_take_every_colour_before_they_are_dashed() -> None:
    expert = VarianceRow("e", "expert", "a", "s0", 2.0)
    series = variance_series(Evaluation((), (*variances(NUM_SERIES + 1), expert)))
    assert series[0].model == EXPERTS
    colours = [line.colour for line in series[1:]]
    assert len(set(colours[:NUM_SERIES])) == NUM_SERIES
    assert [line.dashed for line in series[1:]] == [False] * NUM_SERIES + [True]


def test_variance_panel_says_how_many_sites_it_has() -> None:
    (panel,) = variance_panels(Evaluation((), variances(2)))
    assert panel.title == "a, variance"
    assert "2 sites" in panel.description
    assert "var(--series-1)" in panel.svg


def test_variance_is_drawn_relative_to_the_experts() -> None:
    expert = tuple(VarianceRow("e", "expert", "a", site, 4.0) for site in ("s0", "s1"))
    (panel,) = variance_panels(Evaluation((), (*expert, *variances(1))))
    assert panel.title == "a, variance / the expert's"
    assert re.search(r">\s*0\.5\s*<", panel.svg)  # a tick between 1/4 and 1


def test_sites_that_do_not_vary_at_all_can_be_drawn() -> None:
    (panel,) = variance_panels(Evaluation((), variances(1, value=0.0)))
    assert "</svg>" in panel.svg


def test_names_with_glyphs_that_matplotlib_lacks_are_drawn() -> None:
    (panel,) = accuracy_panels(Evaluation((EvaluationRow("模型 🦆", "merged", "a", 0.5, 10),)))
    assert "模型 🦆" in panel.svg
