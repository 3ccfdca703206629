"""The report's figures: small panels of SVG that take their colours from the page.

Every figure is a row of panels, each narrow enough (about 400 CSS pixels) to be read on a phone
without being scaled down; the page sets them side by side where there is room. Matplotlib draws
them with stand-in colours that :func:`to_svg` replaces by CSS (``currentColor``,
``var(--series-0)``), so that one drawing serves a light page, a dark page and paper. Texts stay
texts, in the page's font.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_merge.evaluation import EXPERTS, Evaluation, Kind, TableLine, VarianceRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_SERIES = 8
"""How many line colours the page defines: ``--series-0`` … ``--series-7``."""

_INK = "#010203"
_FAINT = "#010204"
_KIND_COLOURS: Mapping[Kind, str] = {
    "expert": "#010205",
    "base": "#010206",
    "control": "#010207",
    "merged": "#010208",
    "corrected": "#010209",
}
_SERIES = tuple(f"#0102{16 + index:02x}" for index in range(NUM_SERIES))
_CSS: Mapping[str, str] = {
    _INK: "currentColor",
    _FAINT: "var(--faint)",
    **{colour: f"var(--{kind})" for kind, colour in _KIND_COLOURS.items()},
    **{colour: f"var(--series-{index})" for index, colour in enumerate(_SERIES)},
}

_LINE_WIDTHS: Mapping[Kind, float] = {"expert": 2.6, "corrected": 2.0}

_WIDTH = 4.1  # inches; one inch is 96 CSS pixels, 72 SVG points
_BAR = 0.32  # inches per bar
_LABEL = 22  # characters in a line of a model's name beside its bar, of which there are two


@dataclass(frozen=True)
class Panel:
    """One small figure.

    Attributes:
        title: Plain text over the panel.
        description: What the picture shows, for readers who do not see it.
        svg: One ``<svg>`` element.
    """

    title: str
    description: str
    svg: str


@dataclass(frozen=True)
class Series:
    """A line of the variance figure and its entry in the legend.

    Attributes:
        model: The model's name.
        colour: CSS colour.
        dashed: Whether the line is dashed, as the lines are after the colours have run out.
    """

    model: str
    colour: str
    dashed: bool


def accuracy_panels(evaluation: Evaluation) -> tuple[Panel, ...]:
    """Draw bars: the share of the experts' accuracy first, then the accuracy on each task.

    A task's panel has the 95% Wilson intervals and the expert as a dashed line. Empty without rows
    of other models than experts.
    """
    lines = [line for line in evaluation.lines() if line.model != EXPERTS]
    if not lines:
        return ()
    panels: list[Panel] = []
    if any(line.normalised is not None for line in lines):
        panels.append(_normalised_panel(lines))
    panels += [_task_panel(evaluation, lines, task) for task in evaluation.tasks]
    return tuple(panels)


def _normalised_panel(lines: Sequence[TableLine]) -> Panel:
    figure, axes = _axes(height=0.75 + _BAR * len(lines))
    shares = [100 * (line.normalised or 0.0) for line in lines]
    _draw_bars(axes, lines, shares, [line.normalised is not None for line in lines])
    axes.axvline(100, color=_INK, linestyle=(0, (4, 3)), linewidth=1.0)
    axes.set_xlim(0, max(125.0, 1.25 * max(shares)))
    described = ", ".join(
        f"{line.model} {share:.1f}" for line, share in zip(lines, shares, strict=True)
    )
    return Panel(
        "Mean over the tasks, % of the experts",
        f"Accuracy as % of the experts' accuracy: {described}.",
        to_svg(figure, name="accuracy-mean"),
    )


def _task_panel(evaluation: Evaluation, lines: Sequence[TableLine], task: str) -> Panel:
    index = evaluation.tasks.index(task)
    cells = [line.cells[index] for line in lines]
    figure, axes = _axes(height=0.75 + _BAR * len(lines))
    values = [0.0 if cell is None else 100 * cell.accuracy for cell in cells]
    _draw_bars(axes, lines, values, [cell is not None for cell in cells])
    for place, cell in enumerate(cells):
        if cell is not None:
            axes.plot([100 * b for b in cell.interval], [place, place], color=_INK, linewidth=1.2)
    expert = evaluation.expert(task)
    if expert is not None:
        axes.axvline(100 * expert.accuracy, color=_INK, linestyle=(0, (4, 3)), linewidth=1.0)
    axes.set_xlim(0, 125)
    axes.set_xticks(range(0, 101, 20))
    described = ", ".join(
        f"{cell.model} {100 * cell.accuracy:.1f}" for cell in [expert, *cells] if cell is not None
    )
    return Panel(
        f"{task}, accuracy in %",
        f"Accuracy on {task} in percent: {described}.",
        to_svg(figure, name=f"accuracy-{index}"),
    )


def _draw_bars(
    axes: Axes, lines: Sequence[TableLine], values: Sequence[float], known: Sequence[bool]
) -> None:
    places = range(len(lines))
    colours = [_KIND_COLOURS[line.kind] for line in lines]
    axes.barh(places, values, height=0.66, color=colours)
    for place, value, there in zip(places, values, known, strict=True):
        axes.annotate(
            f"{value:.1f}" if there else "–",
            (1.0, place),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            color=_INK,
            fontsize=9,
        )
    axes.set_yticks(places, [_wrapped(line.model) for line in lines], parse_math=False)
    axes.invert_yaxis()
    axes.grid(axis="x", color=_FAINT, linewidth=0.6)


def variance_panels(evaluation: Evaluation) -> tuple[Panel, ...]:
    """Draw the activation variance by site on a logarithmic scale, one panel per task.

    The variance is divided by the expert's at the same site, which makes the expert the line at 1;
    without an expert for the task it is drawn as it is. Sites are numbered in the order of the
    rows, 1 being the first.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    series = variance_series(evaluation)
    colours = {css: stand_in for stand_in, css in _CSS.items()}
    panels: list[Panel] = []
    tasks = tuple(dict.fromkeys(row.task for row in evaluation.variances))
    for index, task in enumerate(tasks):
        figure, axes = _axes(height=2.6)
        rows = [row for row in evaluation.variances if row.task == task]
        sites = list(dict.fromkeys(row.site for row in rows))
        units = {row.site: row.variance for row in rows if row.kind == "expert"}
        for line in series:
            mine = [r for r in rows if _line_of(r) == line.model]
            values = [_ratio(row.variance, units.get(row.site, 1.0)) for row in mine]
            axes.plot(
                [sites.index(row.site) + 1 for row in mine],
                [value if value > 0 else float("nan") for value in values],
                color=colours[line.colour],
                linewidth=_LINE_WIDTHS.get(mine[0].kind, 1.2) if mine else 1.2,
                linestyle="--" if line.dashed else "-",
                marker="o" if len(sites) <= 40 else "",
                markersize=2.5,
            )
        if any(row.variance > 0 for row in rows):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("site, first to last", color=_INK)
        axes.grid(color=_FAINT, linewidth=0.6, which="major")
        panels.append(
            Panel(
                f"{task}, variance / the expert's" if units else f"{task}, variance",
                f"Mean variance over the channels at {len(sites)} sites on the inputs of {task}"
                f"{', divided by that of the expert' if units else ''}; the numbers are in the "
                "table below the figure.",
                to_svg(figure, name=f"variance-{index}"),
            )
        )
    return tuple(panels)


