"""The picture of a forecast: its curve over the scales, and where in the model it arises."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_merge.errors import InputError
from lit_merge.forecast.result import Forecast, PartForecast
from lit_merge.output import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
MODULES = 16
"""How many modules get a bar of their own; the rest share one."""

_LABEL = 34  # characters of a module's name
_FAINT = "#d0d0d0"
_PLAIN = (-2, 3)  # powers of ten between which numbers are written out


def write_forecast_plot(path: str | Path, forecast: Forecast, *, replace: bool = False) -> Path:
    """Draw a forecast: the increases over the scales, and by module in the planned merge.

    Args:
        path: The file to write, of one of :data:`FORMATS`.
        forecast: What to draw; without a scale there is no curve.
        replace: Whether an existing file may be replaced.

    Raises:
        InputError: The file is there already, or of another format.
    """
    from matplotlib.figure import Figure

    if Path(path).suffix not in FORMATS:
        raise InputError(
            f"{path}: must end in {', '.join(FORMATS)} for a plot; got {Path(path).suffix!r}. "
            f"Rename it."
        )
    modules = _modules(forecast)
    height = max(3.4, 1.2 + 0.26 * len(modules))
    columns = 2 if forecast.curve else 1
    figure = Figure(figsize=(5.2 * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    if forecast.curve:
        _draw_curve(axes[0], forecast)
    _draw_modules(axes[-1], forecast, modules)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=9, length=0)
    with new_file(path, replace=replace) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(partial, dpi=150)
    return Path(path)


def _draw_curve(axes: Axes, forecast: Forecast) -> None:
    points = list(forecast.curve)
    if forecast.closed_form and forecast.best is not None:
        points = sorted([*points, forecast.best], key=lambda point: point.scale)
    scales = [point.scale for point in points]
    for index, (task, weight) in enumerate(zip(forecast.tasks, forecast.weights, strict=True)):
        values = [weight * point.increases[index] for point in points]
        axes.plot(scales, values, linewidth=1.3, label=task)
    totals = [forecast.total(point.increases) for point in points]
    axes.plot(scales, totals, color="black", linewidth=2.2, label="total")
    if forecast.scale is not None:
        axes.axvline(
            forecast.scale, color="grey", linestyle=":", label=f"planned {forecast.scale:g}"
        )
    if forecast.best is not None:
        axes.plot(
            [forecast.best.scale],
            [forecast.total(forecast.best.increases)],
            "o",
            color="black",
            label=f"least at {forecast.best.scale:.3g}",
        )
    axes.set_xlabel("scale, times the planned ones" if forecast.unit else "scale", fontsize=9)
    axes.set_title(_what(forecast), fontsize=10, loc="left")
    axes.grid(color=_FAINT, linewidth=0.6)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=_PLAIN)
    legend = axes.legend(fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_modules(axes: Axes, forecast: Forecast, modules: Sequence[PartForecast]) -> None:
    places = range(len(modules))
    left = [0.0] * len(modules)
    for index, (task, weight) in enumerate(zip(forecast.tasks, forecast.weights, strict=True)):
        widths = [weight * module.increases[index] for module in modules]
        axes.barh(places, widths, left=left, height=0.7, label=task)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    names = [_short(module.name) for module in modules]
    axes.set_yticks(places, names, parse_math=False)
    axes.invert_yaxis()
    axes.grid(axis="x", color=_FAINT, linewidth=0.6)
    axes.ticklabel_format(axis="x", scilimits=_PLAIN)
    axes.set_title("by module, as planned", fontsize=10, loc="left")
    if not forecast.curve:
        axes.set_xlabel(_what(forecast), fontsize=9)
        for text in axes.legend(fontsize=8, frameon=False).get_texts():
            text.set_parse_math(False)


def _modules(forecast: Forecast) -> list[PartForecast]:
    modules = list(forecast.worst_modules())
    if len(modules) <= MODULES:
        return modules
    rest = modules[MODULES - 1 :]
    sums = tuple(
        sum(module.increases[task] for module in rest) for task in range(len(forecast.tasks))
    )
    return [*modules[: MODULES - 1], PartForecast(f"{len(rest)} others", sums)]


def _what(forecast: Forecast) -> str:
    return f"expected increase of the {forecast.weighting} loss"


def _short(name: str) -> str:
    return name if len(name) <= _LABEL else f"…{name[1 - _LABEL :]}"
