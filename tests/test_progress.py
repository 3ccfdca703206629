from __future__ import annotations

import io

import pytest
import torch
from rich.progress import Task
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lit_merge.passes import progress
from lit_merge.passes.data_pass import data_pass
from lit_merge.passes.progress import pace, with_progress


class Endless(IterableDataset[torch.Tensor]):
    def __iter__(self):
        return iter(torch.arange(7.0))


def five() -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(TensorDataset(torch.arange(5.0)), batch_size=2)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def test_progress_is_in_examples(capsys, monkeypatch) -> None:
    terminal = on_terminal(monkeypatch)
    batches = data_pass(five())
    seen = with_progress(batches, "Looking", shown=True)
    assert [len(indices) for indices, _ in seen] == [2, 2, 1]
    printed = terminal.getvalue()
    assert "Looking" in printed
    assert "5/5" in printed
    assert "examples/s" in printed
    assert len(list(with_progress(batches, "Looking", shown=False))) == 3
    assert terminal.getvalue() == printed
    assert capsys.readouterr().out == ""  # which is for results


def test_a_log_has_a_line_now_and_then(capsys, monkeypatch) -> None:
    assert len(list(with_progress(data_pass(five()), "Looking", shown=True))) == 3
    assert capsys.readouterr().err == ""  # a short pass needs none
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    resumed = with_progress(data_pass(five()), "Looking", shown=True, start=1, done=2)
    assert len(list(resumed)) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert [line.partition(" examples,")[0] for line in lines] == [
        "Looking: 4 of 5",
        "Looking: 5 of 5",
    ]
    assert lines[-1].endswith("0:00:00 left")
    assert printed.out == ""


def test_a_resumed_pass_counts_from_where_it_was(monkeypatch) -> None:
    terminal = on_terminal(monkeypatch)
    seen: list[int] = []
    monkeypatch.setattr(progress, "pace", lambda count, *_, **__: seen.append(count) or "")
    resumed = with_progress(data_pass(five()), "Looking", shown=True, start=1, done=2)
    assert [len(indices) for indices, _ in resumed] == [2, 1]
    assert "5/5" in terminal.getvalue()
    assert seen[-1] == 3  # the examples of the first run are no part of the speed


def test_a_stream_of_unknown_length_has_a_speed_but_no_end(monkeypatch) -> None:
    terminal = on_terminal(monkeypatch)
    batches = data_pass(DataLoader(Endless(), batch_size=3))
    assert len(list(with_progress(batches, "Looking", shown=True))) == 3
    printed = terminal.getvalue()
    assert "7/?" in printed
    assert "examples/s" in printed
    assert "left" not in printed


def test_a_slow_pass_has_a_speed_and_an_end_after_its_first_batch() -> None:
    """One batch in 100 s: rich's own estimate, over 30 s, would never be known."""
    now = 0.0
    task = Task(0, "Looking", 320, 0, _get_time=lambda: now, _lock=None)  # type: ignore[arg-type]
    task.fields = {"seen": 0, "seconds": 0.0}
    task.start_time = 0.0
    column = progress._Pace()
    assert column.render(task).plain == ""
    now = 100.0
    task.completed = 32
    task.fields = {"seen": 32, "seconds": 100.0}
    assert column.render(task).plain == "0.32 examples/s, 0:15:00 left"
    now = 160.0  # in the middle of the second batch
    assert column.render(task).plain == "0.32 examples/s, 0:14:00 left"


def test_the_time_left_is_never_negative() -> None:
    assert pace(10, 10.0, remaining=1, waited=60.0) == "1 examples/s, 0:00:00 left"
