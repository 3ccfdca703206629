"""What a command of several stages is doing, on the standard error: a spinner, or lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

LINE_EVERY = 30.0
"""Seconds between two lines where there is no terminal, at least."""


@contextmanager
def stages(*, shown: bool) -> Iterator[Callable[[str], None]]:
    """Yield what to call with the description of each stage when it begins.

    Args:
        shown: Whether to show any. On a terminal the stage stands beside a spinner; elsewhere it is
            a line, but for stages within :data:`LINE_EVERY` seconds of the last line or the start,
            so that the log of a short command holds none.
    """
    if not shown:
        yield lambda description: None
    elif sys.stderr.isatty():
        with Console(stderr=True).status("") as status:
            yield status.update
    else:
        yield _lines()


def _lines() -> Callable[[str], None]:
    last = time.monotonic()

    def begin(description: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_EVERY:
            last = now
            print(description, file=sys.stderr, flush=True)

    return begin
