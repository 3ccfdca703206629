"""A forecast beside what was measured: its curve over the scales, and a scatter of both."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from lit_merge.report.drawing import FAINT, INK, MARKERS, SERIES, Panel, new_axes, to_svg
from lit_merge.report.forecast_record import Comparison, ForecastRecord, rank_correlation
from lit_merge.report.scale_plots import plain
from lit_merge.terminal import MISSING

_HEIGHT = 2.9  # inches
_MODULES = 8  # of the table
_WIDE = 10.0  # ratio of the largest number to the smallest from which an axis is logarithmic
_VARIES = 0.01  # share of the largest number by which numbers must differ to be ranked


def forecast_panels(
    forecast: ForecastRecord, compared: Sequence[Comparison], *, name: str
) -> tuple[Panel, ...]:
    """Draw the expected increase over the scale, and measured against expected increases.

    Args:
        forecast: What was expected.
        compared: What was measured of it; may be empty.
        name: Prefix of the ids, unique in the page.
    """
    panels = []
    scales = sorted(scale for scale in forecast.increases if scale is not None)
    if len(scales) > 1:
        panels.append(_curve(forecast, scales, name=f"{name}-curve"))
    if compared:
        panels.append(_scatter(forecast.tasks, compared, name=f"{name}-scatter"))
    return tuple(panels)


def forecast_section(
    forecast: ForecastRecord, compared: Sequence[Comparison], *, with_evaluation: bool
) -> dict[str, Any]:
    """Return what the page says of a forecast."""
    planned = forecast.increases[forecast.planned]
    pieces = [f"{forecast.method} of {', '.join(forecast.tasks)}."]
    if forecast.best is not None:
        pieces.append(f"The smallest expected total is at a scale of {forecast.best:.3g}.")
    if with_evaluation and not compared:
        pieces.append("No evaluated model was merged by this method at one of its scales.")
    totals = [sum(increases) for increases in zip(*forecast.modules.values(), strict=True)]
    return {
        "name": forecast.name,
        "sentence": " ".join(pieces),
        "tasks": list(forecast.tasks),
        "planned": [MISSING if value is None else f"{value:.3g}" for value in planned],
        "modules": [
            {
                "name": module,
                "shares": [
                    MISSING if total == 0 else f"{100 * value / total:.1f}"
                    for value, total in zip(increases, totals, strict=True)
                ],
            }
            for module, increases in list(forecast.modules.items())[:_MODULES]
        ],
        "ranks": _ranks(compared),
        "lines": [
            {
                "model": one.model,
                "task": one.task,
                "scale": MISSING if one.scale is None else f"{one.scale:g}",
                "forecast": f"{one.forecast:.3g}",
                "measured": f"{one.measured:+.3f}",
            }
            for one in compared
        ],
        "notes": list(forecast.notes),
    }


def _ranks(compared: Sequence[Comparison]) -> list[str]:
    """Return rank correlations in words: of the tasks in a model, of the models on a task."""
    found: list[str] = []
    for what, key in (("the tasks of one model", _model), ("the models on one task", _task)):
        values = [
            rank
            for group in dict.fromkeys(map(key, compared))
            if (rank := _rank([one for one in compared if key(one) == group])) is not None
        ]
        if values:
            mean = plain(sum(values) / len(values))
            ends = f" ({plain(min(values))} to {plain(max(values))})" if len(values) > 1 else ""
            found.append(f"over {what} {mean}{ends}")
    everything = _rank(compared)
    if everything is not None:
        found.append(f"over all {len(compared)} points {plain(everything)}")
    return found


def _model(one: Comparison) -> Hashable:
    return one.model


def _task(one: Comparison) -> Hashable:
    return one.task


def _rank(compared: Sequence[Comparison]) -> float | None:
    pairs = [(one.forecast, one.measured) for one in compared]
    sides = ([abs(a) for a, _ in pairs], [abs(b) for _, b in pairs])
    if any(max(side) - min(side) < _VARIES * max(side) for side in sides if side):
        return None  # equal but for rounding
    return rank_correlation(pairs)


def _curve(forecast: ForecastRecord, scales: Sequence[float], *, name: str) -> Panel:
    from matplotlib.ticker import StrMethodFormatter

    figure, axes = new_axes(height=_HEIGHT)
    for index, task in enumerate(forecast.tasks):
        points = [(scale, forecast.increases[scale][index]) for scale in scales]
        known = [(scale, value) for scale, value in points if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), label=task, linewidth=1.6, **_style(index))
    if forecast.best is not None:
        axes.axvline(forecast.best, color=FAINT, linewidth=1.4)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.2g}"))
    _label(axes, "scale α", "")
    return Panel(
        "Expected increase of the mean loss",
        "Expected increase of each task's mean loss over the scale"
        + (
            f"; the smallest total is at {forecast.best:.3g}." if forecast.best is not None else "."
        ),
        to_svg(figure, name=name),
    )


def _scatter(tasks: Sequence[str], compared: Sequence[Comparison], *, name: str) -> Panel:
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    figure, axes = new_axes(height=_HEIGHT)
    for index, task in enumerate(tasks):
        own = [one for one in compared if one.task == task]
        xs, ys = [one.forecast for one in own], [one.measured for one in own]
        if own:
            axes.plot(xs, ys, label=task, linestyle="", **_style(index))
    expected = [one.forecast for one in compared]
    wide = min(expected) > 0 and max(expected) > _WIDE * min(expected)
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.2g}"))
    axes.axhline(0, color=FAINT, linewidth=1.2)
    _label(axes, "expected increase of the mean loss", "measured increase of the NLL")
    described = "; ".join(
        f"{one.model} on {one.task}: expected {one.forecast:.3g}, measured {one.measured:.3g}"
        for one in compared
    )
    return Panel("Measured against expected", f"{described}.", to_svg(figure, name=name))


def _style(index: int) -> dict[str, Any]:
    marker = MARKERS[index % len(MARKERS)]
    return {"color": SERIES[index % len(SERIES)], "marker": marker, "markersize": 5.0}


def _label(axes: Any, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, color=INK, fontsize=9)
    axes.set_ylabel(ylabel, color=INK, fontsize=9)
    axes.grid(color=FAINT, linewidth=0.6)
    for text in axes.legend(fontsize=8.5, frameon=False, labelcolor=INK).get_texts():
        text.set_parse_math(False)
