"""How far a command has come, on the standard error: a bar on a terminal, a few lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


class MergeProgress:
    """Passes over the data, each of a known number of bytes.

    Args:
        report: Called with the description of the pass, the bytes done and their total.
    """

    def __init__(self, report: Callable[[str, int, int], None]) -> None:
        self._report = report

    def start(self, description: str, total: int) -> Callable[[int], None]:
        """Begin a pass, and return what to call with each number of bytes gone through."""
        done = 0
        self._report(description, done, total)

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            self._report(description, done, total)

        return advance


@contextmanager
def merge_progress(*, shown: bool) -> Iterator[MergeProgress]:
    """Show progress while the block runs.

    Args:
        shown: Whether to show any. On a terminal that is a bar per pass; elsewhere a line every
            :data:`LINE_EVERY` seconds, so that the log of a short merge holds none.
    """
    if not shown:
        yield MergeProgress(lambda description, done, total: None)
    elif sys.stderr.isatty():
        with _bars() as progress:
            yield progress
    else:
        yield MergeProgress(_lines())


@contextmanager
def _bars() -> Iterator[MergeProgress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", visible=False)

        def report(description: str, done: int, total: int) -> None:
            nonlocal task
            if done == 0:
                task = bars.add_task(description, total=total)
            bars.update(task, completed=done)

        yield MergeProgress(report)


def _lines() -> Callable[[str, int, int], None]:
    last = time.monotonic()

    def report(description: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_EVERY:
            last = now
            share = 100 * done // max(total, 1)
            print(f"{description}: {share} % of {total / 1e6:,.0f} MB", file=sys.stderr, flush=True)

    return report


@contextmanager
def stages(*, shown: bool) -> Iterator[Callable[[str], None]]:
    """Yield what to call with the description of each stage of a command when it begins.

    Args:
        shown: Whether to show any. On a terminal the stage stands beside a spinner; elsewhere it is
            a line, but for stages within :data:`LINE_EVERY` seconds of the last line or the start.
    """
    if not shown:
        yield lambda description: None
    elif sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("") as status:
            yield status.update
    else:
        last = time.monotonic()

        def begin(description: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= LINE_EVERY:
                last = now
                print(description, file=sys.stderr, flush=True)

        yield begin
