from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from lit_merge.streaming import threads
from lit_merge.streaming.threads import in_order


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("count", [1, 3])
def test_the_first_error_in_order_is_shown_and_nothing_is_left_running(count: int) -> None:
    gate = threading.Event()

    def work(batch: int) -> int:
        if batch == 2:
            gate.wait(0.3)
            raise ValueError("the first in order")
        if batch == 3:
            gate.set()
            raise ValueError("the first in time")
        return batch

    before = threading.active_count()
    results = in_order(work, range(100), count)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="the first in order"):
        next(results)
    assert threading.active_count() == before
    assert torch.get_num_threads() == 2
    stream = in_order(lambda batch: batch, range(100), count)
    assert next(stream) == 0
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert torch.get_num_threads() == 2


def test_threads_are_as_many_as_there_are_cores_for_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert threads.num_cores() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert threads.num_cores() == 1
