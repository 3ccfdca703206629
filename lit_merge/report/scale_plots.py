"""Heat maps of a correction: layers by tasks, and channels by tasks where it changed the most.

Blue shrinks, orange grows, and the middle, which has the panel's own colour, leaves a channel as it
is. Maps of layers carry their numbers, so that they can be read on paper without colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lit_merge.evaluation import Evaluation
from lit_merge.report.drawing import (
    FAINT,
    HEAT,
    HEAT_INK,
    HEAT_LEVELS,
    INK,
    WIDTH,
    Panel,
    to_svg,
    wrapped,
)
from lit_merge.report.scales import (
    CorrectionScales,
    SiteScales,
    in_forward_order,
    relative_shifts,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHANNEL_MAPS = 3
"""How many sites have a map of their channels."""

_COLUMNS = 160  # of a map of channels: more would be too fine for a screen
_NUMBERED = 60  # layers up to which every cell has its number
_ROW, _THIN = 0.21, 0.1  # inches per layer, with numbers and without
_HEADER = 38  # characters of all the tasks' names that fit side by side
_NAME = 24  # characters of a layer's name
_SHOWN = 0.95  # share of a site's scales that lie inside the colours
_STRONG = 5  # level from which a cell is too dark (or light) for the page's ink
_LIMITS = (0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)

_Cell = float | None


def scale_panels(
    corrections: CorrectionScales, evaluation: Evaluation, *, name: str
) -> tuple[Panel, ...]:
    """Draw the maps of a correction: mean scale, its spread, the shift, and single channels.

    Args:
        corrections: What to draw.
        evaluation: Says in which order a forward pass meets the sites and how large the experts'
            activations are; without variances in it there is no map of the shift.
        name: Prefix of the ids, unique in the page.

    Returns:
        The panels; none without sites.
    """
    sites = in_forward_order(corrections, evaluation)
    if not sites:
        return ()
    tasks = corrections.tasks
    names = short_names([one.site for one in sites])
    means: list[list[_Cell]] = [list(one.mean) for one in sites]
    spreads: list[list[_Cell]] = [list(one.spread) for one in sites]
    shifts = [relative_shifts(one, tasks, evaluation) for one in sites]
    panels = [
        Panel(
            "Scale: mean over the channels, as a factor",
            f"Geometric mean of the scales at {len(sites)} sites for {', '.join(tasks)}: "
            f"{_range(means, factor)}.",
            _layers(means, names, tasks, factor, name=f"{name}-mean"),
        ),
        Panel(
            "Scale: spread over the channels, as a factor",
            f"Geometric standard deviation of the scales over the channels at {len(sites)} sites: "
            f"{_range(spreads, factor)}.",
            _layers(spreads, names, tasks, factor, name=f"{name}-spread", signed=False),
        ),
    ]
    if any(cell is not None for row in shifts for cell in row):
        panels.append(
            Panel(
                "Shift, in standard deviations of the expert",
                f"Root mean square of the shifts over the channels at {len(sites)} sites, divided "
                f"by the standard deviation of the expert's activations: {_range(shifts, plain)}.",
                _layers(shifts, names, tasks, plain, name=f"{name}-shift", signed=False),
            )
        )
    panels += [
        _channels(one, tasks, name=f"{name}-site-{index}")
        for index, one in enumerate(sites)
        if one in corrections.most_changed(CHANNEL_MAPS)
    ]
    return tuple(panels)


def short_names(sites: Sequence[str]) -> tuple[str, ...]:
    """Return the names of sites without what all have in front, cut at the left to fit.

    >>> short_names(["encoder.layer.0.fc", "encoder.layer.1.fc"])
    ('0.fc', '1.fc')
    >>> short_names(["fc"])
    ('fc',)
    """
    split = [site.split(".") for site in sites]
    common = 0
    while all(len(parts) > common + 1 and parts[common] == split[0][common] for parts in split):
        common += 1
    if len(sites) == 1:
        common = 0
    short = [".".join(parts[common:]) for parts in split]
    return tuple(text if len(text) <= _NAME else f"…{text[1 - _NAME :]}" for text in short)


def factor(log2: float) -> str:
    """Return a logarithm as the factor that it stands for.

    >>> factor(0.0), factor(-1.0), factor(0.5)
    ('1.00', '0.50', '1.41')
    """
    return f"{2**log2:.2f}"


def plain(value: float) -> str:
    """Return a number with two decimals."""
    return f"{value:.2f}"


def heat_level(value: float, limit: float) -> int:
    """Return the step of the heat map that a value has, from ``-HEAT_LEVELS`` to ``HEAT_LEVELS``.

    >>> heat_level(0.0, 1.0), heat_level(0.5, 1.0), heat_level(-7.0, 1.0)
    (0, 3, -6)
    """
    return max(-HEAT_LEVELS, min(HEAT_LEVELS, round(HEAT_LEVELS * value / limit)))


def _layers(
    cells: Sequence[Sequence[_Cell]],
    names: Sequence[str],
    tasks: Sequence[str],
    text: Callable[[float], str],
    *,
    name: str,
    signed: bool = True,
) -> str:
    """Draw one row per layer, the first above, and one column per task."""
    numbered = len(names) <= _NUMBERED and len(tasks) <= 8
    height = 0.95 + (_ROW if numbered else _THIN) * len(names)
    figure, axes, bar = _with_bar(height)
    limit = _limit([abs(cell) for row in cells for cell in row if cell is not None])
    _draw_cells(axes, cells, limit, gap=0.03 if numbered else 0.0)
    if numbered:
        for row, entries in enumerate(cells):
            for column, cell in enumerate(entries):
                strong = cell is not None and abs(heat_level(cell, limit)) >= _STRONG
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    "–" if cell is None else text(cell),
                    ha="center",
                    va="center_baseline",
                    fontsize=8.5,
                    color=HEAT_INK if strong else INK,
                )
    step = 1 if numbered else math.ceil(len(names) / 40)
    shown = range(0, len(names), step)
    axes.set_yticks([row + 0.5 for row in shown], [names[row] for row in shown], parse_math=False)
    axes.tick_params(axis="y", labelsize=8.5)
    _name_columns(axes, tasks)
    axes.set_ylim(len(names), 0)
    _draw_bar(bar, limit, _short_factor if text is factor else plain, signed=signed)
    return to_svg(figure, name=name)


def _channels(one: SiteScales, tasks: Sequence[str], *, name: str) -> Panel:
    """Draw one row per task and one column per channel, or per few of them, sorted by the mean."""
    values = one.log2[:, one.log2.mean(dim=0).argsort()]
    count = values.shape[1]
    per_column = math.ceil(count / _COLUMNS)
    starts = range(0, count, per_column)
    cells = [[float(row[start : start + per_column].mean()) for start in starts] for row in values]
    figure, axes, bar = _with_bar(1.05 + 0.26 * len(tasks))
    # A few channels that are far out would take the colours away from all others.
    limit = _limit([float(values.abs().quantile(_SHOWN))])
    _draw_cells(axes, cells, limit)
    labels = [wrapped(task, 14, lines=1) for task in tasks]
    axes.set_yticks([row + 0.5 for row in range(len(tasks))], labels, parse_math=False)
    axes.set_xticks([])
    axes.set_ylim(len(tasks), 0)
    several = f", {per_column} to a column" if per_column > 1 else ""
    axes.set_xlabel(
        f"{count} channels{several}, by their mean scale",
        color=INK,
        fontsize=9,
    )
    _draw_bar(bar, limit, _short_factor, signed=True)
    described = ", ".join(
        f"{task} {factor(float(row.min()))} to {factor(float(row.max()))}"
        for task, row in zip(tasks, values, strict=True)
    )
    return Panel(
        f"Scale per channel: {one.site}",
        f"Scales of the {count} channels of {one.site}: {described}.",
        to_svg(figure, name=name),
    )


def _with_bar(height: float) -> tuple[Figure, Axes, Axes]:
    """Return a figure with axes for a map and, below it, for the meaning of its colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.add_gridspec(
        2,
        3,
        height_ratios=[height - 0.55, 0.13],
        width_ratios=[1, 2, 1],
    )
    axes, bar = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, 1])
    for one in (axes, bar):
        one.tick_params(colors=INK, labelsize=9, length=0)
        for spine in one.spines.values():
            spine.set_visible(False)
    return figure, axes, bar


