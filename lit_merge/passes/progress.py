"""The progress of a pass: examples, examples per second, and the time that is left.

It goes to the standard error: as a bar on a terminal, elsewhere as a line now and then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from lit_merge.passes.data_pass import DataPass

LINE_EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


def with_progress(
    batches: DataPass, description: str, *, shown: bool, start: int = 0, done: int = 0
) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield from a pass, and show its progress in examples and examples per second.

    Args:
        batches: The pass.
        description: What is being done.
        shown: Whether to show any (on one rank only, and if the user wants bars).
        start: How many batches an earlier run has done; they are skipped.
        done: How many examples these were. They count as progress, but not as speed.
    """
    if shown and not sys.stderr.isatty():
        yield from _with_lines(batches, description, start=start, done=done)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Pace())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(
            description, total=batches.num_here, completed=done, seen=0, seconds=0.0
        )
        seen = 0
        for indices, batch in batches.batches(start):
            yield indices, batch
            seen += len(indices)
            seconds = progress.tasks[0].elapsed or 0.0
            progress.update(task, advance=len(indices), seen=seen, seconds=seconds)


def _with_lines(
    batches: DataPass, description: str, *, start: int, done: int
) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield from a pass, and print a line every :data:`LINE_EVERY` seconds."""
    began = last = time.monotonic()
    seen, total = 0, batches.num_here
    for indices, batch in batches.batches(start):
        yield indices, batch
        seen += len(indices)
        now = time.monotonic()
        if now - last >= LINE_EVERY:
            last = now
            remaining = None if total is None else float(total - done - seen)
            of = "" if total is None else f" of {total:,}"
            speed = pace(seen, now - began, remaining=remaining)
            line = f"{description}: {done + seen:,}{of} examples, {speed}".rstrip(", ")
            print(line, file=sys.stderr, flush=True)


def pace(seen: int, seconds: float, *, remaining: float | None, waited: float = 0.0) -> str:
    """Return examples per second and the time left, as far as they are known.

    rich estimates the speed from the last 30 seconds, in which a slow pass may finish no batch.

    Args:
        seen: Examples since the pass began.
        seconds: How long they took.
        remaining: Examples still to come; None when nobody knows.
        waited: Seconds since the last of them.

    >>> pace(64, 256.0, remaining=1000, waited=30.0)
    '0.25 examples/s, 1:06:10 left'
    >>> pace(5000, 2.0, remaining=None)
    '2,500 examples/s'
    >>> pace(0, 0.0, remaining=10)
    ''
    """
    if seen == 0 or seconds <= 0:
        return ""
    rate = seen / seconds
    text = f"{rate:,.0f} examples/s" if rate >= 10 else f"{rate:.2g} examples/s"
    if remaining is None:
        return text
    left = timedelta(seconds=round(max(0.0, remaining / rate - waited)))
    return f"{text}, {left} left"


class _Pace(ProgressColumn):
    """Draws the pace of a task that counts examples."""

    def render(self, task: Task) -> Text:
        """Return the pace at the last batch."""
        seconds: float = task.fields["seconds"]
        waited = (task.elapsed or 0.0) - seconds
        return Text(
            pace(task.fields["seen"], seconds, remaining=task.remaining, waited=waited),
            style="progress.remaining",
        )
