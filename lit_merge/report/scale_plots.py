"""Heat maps of a correction: layers by tasks, and channels by tasks where it changed the most.

Blue shrinks, orange grows, and the middle, which has the panel's own colour, leaves a channel as it
is. Maps of layers carry their numbers, so that they can be read on paper without colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lit_merge.evaluation import Evaluation
from lit_merge.report.drawing import INK, Panel, to_svg, wrapped
from lit_merge.report.heat_map import (
    Cell,
    colour_limit,
    draw_cells,
    draw_key,
    layer_map,
    map_axes,
)
from lit_merge.report.scales import (
    CorrectionScales,
    SiteScales,
    in_forward_order,
    relative_shifts,
)

CHANNEL_MAPS = 3
"""How many sites have a map of their channels."""

_COLUMNS = 160  # of a map of channels: more would be too fine for a screen
_NAME = 24  # characters of a layer's name
_SHOWN = 0.95  # share of a site's scales that lie inside the colours


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
    means: list[list[Cell]] = [list(one.mean) for one in sites]
    spreads: list[list[Cell]] = [list(one.spread) for one in sites]
    shifts = [relative_shifts(one, tasks, evaluation) for one in sites]
    panels = [
        Panel(
            "Scale: mean over the channels, as a factor",
            f"Geometric mean of the scales at {len(sites)} sites for {', '.join(tasks)}: "
            f"{_range(means, factor)}.",
            layer_map(means, names, tasks, factor, name=f"{name}-mean", end=_short_factor),
        ),
        Panel(
            "Scale: spread over the channels, as a factor",
            f"Geometric standard deviation of the scales over the channels at {len(sites)} sites: "
            f"{_range(spreads, factor)}.",
            layer_map(
                spreads,
                names,
                tasks,
                factor,
                name=f"{name}-spread",
                signed=False,
                end=_short_factor,
            ),
        ),
    ]
    if any(cell is not None for row in shifts for cell in row):
        panels.append(
            Panel(
                "Shift, in standard deviations of the expert",
                f"Root mean square of the shifts over the channels at {len(sites)} sites, divided "
                f"by the standard deviation of the expert's activations: {_range(shifts, plain)}.",
                layer_map(shifts, names, tasks, plain, name=f"{name}-shift", signed=False),
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


def _channels(one: SiteScales, tasks: Sequence[str], *, name: str) -> Panel:
    """Draw one row per task and one column per channel, or per few of them, sorted by the mean."""
    values = one.log2[:, one.log2.mean(dim=0).argsort()]
    count = values.shape[1]
    per_column = math.ceil(count / _COLUMNS)
    starts = range(0, count, per_column)
    cells = [[float(row[start : start + per_column].mean()) for start in starts] for row in values]
    figure, axes, bar = map_axes(1.05 + 0.26 * len(tasks))
    # A few channels that are far out would take the colours away from all others.
    limit = colour_limit([float(values.abs().quantile(_SHOWN))])
    draw_cells(axes, cells, limit)
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
    draw_key(bar, limit, _short_factor, signed=True)
    described = ", ".join(
        f"{task} {factor(float(row.min()))} to {factor(float(row.max()))}"
        for task, row in zip(tasks, values, strict=True)
    )
    return Panel(
        f"Scale per channel: {one.site}",
        f"Scales of the {count} channels of {one.site}: {described}.",
        to_svg(figure, name=name),
    )


def _short_factor(log2: float) -> str:
    return f"{2**log2:.2g}"


def _range(cells: Sequence[Sequence[Cell]], text: Callable[[float], str]) -> str:
    values = [cell for row in cells for cell in row if cell is not None]
    return f"from {text(min(values))} to {text(max(values))}"
