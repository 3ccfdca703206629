"""A forecast on the terminal and as a picture."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from lit_merge.errors import InputError
from lit_merge.forecast import Forecast
from lit_merge.forecast.result import PartForecast, ScaleForecast
from lit_merge.report.forecast_plot import MODULES, write_forecast_plot
from lit_merge.terminal import print_forecast

PLANNED = (
    PartForecast("blocks.0.weight", (2.0, 30.0)),
    PartForecast("blocks.0.bias", (1.0, 10.0)),
    PartForecast("blocks.1.weight", (1.0, 0.0)),
)
CURVE = (
    ScaleForecast(0.0, (6.0, 20.0)),
    ScaleForecast(0.5, (2.0, 10.0)),
    ScaleForecast(1.0, (4.0, 40.0)),
)


def forecast(**changes: object) -> Forecast:
    fields = {
        "method": "TaskArithmetic(scale=1.0)",
        "tasks": ("sv[bold]hn", "$dtd$"),
        "num_examples": (10, 100),
        "weighting": "mean",
        "tensors": PLANNED,
        "scale": 1.0,
        "best": ScaleForecast(0.4, (1.0, 8.0)),
        "closed_form": True,
        "curve": CURVE,
        "notes": ("a [note]",),
        **changes,
    }
    return Forecast(**fields)  # type: ignore[arg-type]


def lines_of(shown: Forecast) -> list[str]:
    stream = io.StringIO()
    print_forecast(shown, console=Console(file=stream, width=80))
    return stream.getvalue().splitlines()


def test_every_task_has_its_increase_its_share_and_that_at_the_best_scale() -> None:
    words = [line.split() for line in lines_of(forecast())]
    # mean losses: 4 / 10 and 40 / 100, of a total of 0.8
    assert ["sv[bold]hn", "10", "0.4", "4", "50.0", "%", "0.1"] in words
    assert ["$dtd$", "100", "0.4", "40", "50.0", "%", "0.08"] in words
    assert ["0.5", "0.3", "0.2", "0.1"] in words  # scale, total, tasks


def test_modules_come_with_their_share_and_notes_at_the_end() -> None:
    lines = lines_of(forecast())
    words = [line.split() for line in lines]
    assert ["blocks.0", "0.7", "87.5", "%"] in words
    assert ["blocks.1", "0.1", "12.5", "%"] in words
    assert words.index(["blocks.0", "0.7", "87.5", "%"]) < words.index(
        ["blocks.1", "0.1", "12.5", "%"]
    )
    assert lines[-1] == "note: a [note]"
    assert any("not the size" in line for line in lines)


def test_the_best_scale_is_said_with_how_it_was_found() -> None:
    text = "\n".join(lines_of(forecast()))
    assert "Best scale 0.4 (in closed form): total 0.18; planned 1: 0.8." in text
    text = "\n".join(lines_of(forecast(closed_form=False)))
    assert "Best scale 0.4 (of those below)" in text
    text = "\n".join(lines_of(forecast(unit={"sv[bold]hn": 0.5, "$dtd$": 2.0})))
    assert "best sv[bold]hn 0.2, $dtd$ 0.8" in text


def test_without_a_scale_or_examples_there_are_dashes_and_no_curve() -> None:
    plain = forecast(
        scale=None, best=None, curve=(), num_examples=(None, 100), weighting="sum", notes=()
    )
    words = [line.split() for line in lines_of(plain)]
    assert ["sv[bold]hn", "–", "–", "4", "9.1", "%"] in words
    assert not any("Best" in line for line in words)
    assert any("summed" in line for line in words)


def test_nothing_to_lose_has_no_shares() -> None:
    nothing = forecast(tensors=(PartForecast("w", (0.0, 0.0)),), best=None, scale=None, curve=())
    assert ["w", "0", "–"] in [line.split() for line in lines_of(nothing)]


def texts_of(shown: Forecast, folder: Path) -> str:
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        path = write_forecast_plot(folder / "forecast.svg", shown)
    return path.read_text(encoding="utf-8")


def test_the_picture_has_the_curve_and_the_modules(tmp_path: Path) -> None:
    svg = texts_of(forecast(), tmp_path)
    for text in ("sv[bold]hn", "$dtd$", "total", "least at 0.4", "planned 1", "blocks.0"):
        assert f">{text}<" in svg


def test_the_picture_of_a_method_without_a_scale_has_the_modules_only(tmp_path: Path) -> None:
    svg = texts_of(forecast(scale=None, best=None, curve=()), tmp_path)
    assert ">blocks.1<" in svg
    assert ">$dtd$<" in svg
    assert ">total<" not in svg


def test_many_modules_share_the_last_bar(tmp_path: Path) -> None:
    parts = tuple(PartForecast(f"blocks.{i}.weight", (1.0 + i, 1.0)) for i in range(MODULES + 4))
    svg = texts_of(forecast(tensors=parts), tmp_path)
    assert ">5 others<" in svg
    assert f">blocks.{MODULES + 3}<" in svg
    assert ">blocks.4<" not in svg


def test_a_picture_is_written_as_a_png_and_not_over_another(tmp_path: Path) -> None:
    path = write_forecast_plot(tmp_path / "forecast.png", forecast())
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"forecast\.png"):
        write_forecast_plot(path, forecast())
    write_forecast_plot(path, forecast(), replace=True)


def test_a_picture_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"must end in \.png, \.svg, \.pdf for a plot; got '\.gif'"
    ):
        write_forecast_plot(tmp_path / "forecast.gif", forecast())