def variance_series(evaluation: Evaluation) -> tuple[Series, ...]:
    """Return the lines of the variance figure: all experts as one, then each model."""
    names = dict.fromkeys(_line_of(row) for row in evaluation.variances)
    models = [name for name in names if name != EXPERTS]
    first = [Series(EXPERTS, _CSS[_KIND_COLOURS["expert"]], dashed=False)]
    return tuple(
        (first if EXPERTS in names else [])
        + [
            Series(model, _CSS[_SERIES[index % NUM_SERIES]], dashed=index >= NUM_SERIES)
            for index, model in enumerate(models)
        ]
    )


def _ratio(value: float, unit: float) -> float:
    return value / unit if unit > 0 else 0.0


def _line_of(row: VarianceRow) -> str:
    return EXPERTS if row.kind == "expert" else row.model


def to_svg(figure: Figure, *, name: str) -> str:
    """Return a figure as one ``<svg>`` element whose colours are CSS and whose ids are its own.

    Args:
        figure: A matplotlib figure drawn with this module's stand-in colours.
        name: Prefix of every id inside, because ids must be unique in the page.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        # A name may hold glyphs that matplotlib's own font lacks; the page's font draws them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for stand_in, css in _CSS.items():
        svg = svg.replace(stand_in, css)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    # The drawing's own width in points would make it larger than the column on a phone.
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)


def _axes(*, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(_FAINT)
    return figure, axes


def _wrapped(name: str) -> str:
    """Return a name in at most two lines; what is cut away is in the table."""
    lines = textwrap.wrap(name, _LABEL, max_lines=2, placeholder=" …") or [name]
    return "\n".join(lines)