def _draw_cells(
    axes: Axes, cells: Sequence[Sequence[_Cell]], limit: float, *, gap: float = 0.0
) -> None:
    """Fill the cells, one shape for each colour; neighbours of one colour become one piece."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    pieces: dict[int, list[Path]] = {}
    for row, entries in enumerate(cells):
        levels = [None if cell is None else heat_level(cell, limit) for cell in entries]
        start = 0
        while start < len(levels):
            level, end = levels[start], start + 1
            while gap == 0 and end < len(levels) and levels[end] == level:
                end += 1
            if level is not None:
                left, right = start + gap / 2, end - gap / 2
                top, bottom = row + gap, row + 1 - gap
                corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
                pieces.setdefault(level, []).append(Path(corners, closed=True))
            start = end
    for level, paths in pieces.items():
        shape = Path.make_compound_path(*paths)
        axes.add_patch(
            PathPatch(shape, facecolor=HEAT[level], linewidth=0, antialiased=False, snap=False)
        )
    axes.set_xlim(0, max(len(entries) for entries in cells))


def _draw_bar(bar: Axes, limit: float, text: Callable[[float], str], *, signed: bool) -> None:
    """Draw what the colours mean."""
    levels = range(-HEAT_LEVELS if signed else 0, HEAT_LEVELS + 1)
    cells: list[list[_Cell]] = [[limit * level / HEAT_LEVELS for level in levels]]
    _draw_cells(bar, cells, limit)
    bar.set_ylim(1, 0)
    bar.set_yticks([])
    bar.spines[:].set_visible(True)
    bar.spines[:].set_color(FAINT)
    ends = [-limit, 0.0, limit] if signed else [0.0, limit]
    places = [0.5, len(levels) / 2, len(levels) - 0.5] if signed else [0.5, len(levels) - 0.5]
    bar.set_xticks(places, [text(end) for end in ends])
    bar.tick_params(labelsize=8.5)


def _short_factor(log2: float) -> str:
    return f"{2**log2:.2g}"


def _name_columns(axes: Axes, tasks: Sequence[str]) -> None:
    axes.tick_params(axis="x", labeltop=True, labelbottom=False, labelsize=8.5)
    places = [column + 0.5 for column in range(len(tasks))]
    if max(map(len, tasks)) <= _HEADER // len(tasks):
        axes.set_xticks(places, list(tasks), parse_math=False)
        return
    names = [wrapped(task, 18, lines=1) for task in tasks]
    axes.set_xticks(places, names, parse_math=False, rotation=35, ha="left", rotation_mode="anchor")


def _limit(sizes: Sequence[float]) -> float:
    """Return the end of the colours: the first round number that nothing exceeds."""
    largest = max(sizes, default=0.0)
    return next((limit for limit in _LIMITS if largest <= limit), max(largest, _LIMITS[-1]))


def _range(cells: Sequence[Sequence[_Cell]], text: Callable[[float], str]) -> str:
    values = [cell for row in cells for cell in row if cell is not None]
    return f"from {text(min(values))} to {text(max(values))}"
