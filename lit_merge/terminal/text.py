"""Numbers as text, and plain tables, as all commands print them."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lit_merge.evaluation import EvaluationRow

MISSING = "–"
"""What stands where a model was not run."""

_WIDEST = 1000  # characters of a table in a file


def size(num_bytes: int) -> str:
    """Return a size as people read it, in powers of 1000.

    >>> size(999), size(90_870_000)
    ('999 B', '90.9 MB')
    """
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def percent(share: float | None) -> str:
    """Return a share as percent with one decimal, a dash for None.

    >>> percent(0.98765), percent(None)
    ('98.8', '–')
    """
    return MISSING if share is None else f"{100 * share:.1f}"


def accuracy_text(row: EvaluationRow | None) -> str:
    """Return the accuracy of a row in percent, a dash where the model was not run."""
    return percent(None if row is None else row.accuracy)


def perplexity_text(perplexity: float | None) -> str:
    """Return a perplexity with four digits, a dash for None.

    >>> perplexity_text(23.4567), perplexity_text(None)
    ('23.46', '–')
    """
    return MISSING if perplexity is None else f"{perplexity:.4g}"


def score_text(row: EvaluationRow | None) -> str:
    """Return what stands for a row: its perplexity on a language task, else its accuracy."""
    if row is not None and row.perplexity is not None:
        return perplexity_text(row.perplexity)
    return accuracy_text(row)


def simple_table(*columns: str, right: tuple[int, ...] = ()) -> Table:
    """Return a table with one rule below its header; ``right`` are the columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(
            column, justify="right" if index in right else "left", no_wrap=index in right
        )
    return table


def print_whole(console: Console, table: Table) -> None:
    """Print a table; into a file or a pipe at its full width."""
    if not console.is_terminal:
        wide = console.options.update(max_width=_WIDEST)
        console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)
