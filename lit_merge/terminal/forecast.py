"""The tables of a forecast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_merge.terminal.text import MISSING, percent, print_whole, simple_table

if TYPE_CHECKING:
    from lit_merge.forecast import Forecast

_WORST = 10  # modules


def print_forecast(forecast: Forecast, *, console: Console | None = None) -> None:
    """Print what a merge is expected to cost: by task, by scale, and the modules it arises in.

    Args:
        forecast: What :func:`lit_merge.forecast.forecast_merge` returned.
        console: Where to print; standard output when None.
    """
    console = console or Console()
    console.print(Text(f"Forecast of {forecast.method}", style="bold"), soft_wrap=True)
    print_whole(console, _forecast_by_task(forecast))
    if forecast.best is not None:
        console.print(Text(_best_scale(forecast)), soft_wrap=True)
        print_whole(console, _forecast_by_scale(forecast))
    total = forecast.total(forecast.increases)
    modules = simple_table("module", "increase", "share", right=(1, 2))
    for module in forecast.worst_modules()[:_WORST]:
        increase = forecast.total(module.increases)
        modules.add_row(Text(module.name), f"{increase:.4g}", _share(increase, total))
    print_whole(console, modules)
    counted = "each task's mean loss" if forecast.weighting == "mean" else "the summed losses"
    console.print(
        Text(
            f"Totals are of {counted}. The forecast is ½(θ−θ_t)ᵀH_t(θ−θ_t): a first guess for "
            f"comparing plans, not the size, which is too small, often by orders of magnitude.",
            style="dim",
        )
    )
    for note in forecast.notes:
        console.print(Text(f"note: {note}"))


def _forecast_by_task(forecast: Forecast) -> Table:
    columns = ["task", "examples", "mean loss", "summed loss", "share"]
    best = forecast.best
    if best is not None:
        columns.append("at the best scale")
    table = simple_table(*columns, right=tuple(range(1, len(columns))))
    total = forecast.total(forecast.increases)
    means = forecast.mean_increases(forecast.increases)
    at_best = () if best is None else forecast.mean_increases(best.increases)
    for index, task in enumerate(forecast.tasks):
        count, increase = forecast.num_examples[index], forecast.increases[index]
        cells = [
            MISSING if count is None else f"{count:,}",
            _increase(means[index]),
            _increase(increase),
            _share(forecast.weights[index] * increase, total),
        ]
        if best is not None:
            mean = at_best[index]
            cells.append(_increase(best.increases[index] if mean is None else mean))
        table.add_row(Text(task), *cells)
    return table


def _forecast_by_scale(forecast: Forecast) -> Table:
    table = simple_table("scale", "total", right=(0, 1))
    for task in forecast.tasks:
        table.add_column(Text(task), justify="right", no_wrap=True)
    for point in forecast.curve:
        shares = [w * x for w, x in zip(forecast.weights, point.increases, strict=True)]
        cells = (_increase(value) for value in (forecast.total(point.increases), *shares))
        table.add_row(f"{point.scale:g}", *cells)
    return table


def _best_scale(forecast: Forecast) -> str:
    best = forecast.best
    if best is None or forecast.scale is None:
        return ""
    how = "in closed form" if forecast.closed_form else "of those below"
    planned = forecast.total(forecast.increases)
    text = (
        f"Best scale {best.scale:.4g} ({how}): total {forecast.total(best.increases):.4g}; "
        f"planned {forecast.scale:.4g}: {planned:.4g}."
    )
    if forecast.unit is None:
        return text
    scales = ", ".join(f"{task} {best.scale * x:.4g}" for task, x in forecast.unit.items())
    return f"{text} Scales multiply the planned ones; best {scales}."


def _increase(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"


def _share(part: float, total: float) -> str:
    return f"{percent(part / total)} %" if total > 0 else MISSING
