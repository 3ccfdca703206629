from __future__ import annotations

from lit_merge.evaluation import Evaluation, EvaluationRow
from lit_merge.report.accuracy_plots import accuracy_panels

ROWS = (
    EvaluationRow("e", "expert", "a", 0.8, 100),
    EvaluationRow("average", "merged", "a", 0.6, 100),
    EvaluationRow("a model with a name that goes on and on for ever", "corrected", "a", 0.7, 100),
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


def test_kinds_have_the_colours_of_the_page() -> None:
    svg = accuracy_panels(Evaluation(ROWS))[0].svg
    assert "var(--merged)" in svg
    assert "var(--corrected)" in svg


def test_long_names_take_two_lines_and_are_cut() -> None:
    svg = accuracy_panels(Evaluation(ROWS))[1].svg
    assert "a model with a name" in svg
    assert "…" in svg


def test_drawing_the_same_twice_gives_the_same_bytes() -> None:
    assert accuracy_panels(Evaluation(ROWS)) == accuracy_panels(Evaluation(ROWS))


def test_names_with_glyphs_that_matplotlib_lacks_are_drawn() -> None:
    (panel,) = accuracy_panels(Evaluation((EvaluationRow("模型 🦆", "merged", "a", 0.5, 10),)))
    assert "模型 🦆" in panel.svg
