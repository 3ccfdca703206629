from __future__ import annotations

import io

import pytest

from lit_merge.streaming import progress as module
from lit_merge.streaming.progress import merge_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(*, shown: bool = True) -> None:
    with merge_progress(shown=shown) as progress:
        for description in ("reading ahead", "merging"):
            advance = progress.start(description, 3_000_000)
            for _ in range(3):
                advance(1_000_000)


def test_a_terminal_shows_a_bar_for_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    run()
    for text in ("reading ahead", "merging", "3.0/3.0 MB"):
        assert text in terminal.getvalue()


def test_a_log_of_a_short_merge_has_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert capsys.readouterr().err == ""


def test_a_log_of_a_long_merge_has_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINE_EVERY", 0.0)
    run()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading ahead: 0 % of 3 MB"
    assert lines[-1] == "merging: 100 % of 3 MB"


def test_nothing_is_shown_when_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    run(shown=False)
    assert terminal.getvalue() == ""
