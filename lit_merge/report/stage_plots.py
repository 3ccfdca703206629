"""What each step of the pipeline brings: accuracy after the merge and after every correction.

One panel for the mean over the tasks, then one per task, all on the same axis: the steps from left
to right, the expert as the line at 100 %, and the controls as dashed lines with letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase
from typing import TYPE_CHECKING

from lit_merge.evaluation import Evaluation, TableLine
from lit_merge.report.drawing import (
    DASHED,
    FAINT,
    INK,
    KIND_COLOURS,
    PANEL,
    STAGES,
    Panel,
    new_axes,
    stage_line,
    to_svg,
    wrapped,
)
from lit_merge.terminal import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT = 3.1  # inches
_LETTER = 0.055  # least distance of two letters, as a share of the axis
_NAME = 44  # characters of a step's name that fit side by side below one panel
_JOINT = " + "


@dataclass(frozen=True)
class Control:
    """A control beside the pipeline.

    Attributes:
        letter: What it is called in the panels.
        model: Its name.
        shares: The share of the experts' accuracy by task; None where it was not run.
        mean: Their mean; None when one is missing.
    """

    letter: str
    model: str
    shares: tuple[float | None, ...]
    mean: float | None


def controls_of(evaluation: Evaluation) -> tuple[Control, ...]:
    """Return the controls in the order of the table.

    The bare base is none: it stands in the table, and would only take the axis down to chance.
    """
    found = [line for line in evaluation.lines() if line.kind == "control"]
    return tuple(
        Control(_letter(index), line.model, _shares(evaluation, line), line.normalised)
        for index, line in enumerate(found)
    )


def step_names(models: Sequence[str]) -> tuple[str, ...]:
    """Return short names of the steps: what each adds to the one before it.

    >>> step_names(["average", "average + TACT", "average + TACT + learned", "other"])
    ('average', '+ TACT', '+ learned', 'other')
    """
    names = list(models[:1])
    for before, model in pairwise(models):
        added = model.startswith(before + _JOINT)
        names.append(f"+ {model[len(before) + len(_JOINT) :]}" if added else model)
    return tuple(names)


def stage_panels(evaluation: Evaluation) -> tuple[Panel, ...]:
    """Draw the accuracy after each step of the pipeline, in percent of the expert's.

    Empty without a pipeline (:meth:`~lit_merge.evaluation.Evaluation.stages`) or without experts.
    """
    stages = evaluation.stages()
    controls = controls_of(evaluation)
    names = step_names([line.model for line in stages])
    shares = [_shares(evaluation, line) for line in stages]
    columns: list[tuple[str, list[float | None], list[float | None]]] = []
    if len(evaluation.tasks) > 1:
        means = [line.normalised for line in stages]
        columns.append(("mean of the tasks", means, [control.mean for control in controls]))
    for index, task in enumerate(evaluation.tasks):
        own = [share[index] for share in shares]
        columns.append((task, own, [control.shares[index] for control in controls]))
    columns = [column for column in columns if any(share is not None for share in column[1])]
    bounds = _bounds([share for _, own, others in columns for share in (*own, *others)])
    return tuple(
        _panel(index, title, names, own, controls, others, bounds)
        for index, (title, own, others) in enumerate(columns)
    )


def _panel(
    index: int,
    title: str,
    names: Sequence[str],
    shares: Sequence[float | None],
    controls: Sequence[Control],
    others: Sequence[float | None],
    bounds: tuple[float, float],
) -> Panel:
    figure, axes = new_axes(height=_HEIGHT)
    known = [(place, 100 * share) for place, share in enumerate(shares) if share is not None]
    axes.axhline(100, color=KIND_COLOURS["expert"], linewidth=1.6)
    axes.plot(*zip(*known, strict=True), color=STAGES[-1], linewidth=1.6, zorder=3)
    for place, value in known:
        step = stage_line(names[place], place, len(names))
        axes.plot(
            [place], [value], step.marker, color=step.colour, markersize=8, zorder=4, clip_on=False
        )
    axes.set_ylim(*bounds)
    axes.set_xlim(-0.4, len(names) - 0.6 + 0.35)
    _label_values(axes, known, bounds)
    _draw_controls(axes, controls, others, bounds)
    width = max(6, _NAME // len(names))
    axes.set_xticks(range(len(names)), [wrapped(name, width, lines=3) for name in names])
    for label in axes.get_xticklabels():
        label.set_parse_math(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    steps = ", ".join(f"{name} {percent(share)}" for name, share in zip(names, shares, strict=True))
    beside = ", ".join(
        f"{control.model} {percent(share)}"
        for control, share in zip(controls, others, strict=True)
        if share is not None
    )
    return Panel(
        f"{title}, % of the expert",
        f"Accuracy after each step in percent of the expert's, {title}: {steps}."
        f"{f' Controls: {beside}.' if beside else ''}",
        to_svg(figure, name=f"stages-{index}"),
    )


def _label_values(
    axes: Axes, known: Sequence[tuple[int, float]], bounds: tuple[float, float]
) -> None:
    """Write each value above its point, or below where the line at 100 % or the top is near."""
    low, high = bounds
    near = 0.1 * (high - low)
    for place, value in known:
        below = 100 - near < value < 100 or value > high - near
        axes.annotate(
            f"{value:.1f}",
            (place, value),
            xytext=(0, -8 if below else 8),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=10,
            fontweight="bold",
            color=INK,
            bbox={"facecolor": PANEL, "edgecolor": "none", "pad": 0.8},
            zorder=3.5,
        )


def _draw_controls(
    axes: Axes,
    controls: Sequence[Control],
    shares: Sequence[float | None],
    bounds: tuple[float, float],
) -> None:
    low, high = bounds
    known = [
        (100 * share, control.letter)
        for control, share in zip(controls, shares, strict=True)
        if share is not None
    ]
    places = spread([value for value, _ in known], _LETTER * (high - low))
    for (value, letter), place in zip(known, places, strict=True):
        axes.axhline(value, color=KIND_COLOURS["control"], linestyle=DASHED, linewidth=1.1)
        axes.annotate(
            letter,
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(1.06, place),
            textcoords=("axes fraction", "data"),
            ha="left",
            va="center",
            fontsize=9,
            color=INK,
            annotation_clip=False,
            # From the line to its letter, which had to make room for its neighbours.
            arrowprops={
                "arrowstyle": "-",
                "color": KIND_COLOURS["control"],
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0.0, 0.5),
            },
        )


def spread(values: Sequence[float], least: float) -> tuple[float, ...]:
    """Return places for labels near the values, in their order, none closer than ``least``.

    >>> spread([1.0, 1.0, 5.0], 2.0)
    (0.0, 2.0, 5.0)
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    groups: list[list[int]] = []
    places = list(values)
    for index in order:
        groups.append([index])
        # A group that touches the one below it becomes one with it, centred on its values.
        while True:
            group = groups[-1]
            middle = sum(values[member] for member in group) / len(group)
            for rank, member in enumerate(group):
                places[member] = middle + (rank - (len(group) - 1) / 2) * least
            if len(groups) == 1 or places[group[0]] - places[groups[-2][-1]] >= least:
                break
            groups[-2:] = [groups[-2] + group]
    return tuple(places)


def _bounds(shares: Sequence[float | None]) -> tuple[float, float]:
    values = [100 * share for share in shares if share is not None]
    if not values:
        return 0.0, 110.0
    low = max(0.0, 10.0 * ((min(values) - 5) // 10))
    top = max(100.0, *values)
    return low, top + 0.08 * (top - low)


def _shares(evaluation: Evaluation, line: TableLine) -> tuple[float | None, ...]:
    return tuple(None if cell is None else evaluation.normalised(cell) for cell in line.cells)


def _letter(index: int) -> str:
    """Return A, B, …, Z, A1, B1 and so on."""
    turn, place = divmod(index, len(ascii_uppercase))
    return ascii_uppercase[place] + (str(turn) if turn else "")
