"""Heat maps: a row per layer, a column per task, in colours that the page defines.

The middle (or the lowest) number has the panel's own colour. Small maps carry their numbers, so
that they can be read on paper without colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lit_merge.report.drawing import (
    FAINT,
    HEAT,
    HEAT_INK,
    HEAT_LEVELS,
    INK,
    WIDTH,
    to_svg,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NUMBERED = 60  # layers up to which every cell has its number
_MOST_NUMBERED = 10  # and columns
_FEW = 6  # columns up to which the numbers have their full size
_ROW, _THIN = 0.21, 0.1  # inches per layer, with numbers and without
_HEADER = 38  # characters of all the columns' names that fit side by side
_STRONG = 5  # level from which a cell is too dark (or light) for the page's ink
_LIMITS = (0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)

Cell = float | None
"""The number of a cell; None for one that stays empty."""


def heat_level(value: float, limit: float) -> int:
    """Return the step of the heat map that a value has, from ``-HEAT_LEVELS`` to ``HEAT_LEVELS``.

    >>> heat_level(0.0, 1.0), heat_level(0.5, 1.0), heat_level(-7.0, 1.0)
    (0, 3, -6)
    """
    return max(-HEAT_LEVELS, min(HEAT_LEVELS, round(HEAT_LEVELS * value / limit)))


def layer_map(
    cells: Sequence[Sequence[Cell]],
    names: Sequence[str],
    columns: Sequence[str],
    text: Callable[[float], str],
    *,
    name: str,
    signed: bool = True,
    floor: float = 0.0,
    end: Callable[[float], str] | None = None,
) -> str:
    """Draw one row per layer, the first above, and one column per task or pair of tasks.

    Args:
        cells: The numbers, a row per layer; None for a cell that stays empty.
        names: The layers' names, short enough to stand beside the map.
        columns: The columns' names.
        text: Writes a number into its cell; more than a screenful has none.
        name: Prefix of the ids, unique in the page.
        signed: Whether the colours go to both sides of ``floor``; otherwise only up from it.
        floor: The number that has the colour of the panel.
        end: Writes a number at the colours' key; as ``text`` when None.
    """
    numbered = len(names) <= _NUMBERED and len(columns) <= _MOST_NUMBERED
    height = 0.95 + (_ROW if numbered else _THIN) * len(names)
    figure, axes, bar = map_axes(height)
    above = [[None if cell is None else cell - floor for cell in row] for row in cells]
    limit = colour_limit([abs(cell) for row in above for cell in row if cell is not None])
    draw_cells(axes, above, limit, gap=0.03 if numbered else 0.0)
    if numbered:
        for row, entries in enumerate(cells):
            for column, cell in enumerate(entries):
                strong = cell is not None and abs(heat_level(cell - floor, limit)) >= _STRONG
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    "–" if cell is None else text(cell),
                    ha="center",
                    va="center_baseline",
                    fontsize=8.5 if len(columns) <= _FEW else 7.0,
                    color=HEAT_INK if strong else INK,
                )
    step = 1 if numbered else math.ceil(len(names) / 40)
    shown = range(0, len(names), step)
    axes.set_yticks([row + 0.5 for row in shown], [names[row] for row in shown], parse_math=False)
    axes.tick_params(axis="y", labelsize=8.5)
    _name_columns(axes, columns)
    axes.set_ylim(len(names), 0)
    written = end or text
    draw_key(bar, limit, lambda value: written(value + floor), signed=signed)
    return to_svg(figure, name=name)


def map_axes(height: float) -> tuple[Figure, Axes, Axes]:
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


def draw_cells(
    axes: Axes, cells: Sequence[Sequence[Cell]], limit: float, *, gap: float = 0.0
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


def draw_key(bar: Axes, limit: float, text: Callable[[float], str], *, signed: bool) -> None:
    """Draw what the colours mean."""
    levels = range(-HEAT_LEVELS if signed else 0, HEAT_LEVELS + 1)
    cells: list[list[Cell]] = [[limit * level / HEAT_LEVELS for level in levels]]
    draw_cells(bar, cells, limit)
    bar.set_ylim(1, 0)
    bar.set_yticks([])
    bar.spines[:].set_visible(True)
    bar.spines[:].set_color(FAINT)
    ends = [-limit, 0.0, limit] if signed else [0.0, limit]
    places = [0.5, len(levels) / 2, len(levels) - 0.5] if signed else [0.5, len(levels) - 0.5]
    bar.set_xticks(places, [text(end) for end in ends])
    bar.tick_params(labelsize=8.5)


def _name_columns(axes: Axes, columns: Sequence[str]) -> None:
    axes.tick_params(axis="x", labeltop=True, labelbottom=False, labelsize=8.5)
    places = [column + 0.5 for column in range(len(columns))]
    if max(map(len, columns)) <= _HEADER // len(columns):
        axes.set_xticks(places, list(columns), parse_math=False)
        return
    names = [wrapped(task, 18, lines=1) for task in columns]
    axes.set_xticks(places, names, parse_math=False, rotation=35, ha="left", rotation_mode="anchor")


def colour_limit(sizes: Sequence[float]) -> float:
    """Return the end of the colours: the first round number that nothing exceeds."""
    largest = max(sizes, default=0.0)
    return next((limit for limit in _LIMITS if largest <= limit), max(largest, _LIMITS[-1]))
