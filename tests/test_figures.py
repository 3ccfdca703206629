"""Figures that stand alone: what is in the SVG, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lit_merge.errors import InputError
from lit_merge.report.figures import FORMATS, alpha_curve, stage_bars

CURVES = {"NLL $x": {"TA": [(1.0, 2.0, 0.5), (0.5, 1.0, 0.0)], "GM": [(0.5, 1.5, 0.1)]}}
BARS = {"CNN": {"average": (30.0, 2.0), "+ TACT": (60.0, 1.0)}, "ViT": {"+ TACT": (71.0, 0.0)}}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_written_whole(tmp_path: Path, suffix: str) -> None:
    path = alpha_curve(tmp_path / f"a{suffix}", CURVES, title="Seeds")
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert path.read_bytes().startswith(starts[suffix])
    assert list(tmp_path.iterdir()) == [path]


def test_the_band_has_the_deviation_on_both_sides_of_the_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(
        Axes, "fill_between", lambda self, xs, low, high, **_: drawn.append((xs, low, high))
    )
    alpha_curve(tmp_path / "a.png", CURVES)
    assert drawn[0] == ((0.5, 1.0), [1.0, 1.5], [1.0, 2.5])


def test_a_name_has_one_colour_in_all_panels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    colours: dict[str, set[str]] = {}
    bar = Axes.bar

    def watched(self: Axes, *args: object, **settings: object) -> object:
        colours.setdefault(str(settings["label"]), set()).add(str(settings["color"]))
        return bar(self, *args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(Axes, "bar", watched)
    stage_bars(tmp_path / "b.svg", BARS, controls={"ViT": {"base": (50.0, 1.0)}})
    assert {name: len(found) for name, found in colours.items()} == {"average": 1, "+ TACT": 1}
    assert colours["average"] != colours["+ TACT"]


def test_levels_and_log_must_belong_to_a_panel(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"levels: must belong to the panels 'NLL \$x'; got 'acc'"):
        alpha_curve(tmp_path / "a.png", CURVES, levels={"acc": {"Average": (1.0, 0.0)}})
    with pytest.raises(InputError, match=r"log: must belong to the panels"):
        alpha_curve(tmp_path / "a.png", CURVES, log=["acc"])
    with pytest.raises(InputError, match=r"controls: must belong to the panels"):
        stage_bars(tmp_path / "a.png", BARS, controls={"acc": {}})


def test_levels_a_logarithmic_axis_and_no_mark_are_drawn(tmp_path: Path) -> None:
    levels = {"NLL $x": {"Average": (1.2, 0.1)}}
    path = alpha_curve(tmp_path / "a.svg", CURVES, levels=levels, log=["NLL $x"], marked=None)
    assert path.stat().st_size > 1000


@pytest.mark.parametrize("panels", [{}, {"a": {}}, {"a": {"TA": []}}])
def test_an_empty_panel_is_refused(
    tmp_path: Path, panels: dict[str, dict[str, list[object]]]
) -> None:
    with pytest.raises(InputError, match=r"panels: must have a number at least in each"):
        alpha_curve(tmp_path / "a.png", panels)  # type: ignore[arg-type]


def test_what_is_no_number_and_what_is_no_picture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"panels: must be of finite numbers; got nan"):
        alpha_curve(tmp_path / "a.png", {"a": {"TA": [(1.0, math.nan, 0.0)]}})
    with pytest.raises(InputError, match=r"a\.jpg: must end in \.png, \.svg, \.pdf"):
        stage_bars(tmp_path / "a.jpg", BARS)


def test_an_older_picture_is_replaced_only_when_told(tmp_path: Path) -> None:
    path = stage_bars(tmp_path / "b.png", BARS, reference=None)
    with pytest.raises(InputError, match=r"b\.png: must not exist yet"):
        stage_bars(path, BARS)
    stage_bars(path, BARS, replace=True, title="T", ylabel="x")
