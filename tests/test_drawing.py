from __future__ import annotations

import re
from importlib import resources

from lit_merge.report import drawing
from lit_merge.report.drawing import (
    HEAT,
    MARKERS,
    NUM_SERIES,
    NUM_STAGES,
    SERIES,
    STAGES,
    new_axes,
    series_line,
    stage_line,
    to_svg,
)


def test_every_stand_in_colour_is_its_own_and_becomes_css() -> None:
    stand_ins = list(drawing._CSS)
    assert len(set(stand_ins)) == len(stand_ins)
    figure, axes = new_axes(height=2.0)
    for place, colour in enumerate(stand_ins):
        axes.plot([0, 1], [place, place], color=colour)
    svg = to_svg(figure, name="all")
    assert not re.search(r"#0102[0-9a-f]{2}", svg)
    for css in drawing._CSS.values():
        assert css in svg


def test_the_page_defines_every_colour_on_light_dark_and_paper() -> None:
    page = resources.files("lit_merge.report").joinpath("report.html").read_text(encoding="utf-8")
    for css in drawing._CSS.values():
        if css.startswith("var("):
            assert page.count(f"{css[4:-1]}: #") == 3, css


def luminance(hexadecimal: str) -> float:
    channels = [int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def themes() -> list[dict[str, str]]:
    """Return the colours of the page by name: light, dark, paper."""
    page = resources.files("lit_merge.report").joinpath("report.html").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks]


def test_later_steps_stand_out_more_from_the_page_than_earlier_ones() -> None:
    for theme in themes():
        found = [contrast(theme[f"stage-{i}"], theme["panel"]) for i in range(NUM_STAGES)]
        assert found == sorted(found)
        assert found[0] > 2.4


def test_numbers_in_a_heat_map_can_be_read_on_every_colour() -> None:
    for theme in themes():
        for level in HEAT:
            name = f"heat-{'m' if level < 0 else 'p' if level > 0 else ''}{abs(level)}"
            ink = theme["heat-ink"] if abs(level) >= 5 else theme["ink"]
            assert contrast(theme[name], ink) > 3.8, (name, theme[name])


def test_steps_differ_in_colour_and_in_shape() -> None:
    lines = [stage_line(str(index), index, 4) for index in range(4)]
    assert len({line.colour for line in lines}) == len({line.marker for line in lines}) == 4
    assert (lines[0].colour, lines[-1].colour) == (STAGES[0], STAGES[-1])
    assert stage_line("x", 7, 9).marker == MARKERS[1]


def test_series_take_every_colour_before_they_are_dashed() -> None:
    lines = [series_line(str(index), index) for index in range(NUM_SERIES + 1)]
    assert tuple(line.colour for line in lines[:-1]) == SERIES
    assert [line.dashed for line in lines] == [False] * NUM_SERIES + [True]


def test_the_key_of_a_line_has_its_colour_and_ids_of_its_own() -> None:
    svg = stage_line("x", 0, 2).key("mine")
    assert "var(--stage-0)" in svg
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert ids
    assert all(value.startswith("mine-") for value in ids)
