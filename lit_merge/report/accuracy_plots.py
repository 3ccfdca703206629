"""The accuracies as bars: the share of the experts' first, then each task by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_merge.evaluation import EXPERTS, Evaluation, TableLine
from lit_merge.report.drawing import (
    DASHED,
    FAINT,
    INK,
    KIND_COLOURS,
    Panel,
    new_axes,
    to_svg,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR = 0.32  # inches per bar
_LABEL = 22  # characters in a line of a model's name beside its bar, of which there are two


def accuracy_panels(evaluation: Evaluation) -> tuple[Panel, ...]:
    """Draw bars: the share of the experts' accuracy first, then the accuracy on each task.

    A task's panel has the 95% Wilson intervals and the expert as a dashed line. Empty without rows
    of other models than experts.
    """
    lines = [line for line in evaluation.lines() if line.model != EXPERTS]
    if not lines:
        return ()
    panels: list[Panel] = []
    if any(line.normalised is not None for line in lines):
        panels.append(_normalised_panel(lines))
    panels += [_task_panel(evaluation, lines, task) for task in evaluation.tasks]
    return tuple(panels)


def _normalised_panel(lines: Sequence[TableLine]) -> Panel:
    figure, axes = new_axes(height=0.75 + _BAR * len(lines))
    shares = [100 * (line.normalised or 0.0) for line in lines]
    _draw_bars(axes, lines, shares, [line.normalised is not None for line in lines])
    axes.axvline(100, color=INK, linestyle=DASHED, linewidth=1.0)
    axes.set_xlim(0, max(125.0, 1.25 * max(shares)))
    described = ", ".join(
        f"{line.model} {share:.1f}" for line, share in zip(lines, shares, strict=True)
    )
    return Panel(
        "Mean over the tasks, % of the experts",
        f"Accuracy as % of the experts' accuracy: {described}.",
        to_svg(figure, name="accuracy-mean"),
    )


def _task_panel(evaluation: Evaluation, lines: Sequence[TableLine], task: str) -> Panel:
    index = evaluation.tasks.index(task)
    cells = [line.cells[index] for line in lines]
    figure, axes = new_axes(height=0.75 + _BAR * len(lines))
    values = [0.0 if cell is None else 100 * cell.accuracy for cell in cells]
    _draw_bars(axes, lines, values, [cell is not None for cell in cells])
    for place, cell in enumerate(cells):
        if cell is not None:
            axes.plot([100 * b for b in cell.interval], [place, place], color=INK, linewidth=1.2)
    expert = evaluation.expert(task)
    if expert is not None:
        axes.axvline(100 * expert.accuracy, color=INK, linestyle=DASHED, linewidth=1.0)
    axes.set_xlim(0, 125)
    axes.set_xticks(range(0, 101, 20))
    described = ", ".join(
        f"{cell.model} {100 * cell.accuracy:.1f}" for cell in [expert, *cells] if cell is not None
    )
    return Panel(
        f"{task}, accuracy in %",
        f"Accuracy on {task} in percent: {described}.",
        to_svg(figure, name=f"accuracy-{index}"),
    )


def _draw_bars(
    axes: Axes, lines: Sequence[TableLine], values: Sequence[float], known: Sequence[bool]
) -> None:
    places = range(len(lines))
    colours = [KIND_COLOURS[line.kind] for line in lines]
    axes.barh(places, values, height=0.66, color=colours)
    for place, value, there in zip(places, values, known, strict=True):
        axes.annotate(
            f"{value:.1f}" if there else "–",
            (1.0, place),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            color=INK,
            fontsize=9,
        )
    axes.set_yticks(places, [wrapped(line.model, _LABEL) for line in lines], parse_math=False)
    axes.invert_yaxis()
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
