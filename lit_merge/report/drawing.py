"""How the report's figures are drawn: small panels of SVG that take their colours from the page.

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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_merge.evaluation import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_SERIES = 8
"""How many colours for unordered lines the page defines: ``--series-0`` … ``--series-7``."""

NUM_STAGES = 6
"""How many colours for ordered lines the page defines: ``--stage-0`` (first) … ``--stage-5``."""

HEAT_LEVELS = 6
"""Steps of a heat map to each side of its middle: ``--heat-m6`` … ``--heat-0`` … ``--heat-p6``."""

INK = "#010203"
FAINT = "#010204"
HEAT_INK = "#01020a"
PANEL = "#01020b"
KIND_COLOURS: Mapping[Kind, str] = {
    "expert": "#010205",
    "base": "#010206",
    "control": "#010207",
    "merged": "#010208",
    "corrected": "#010209",
}
SERIES = tuple(f"#0102{16 + index:02x}" for index in range(NUM_SERIES))
STAGES = tuple(f"#0102{32 + index:02x}" for index in range(NUM_STAGES))
HEAT: Mapping[int, str] = {
    level: f"#0102{64 + level:02x}" for level in range(-HEAT_LEVELS, HEAT_LEVELS + 1)
}
MARKERS = ("o", "s", "^", "D", "v", "P")
"""Shapes that go with ordered lines, so that they can be told apart without colours."""

_CSS: Mapping[str, str] = {
    INK: "currentColor",
    FAINT: "var(--faint)",
    HEAT_INK: "var(--heat-ink)",
    PANEL: "var(--panel)",
    **{colour: f"var(--{kind})" for kind, colour in KIND_COLOURS.items()},
    **{colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)},
    **{colour: f"var(--stage-{index})" for index, colour in enumerate(STAGES)},
    **{
        colour: f"var(--heat-{'m' if level < 0 else 'p' if level > 0 else ''}{abs(level)})"
        for level, colour in HEAT.items()
    },
}

WIDTH = 4.1  # inches; one inch is 96 CSS pixels, 72 SVG points
DASHED = (0, (4, 3))


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
class Line:
    """How one model is drawn as a line, in the figure and in its legend.

    Attributes:
        label: What the legend calls it.
        colour: A stand-in colour of this module.
        marker: Matplotlib's marker; empty for none.
        width: Width in points.
        dashed: Whether the line is dashed.
    """

    label: str
    colour: str
    marker: str = ""
    width: float = 1.2
    dashed: bool = False

    def draw(self, axes: Axes, xs: list[float], ys: list[float], *, every: int = 1) -> None:
        """Draw the line, with a marker at every so many points; a NaN interrupts it."""
        axes.plot(
            xs,
            ys,
            color=self.colour,
            linewidth=self.width,
            linestyle=DASHED if self.dashed else "-",
            marker=self.marker,
            markevery=every,
            markersize=5.0 if self.width > 1.5 else 3.5,
            solid_capstyle="round",
        )

    def key(self, name: str) -> str:
        """Return a short piece of the line as SVG, for the legend.

        Args:
            name: Prefix of the ids inside, unique in the page.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(0.42, 0.16))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.axis("off")
        self.draw(axes, [0.0, 0.5, 1.0], [0.0, 0.0, 0.0])
        if self.marker:  # one in the middle is enough
            for line in axes.lines:
                line.set_markevery([1])
        axes.set_ylim(-1, 1)
        return to_svg(figure, name=name)


def stage_line(label: str, index: int, count: int) -> Line:
    """Return how the step ``index`` of ``count`` steps is drawn: later ones stand out more."""
    place = round(index * (NUM_STAGES - 1) / max(count - 1, 1))
    return Line(label, STAGES[place], MARKERS[index % len(MARKERS)], width=2.0)


def series_line(label: str, index: int) -> Line:
    """Return how the ``index``-th of several unordered models is drawn."""
    return Line(label, SERIES[index % NUM_SERIES], "o", dashed=index >= NUM_SERIES)


def new_axes(*, height: float) -> tuple[Figure, Axes]:
    """Return an empty panel in the report's style, so many inches high."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(FAINT)
    return figure, axes


def wrapped(name: str, width: int, *, lines: int = 2) -> str:
    """Return a name in at most so many lines of so many characters; the rest is cut."""
    return "\n".join(textwrap.wrap(name, width, max_lines=lines, placeholder=" …") or [name])


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
