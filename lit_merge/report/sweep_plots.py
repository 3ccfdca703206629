"""The curves over the scale: accuracy and loss of every method, over the tasks and on each.

A method that is good at one scale only has to be tuned on data; one whose curve is flat around 1
has not. Methods without a scale are dashed horizontal lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lit_merge.evaluation import Evaluation, TableLine
from lit_merge.report.drawing import (
    DASHED,
    FAINT,
    INK,
    MARKERS,
    Line,
    Panel,
    new_axes,
    series_line,
    to_svg,
)
from lit_merge.report.sweep import Curve, Sweep
from lit_merge.report.tables import loss_text
from lit_merge.terminal import MISSING, percent

UNTUNED = 1.0
"""The scale that nothing has to be tuned for."""

_HEIGHT = 2.7  # inches
_WIDE = 4.0  # ratio of the largest loss to the smallest from which the axis is logarithmic

_Reading = Callable[[TableLine], float | None]


def sweep_lines(sweep: Sweep) -> list[Line]:
    """Return how each curve is drawn, and after them the levels."""
    count = len(sweep.curves)
    curves = [
        replace(series_line(curve.label, index), marker=MARKERS[index % len(MARKERS)], width=1.8)
        for index, curve in enumerate(sweep.curves)
    ]
    levels = [
        replace(series_line(line.model, count + index), marker="", dashed=True)
        for index, line in enumerate(sweep.levels)
    ]
    return [*curves, *levels]


def mean_panels(sweep: Sweep) -> tuple[Panel, ...]:
    """Draw the means over the tasks: accuracy, and loss where every model has one."""
    return _both(sweep, "mean of the tasks", lambda line: line.accuracy, lambda line: line.nll, 0)


def task_panels(sweep: Sweep, evaluation: Evaluation) -> tuple[Panel, ...]:
    """Draw accuracy and loss on each task by itself; empty for a single task."""
    if len(evaluation.tasks) < 2:
        return ()
    panels: list[Panel] = []
    for index, task in enumerate(evaluation.tasks):

        def accuracy(line: TableLine, index: int = index) -> float | None:
            cell = line.cells[index]
            return None if cell is None else cell.accuracy

        def nll(line: TableLine, index: int = index) -> float | None:
            cell = line.cells[index]
            return None if cell is None else cell.nll

        panels += _both(sweep, task, accuracy, nll, index + 1)
    return tuple(panels)


def sweep_table(sweep: Sweep) -> list[dict[str, Any]]:
    """Return a line for each method: its best scale, and what it has at the untuned one."""
    lines: list[dict[str, Any]] = []
    for curve in sweep.curves:
        accuracy, nll = curve.best(by_nll=False), curve.best(by_nll=True)
        plain = curve.at(UNTUNED)
        lowest = None if nll is None else nll[1].nll
        untuned = None if plain is None else plain.nll
        lines.append(
            {
                "method": curve.label,
                "scales": f"{curve.points[0][0]:g} – {curve.points[-1][0]:g}",
                "accuracy_at": MISSING if accuracy is None else f"{accuracy[0]:g}",
                "accuracy": percent(None if accuracy is None else accuracy[1].accuracy),
                "accuracy_untuned": percent(None if plain is None else plain.accuracy),
                "nll_at": MISSING if nll is None else f"{nll[0]:g}",
                "nll": loss_text(lowest),
                "nll_untuned": loss_text(untuned),
                "ratio": f"{untuned / lowest:.2f}" if untuned and lowest else MISSING,
            }
        )
    return lines


def _both(
    sweep: Sweep, title: str, accuracy: _Reading, nll: _Reading, number: int
) -> tuple[Panel, ...]:
    panels = [
        _panel(sweep, f"{title}: accuracy in %", accuracy, number, percentage=True),
        _panel(sweep, f"{title}: NLL", nll, number, percentage=False),
    ]
    return tuple(panel for panel in panels if panel is not None)


def _panel(
    sweep: Sweep, title: str, read: _Reading, number: int, *, percentage: bool
) -> Panel | None:
    unit = 100.0 if percentage else 1.0
    curves = [(curve.label, _points(curve, read, unit)) for curve in sweep.curves]
    levels = [(line.model, read(line)) for line in sweep.levels]
    values = [value for _, points in curves for _, value in points]
    if not values:
        return None
    figure, axes = new_axes(height=_HEIGHT)
    lines = sweep_lines(sweep)
    axes.axvline(UNTUNED, color=FAINT, linewidth=1.2)
    for line, (_, level) in zip(lines[len(curves) :], levels, strict=True):
        if level is not None:
            axes.axhline(unit * level, color=line.colour, linestyle=DASHED, linewidth=line.width)
            values.append(unit * level)
    for line, (_, points) in zip(lines, curves, strict=False):
        line.draw(axes, [scale for scale, _ in points], [value for _, value in points])
    wide = not percentage and min(values) > 0 and max(values) > _WIDE * min(values)
    if wide:
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("scale α", color=INK, fontsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    digits = 1 if percentage else 3
    told = [
        f"{label} {', '.join(f'{value:.{digits}f} at {scale:g}' for scale, value in points)}"
        for label, points in curves
        if points
    ]
    told += [f"{model} {unit * v:.{digits}f} without a scale" for model, v in levels if v]
    kind = "accuracy" if percentage else "nll"
    return Panel(
        f"{title}, logarithmic" if wide else title,
        f"{title} over the scale: {'; '.join(told)}.",
        to_svg(figure, name=f"scale-{kind}-{number}"),
    )


def _points(curve: Curve, read: _Reading, unit: float) -> Sequence[tuple[float, float]]:
    found = [(scale, read(line)) for scale, line in curve.points]
    return [(scale, unit * value) for scale, value in found if value is not None]
