"""Figures that stand alone: the curve over scales and bars of steps, as PNG, SVG or PDF.

The report draws its own panels as parts of a page. These are the same pictures for a README or a
paper, of numbers that may come from several runs: each is a mean with a standard deviation, which
is drawn as a band or a whisker. A name has one colour in all panels of a figure.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lit_merge.errors import InputError
from lit_merge.output import new_file

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")

Curve = Sequence[tuple[float, float, float]]
"""Points of a method: scale, mean and standard deviation, the scales ascending or not."""

Value = tuple[float, float]
"""A mean and its standard deviation."""

# The page's light colours, in its order; told apart with the common colour-vision deficiencies.
_COLOURS = ("#2f7ec7", "#c2571a", "#17875b", "#8a56c2", "#b8336a", "#8a7a0a", "#64748b", "#8c5a3c")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ((4.0, 3.0), (1.0, 2.0), (6.0, 2.0, 1.0, 2.0), (2.0, 1.0))
_INK, _SOFT, _FAINT = "#1b1f24", "#5b6570", "#d5dae0"
_WIDTH, _HEIGHT = 4.3, 3.3  # inches of a panel
_HANDLE, _CHARACTER = 0.7, 0.075  # inches of a legend's line and letter


def alpha_curve(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Curve]],
    *,
    levels: Mapping[str, Mapping[str, Value]] | None = None,
    log: Collection[str] = (),
    marked: float | None = 1.0,
    xlabel: str = "scale α",
    title: str = "",
    replace: bool = False,
) -> Path:
    """Draw what methods reach over their scale: one panel per quantity, side by side.

    Args:
        path: The file to write, of one of :data:`FORMATS`.
        panels: Per quantity, which is the panel's title, each method's points.
        levels: Per quantity what has no scale, as a horizontal line each.
        log: The quantities on a logarithmic axis; for a loss that explodes.
        marked: A scale to mark with a vertical line; None for none.
        xlabel: What the scale is called.
        title: A title over all panels.
        replace: Whether an existing file may be replaced.

    Raises:
        InputError: The format is another, a panel is empty, a level belongs to no panel, a number
            is not finite, or the file is there already.
    """
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    levels = levels or {}
    _require_panels(panels, levels, "levels")
    _require_panels(panels, dict.fromkeys(log), "log")
    _check(v for p in panels.values() for curve in p.values() for point in curve for v in point)
    _check(value for level in levels.values() for pair in level.values() for value in pair)
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    flat = list(dict.fromkeys(name for level in levels.values() for name in level))
    figure, all_axes = _figure(path, len(panels), title)
    for axes, (quantity, methods) in zip(all_axes, panels.items(), strict=True):
        if marked is not None:
            axes.axvline(marked, color=_SOFT, linewidth=0.8, linestyle=":")
        for name, (mean, deviation) in levels.get(quantity, {}).items():
            place = flat.index(name)
            axes.axhline(
                mean,
                color=_COLOURS[(len(names) + place) % len(_COLOURS)],
                linewidth=1.3,
                dashes=_DASHES[place % len(_DASHES)],
                label=name,
            )
            axes.axhspan(mean - deviation, mean + deviation, color=_SOFT, alpha=0.12, linewidth=0)
        for name, curve in methods.items():
            place = names.index(name)
            scales, means, deviations = zip(*sorted(curve), strict=True)
            colour = _COLOURS[place % len(_COLOURS)]
            low = [mean - sd for mean, sd in zip(means, deviations, strict=True)]
            high = [mean + sd for mean, sd in zip(means, deviations, strict=True)]
            axes.fill_between(scales, low, high, color=colour, alpha=0.18, linewidth=0)
            marker = _MARKERS[place % len(_MARKERS)]
            axes.plot(
                scales,
                means,
                color=colour,
                marker=marker,
                markersize=4.5,
                linewidth=1.8,
                label=name,
            )
        axes.set_title(quantity, loc="left", fontsize=10.5, parse_math=False)
        axes.set_xlabel(xlabel, fontsize=9.5, parse_math=False)
        axes.grid(color=_FAINT, linewidth=0.6)
        if quantity in log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return _save(figure, all_axes, path, [*names, *flat], replace=replace)


def stage_bars(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Value]],
    *,
    controls: Mapping[str, Mapping[str, Value]] | None = None,
    reference: float | None = 100.0,
    ylabel: str = "% of the experts",
    title: str = "",
    replace: bool = False,
) -> Path:
    """Draw bars of what each step reaches, one panel per experiment, beside the controls.

    Args:
        path: The file to write, of one of :data:`FORMATS`.
        panels: Per experiment, which is the panel's title, each step's mean and deviation, in the
            steps' order.
        controls: Per experiment what the steps compete with, as a dashed line each.
        reference: A full line, such as the experts at 100; None for none.
        ylabel: What the bars are.
        title: A title over all panels.
        replace: Whether an existing file may be replaced.

    Raises:
        InputError: As :func:`alpha_curve`.
    """
    controls = controls or {}
    _require_panels(panels, controls, "controls")
    pairs = [v for table in (panels, controls) for panel in table.values() for v in panel.values()]
    _check(value for pair in pairs for value in pair)
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    others = list(dict.fromkeys(name for panel in controls.values() for name in panel))
    top = max([mean + deviation for mean, deviation in pairs] + [reference or 0.0])
    figure, all_axes = _figure(path, len(panels), title)
    for axes, (experiment, steps) in zip(all_axes, panels.items(), strict=True):
        for place, (name, (mean, deviation)) in enumerate(steps.items()):
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            axes.bar([place], [mean], width=0.72, color=colour, label=name)
            axes.errorbar([place], [mean], yerr=[deviation], color=_INK, linewidth=1.2, capsize=3)
            axes.annotate(
                f"{mean:.1f}",
                (place, mean + deviation),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=_INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
            )
        for name, (mean, deviation) in controls.get(experiment, {}).items():
            dashes = _DASHES[others.index(name) % len(_DASHES)]
            axes.axhline(mean, color=_INK, linewidth=1.2, dashes=dashes, label=_control(name))
            axes.axhspan(mean - deviation, mean + deviation, color=_SOFT, alpha=0.15, linewidth=0)
        if reference is not None:
            axes.axhline(reference, color=_INK, linewidth=1.2)
        axes.set_xticks([])
        axes.set_ylim(0, 1.1 * top)
        axes.set_title(experiment, loc="left", fontsize=10.5, parse_math=False)
        axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    all_axes[0].set_ylabel(ylabel, fontsize=9.5, parse_math=False)
    labels = [*names, *(_control(name) for name in others)]
    return _save(figure, all_axes, path, labels, replace=replace)


def _control(name: str) -> str:
    return f"control: {name}"


def _figure(path: str | Path, count: int, title: str) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    if Path(path).suffix not in FORMATS:
        raise InputError(
            f"{path}: must end in {', '.join(FORMATS)} for a plot; got {Path(path).suffix!r}. "
            f"Rename it."
        )
    figure = Figure(figsize=(_WIDTH * count, _HEIGHT), layout="constrained", facecolor="white")
    all_axes: list[Axes] = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9, length=0)
    if title:
        figure.suptitle(title, fontsize=11.5, parse_math=False)
    return figure, all_axes


def _save(
    figure: Figure,
    all_axes: Sequence[Axes],
    path: str | Path,
    labels: Sequence[str],
    *,
    replace: bool,
) -> Path:
    """Put one legend for all panels below them, its labels in this order, and write the file."""
    handles: dict[str, Artist] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    entries = {label: handles[label] for label in labels if label in handles}
    legend = figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=_columns(list(entries), figure.get_figwidth()),
        fontsize=9,
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    with new_file(path, replace=replace) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(partial, dpi=150)
    return Path(path)


def _columns(labels: Sequence[str], width: float) -> int:
    """Return how many columns of a legend fit into so many inches."""
    longest = max(map(len, labels), default=0)
    return max(1, min(len(labels), int(width / (_HANDLE + longest * _CHARACTER))))


def _require_panels(
    panels: Mapping[str, Mapping[str, object]], beside: Mapping[str, object], called: str
) -> None:
    if not panels or not all(panel and all(panel.values()) for panel in panels.values()):
        empty = [title for title, panel in panels.items() if not panel or not all(panel.values())]
        raise InputError(
            f"panels: must have a number at least in each; got {empty or 'no panel'}. Leave the "
            f"empty ones out."
        )
    unknown = [title for title in beside if title not in panels]
    if unknown:
        raise InputError(
            f"{called}: must belong to the panels {', '.join(map(repr, panels))}; got "
            f"{', '.join(map(repr, unknown))}. Name them as the panels."
        )


def _check(numbers: Iterable[float]) -> None:
    for number in numbers:
        if not math.isfinite(number):
            raise InputError(
                f"panels: must be of finite numbers; got {number}. Leave out what failed."
            )
