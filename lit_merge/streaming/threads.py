"""Work on batches in several threads, with the results in the batches' order.

One Python thread per core with torch's own threads off is several times as fast on small chunks as
one thread with torch's own threads on: a chunk fits into a core's cache, and torch lets go of the
interpreter's lock while it computes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_AHEAD = 2  # batches per thread whose results may wait for those before them

_KEPT = 7 << 20  # bytes: several times the largest temporary tensor of a piece

B = TypeVar("B")
R = TypeVar("R")


def num_cores() -> int:
    """Return how many cores this process may use beside the launcher's other processes here."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        cores = os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def in_order(work: Callable[[B], R], batches: Sequence[B], threads: int) -> Iterator[R]:
    """Yield ``work(batch)`` for every batch, computed in several threads at once.

    The first batch in order that raises ends it, whichever failed first in time.

    Args:
        work: Must be safe to call from several threads.
        batches: What to work on.
        threads: How many batches at once; with one, the caller's thread does it all.
    """
    _keep_freed_memory()
    threads = min(threads, len(batches))
    before = torch.get_num_threads()
    if threads <= 1:
        torch.set_num_threads(1)
        try:
            yield from map(work, batches)
        finally:
            torch.set_num_threads(before)
        return
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[R]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(work, batch))
            if len(waiting) > _AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # the threads' setting reaches into later ones


def _keep_freed_memory() -> None:
    """Let the C library keep some megabytes of what is freed, instead of giving it back.

    glibc does so once it has seen a block of that size come and go; else every temporary tensor
    would be paid for page by page. The block's own pages are never touched.
    """
    torch.empty(_KEPT, dtype=torch.uint8)
