"""How much the activations vary, layer after layer, against the expert's own variance.

A merge lets the variance collapse with depth; a correction brings it back to the line at 1. One
panel per task, and before them their geometric mean; the steps of a pipeline are drawn strongly in
their order, other merges faintly behind them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lit_merge.evaluation import EXPERTS, Evaluation, VarianceRow
from lit_merge.report.drawing import (
    FAINT,
    INK,
    KIND_COLOURS,
    Line,
    Panel,
    new_axes,
    series_line,
    stage_line,
    to_svg,
)
from lit_merge.report.stage_plots import step_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKED = 40  # sites up to which every point has a marker
_MARKS = 16  # markers of a line over more
_HEIGHT = 2.9  # inches
_FAINT = KIND_COLOURS["base"]
_FLOOR = 1e-3  # the ratio below which a picture is no more telling

_Table = dict[str, dict[str, float]]  # a number by model and site


def variance_lines(evaluation: Evaluation) -> dict[str, Line]:
    """Return how each model is drawn, by name, in the order of drawing: what counts comes last.

    Without a pipeline (:meth:`~lit_merge.evaluation.Evaluation.stages`) every model has a colour
    of its own.
    """
    names = list(dict.fromkeys(_name(row) for row in evaluation.variances))
    stages = [line.model for line in evaluation.stages() if line.model in names]
    others = [name for name in names if name != EXPERTS and name not in stages]
    lines: dict[str, Line] = {}
    if EXPERTS in names:
        lines[EXPERTS] = Line(EXPERTS, KIND_COLOURS["expert"], width=1.6)
    for index, name in enumerate(others):
        if stages:
            lines[name] = Line(name, _FAINT, width=0.9)
        else:
            lines[name] = series_line(name, index)
    for index, (name, step) in enumerate(zip(stages, step_names(stages), strict=True)):
        lines[name] = stage_line(step, index, len(stages))
    return lines


def variance_legend(lines: Mapping[str, Line]) -> list[tuple[str, Line]]:
    """Return the entries of the legend: the faint lines share the last one."""
    faint = [line for line in lines.values() if line.colour == _FAINT]
    strong = [line for line in lines.values() if line.colour != _FAINT]
    legend = [(line.label, line) for line in strong]
    if faint:
        legend.append((f"other merges: {', '.join(line.label for line in faint)}", faint[0]))
    return legend


def variance_panels(evaluation: Evaluation) -> tuple[Panel, ...]:
    """Draw the variance by layer on a logarithmic scale, one panel per task.

    It is divided by the expert's at the same site; without an expert for the task it is drawn as it
    is. Sites are numbered in the order of the rows, which is that of a forward pass. With two tasks
    or more and all their experts, the first panel is the geometric mean of the ratios.
    """
    lines = variance_lines(evaluation)
    tasks = tuple(dict.fromkeys(row.task for row in evaluation.variances))
    ratios = {task: _by_model(evaluation, task) for task in tasks}
    relative = {
        task: any(r.kind == "expert" and r.task == task for r in evaluation.variances)
        for task in tasks
    }
    # The same axis for all panels: else a harmless dip would look like a collapse.
    bounds = _bounds([ratios[task] for task in tasks if relative[task]], relative=True)
    panels: list[Panel] = []
    if len(tasks) > 1 and all(relative.values()):
        mean = _mean(list(ratios.values()))
        panels.append(_panel("mean of the tasks", mean, lines, bounds, name="variance-mean"))
    for index, task in enumerate(tasks):
        panels.append(
            _panel(
                task,
                ratios[task],
                lines,
                bounds if relative[task] else _bounds([ratios[task]], relative=False),
                name=f"variance-{index}",
                relative=relative[task],
            )
        )
    return tuple(panels)


def _panel(
    title: str,
    values: _Table,
    lines: Mapping[str, Line],
    bounds: tuple[float, float] | None,
    *,
    name: str,
    relative: bool = True,
) -> Panel:
    sites = list(dict.fromkeys(site for by_site in values.values() for site in by_site))
    figure, axes = new_axes(height=_HEIGHT)
    places = [float(number) for number in range(1, len(sites) + 1)]
    every = 1 if len(sites) <= _MARKED else math.ceil(len(sites) / _MARKS)
    for model, line in lines.items():
        if model in values:
            ys = [values[model].get(site, 0.0) for site in sites]
            ys = [value if value > 0 else math.nan for value in ys]
            line.draw(axes, places, ys, every=every)
    _scale(axes, bounds)
    axes.set_xlabel("layer, from the input to the output", color=INK, fontsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.6, which="major")
    return Panel(
        f"{title}: the expert's variance = 1" if relative else f"{title}: variance",
        f"Variance of the activations at {len(sites)} sites, {title}"
        f"{', divided by that of the expert' if relative else ''}: "
        f"{_described(values, relative=relative)}. The numbers are in the table below the figure.",
        to_svg(figure, name=name),
    )


def _bounds(tables: Sequence[_Table], *, relative: bool) -> tuple[float, float] | None:
    """Return the ends of the axis; None when nothing varies at all."""
    values = [v for table in tables for by_site in table.values() for v in by_site.values()]
    values = [value for value in values if value > 0]
    if not values:
        return None
    low, high = min(values), max(values)
    if relative:
        low, high = max(min(low, 0.7), _FLOOR), max(high, 1.4)
    return low / 1.2, high * 1.2


def _scale(axes: Axes, bounds: tuple[float, float] | None) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if bounds is None:
        return
    axes.set_yscale("log")
    axes.set_ylim(*bounds)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _by_model(evaluation: Evaluation, task: str) -> _Table:
    """Return the ratios on one task by model and site; variances where there is no expert."""
    rows = [row for row in evaluation.variances if row.task == task]
    units = {row.site: row.variance for row in rows if row.kind == "expert"}
    ratios: dict[str, dict[str, float]] = {}
    for row in rows:
        unit = units.get(row.site, 0.0) if units else 1.0
        if unit > 0:
            ratios.setdefault(_name(row), {})[row.site] = row.variance / unit
    return ratios


def _mean(tables: Sequence[_Table]) -> _Table:
    """Return the geometric mean over the tasks, of the models and sites that all of them have."""
    means: dict[str, dict[str, float]] = {}
    for model, by_site in tables[0].items():
        for site in by_site:
            found = [table.get(model, {}).get(site, 0.0) for table in tables]
            if all(value > 0 for value in found):
                logs = [math.log(value) for value in found]
                means.setdefault(model, {})[site] = math.exp(sum(logs) / len(logs))
    return means


def _described(values: _Table, *, relative: bool) -> str:
    parts = []
    for model, by_site in values.items():
        if by_site and not (relative and model == EXPERTS):
            parts.append(f"{model} {min(by_site.values()):.3g} to {max(by_site.values()):.3g}")
    return ", ".join(parts) or "nothing to compare"


def _name(row: VarianceRow) -> str:
    return EXPERTS if row.kind == "expert" else row.model
