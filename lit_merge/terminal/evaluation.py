"""The table of an evaluation."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_merge.evaluation import EXPERTS, Evaluation, Kind
from lit_merge.terminal.text import (
    MISSING,
    percent,
    perplexity_text,
    print_whole,
    score_text,
    simple_table,
)

_STYLES: dict[Kind, str] = {
    "expert": "bold",
    "base": "dim",
    "control": "dim",
    "merged": "",
    "corrected": "green",
}


def evaluation_table(evaluation: Evaluation) -> Table:
    """Return the table of an evaluation: a line per model, with the means before the tasks.

    Accuracies are in percent; ``% of experts`` is the mean over the tasks of the accuracy as a
    share of the expert's; ``NLL`` is the mean negative log-likelihood in nats. Of a language task
    the perplexity is shown, and the means of the accuracy are those of the next token. A rule parts
    the kinds of models.
    """
    table = simple_table()
    table.add_column("model", min_width=12, overflow="fold")
    table.add_column(Text("% of experts"), justify="right", max_width=7)
    table.add_column("mean", justify="right", no_wrap=True)
    for task in evaluation.tasks:
        table.add_column(Text(task), justify="right", min_width=5, overflow="fold")
    table.add_column("NLL", justify="right", no_wrap=True)
    has_language = bool(_language_tasks(evaluation))
    if has_language:
        table.add_column("perplexity", justify="right", no_wrap=True)
    lines = evaluation.lines()
    for index, line in enumerate(lines):
        table.add_row(
            Text(line.model),
            percent(line.normalised),
            percent(line.accuracy),
            *(score_text(cell) for cell in line.cells),
            MISSING if line.nll is None else f"{line.nll:.3f}",
            *([perplexity_text(line.perplexity)] if has_language else []),
            style=_STYLES[line.kind],
            end_section=index + 1 < len(lines) and lines[index + 1].kind != line.kind,
        )
    return table


def print_evaluation(evaluation: Evaluation, *, console: Console | None = None) -> None:
    """Print the table and the notes of an evaluation.

    Args:
        evaluation: What was measured.
        console: Where to print; standard output when None, where a file or a pipe gets the table
            at its full width.
    """
    console = console or Console()
    print_whole(console, evaluation_table(evaluation))
    if evaluation.rows:
        sizes = ", ".join(f"{task} {size}" for task, size in _test_sizes(evaluation).items())
        experts = " Experts: each on its own task." if _has_experts(evaluation) else ""
        language = ", ".join(_language_tasks(evaluation))
        what = f"Accuracy in %; of {language} perplexity" if language else "Accuracy in %"
        counted = "examples or tokens" if language else "examples"
        console.print(Text(f"{what}. Test {counted}: {sizes}.{experts}", style="dim"))
    for note in evaluation.notes:
        console.print(Text(f"note: {note}"))


def _language_tasks(evaluation: Evaluation) -> list[str]:
    measured = {row.task for row in evaluation.rows if row.perplexity is not None}
    return [task for task in evaluation.tasks if task in measured]


def _has_experts(evaluation: Evaluation) -> bool:
    return any(line.model == EXPERTS for line in evaluation.lines())


def _test_sizes(evaluation: Evaluation) -> dict[str, str]:
    return {
        task: "/".join(
            map(str, sorted({r.num_examples for r in evaluation.rows if r.task == task}))
        )
        for task in evaluation.tasks
    }
