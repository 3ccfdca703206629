"""Tables for the terminal: an evaluation, a merge, a forecast, an inspected folder.

The same numbers as in the report, small enough for 80 columns and a handful of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lit_merge.evaluation import EXPERTS, Evaluation, EvaluationRow, Kind
from lit_merge.merge_record import count_actions

if TYPE_CHECKING:
    from lit_merge.forecast import Forecast
    from lit_merge.inspection import CurvatureSummary, Inspection
    from lit_merge.streaming import MergeResult, PlanReport

MISSING = "–"
"""What stands where a model was not run."""

_WIDEST = 1000  # characters of a table in a file

_WORST = 10  # modules of a forecast

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
    share of the expert's; ``NLL`` is the mean negative log-likelihood in nats. A rule parts the
    kinds of models.
    """
    table = _simple_table()
    table.add_column("model", min_width=12, overflow="fold")
    table.add_column(Text("% of experts"), justify="right", max_width=7)
    table.add_column("mean", justify="right", no_wrap=True)
    for task in evaluation.tasks:
        table.add_column(Text(task), justify="right", min_width=5, overflow="fold")
    table.add_column("NLL", justify="right", no_wrap=True)
    lines = evaluation.lines()
    for index, line in enumerate(lines):
        table.add_row(
            Text(line.model),
            percent(line.normalised),
            percent(line.accuracy),
            *(accuracy_text(cell) for cell in line.cells),
            MISSING if line.nll is None else f"{line.nll:.3f}",
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
    _print_whole(console, evaluation_table(evaluation))
    if evaluation.rows:
        sizes = ", ".join(f"{task} {size}" for task, size in _test_sizes(evaluation).items())
        experts = " Experts: each on its own task." if _has_experts(evaluation) else ""
        console.print(Text(f"Accuracy in %. Test examples: {sizes}.{experts}", style="dim"))
    for note in evaluation.notes:
        console.print(Text(f"note: {note}"))


def print_merge(result: MergeResult, *, console: Console | None = None) -> None:
    """Print what a merge did: tensors by action, the experts' traces, notes and warnings.

    Args:
        result: What :func:`lit_merge.merge` returned.
        console: Where to print; standard output when None.
    """
    console = console or Console()
    title = f"Merged {', '.join(result.tasks)} into {result.path} in {result.seconds:.1f} s"
    if result.num_bytes and result.seconds > 0:
        title += f", {size(int(result.num_bytes / result.seconds))}/s"
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = _simple_table("action", "tensors", "elements", right=(1, 2))
    actions = count_actions((tensor.action, tensor.info.numel) for tensor in result.record)
    for action, (tensors, elements) in actions.items():
        table.add_row(action, f"{tensors:,}", f"{elements:,}")
    _print_whole(console, table)
    if result.traces:
        largest = max(result.traces.values())
        traces = _simple_table("expert", "Hessian trace", "of the largest", right=(1, 2))
        for task, trace in result.traces.items():
            share = f"{percent(trace / largest)} %" if largest > 0 else MISSING
            traces.add_row(Text(task), f"{trace:.4g}", share)
        _print_whole(console, traces)
    for note in result.notes:
        console.print(Text(f"note: {note}"))
    for warning in result.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))


def print_plan(plan: PlanReport, *, console: Console | None = None) -> None:
    """Print what a merge would do: every tensor, the files, how much is read and how long it takes.

    Args:
        plan: What :func:`lit_merge.streaming.plan_all` returned for it.
        console: Where to print; standard output when None.
    """
    console = console or Console()
    title = f"Would merge {', '.join(plan.tasks)} into {plan.path}; nothing is written"
    console.print(Text(title, style="bold"), soft_wrap=True)
    tensors = _simple_table("tensor", "shape", "type", "action", "why", "method")
    for tensor in plan.record:
        shape = " × ".join(map(str, tensor.info.shape)) or "scalar"
        dtype = str(tensor.info.dtype).removeprefix("torch.")
        method = plan.methods.get(tensor.alias_of or tensor.name, "")
        tensors.add_row(
            Text(tensor.name), shape, dtype, tensor.action, Text(tensor.reason), Text(method)
        )
    _print_whole(console, tensors)
    files = _simple_table("file", "size", right=(1,))
    for file, num_bytes in plan.files.items():
        files.add_row(Text(file), size(num_bytes))
    _print_whole(console, files)
    survey = "; its survey reads the inputs before that" if plan.survey else ""
    console.print(
        Text(f"One reading: {size(plan.bytes_read)}. Expected: {plan.seconds:.1f} s{survey}.")
    )
    for note in plan.notes:
        console.print(Text(f"note: {note}"))


def print_forecast(forecast: Forecast, *, console: Console | None = None) -> None:
    """Print what a merge is expected to cost: by task, by scale, and the modules it arises in.

    Args:
        forecast: What :func:`lit_merge.forecast.forecast_merge` returned.
        console: Where to print; standard output when None.
    """
    console = console or Console()
    console.print(Text(f"Forecast of {forecast.method}", style="bold"), soft_wrap=True)
    _print_whole(console, _forecast_by_task(forecast))
    if forecast.best is not None:
        console.print(Text(_best_scale(forecast)), soft_wrap=True)
        _print_whole(console, _forecast_by_scale(forecast))
    total = forecast.total(forecast.increases)
    modules = _simple_table("module", "increase", "share", right=(1, 2))
    for module in forecast.worst_modules()[:_WORST]:
        increase = forecast.total(module.increases)
        modules.add_row(Text(module.name), f"{increase:.4g}", _share(increase, total))
    _print_whole(console, modules)
    counted = "each task's mean loss" if forecast.weighting == "mean" else "the summed losses"
    console.print(
        Text(
            f"Totals are of {counted}. The forecast is ½(θ−θ_t)ᵀH_t(θ−θ_t): a first guess for "
            f"comparing plans, not the size, which is too small, often by orders of magnitude.",
            style="dim",
        )
    )
    for note in forecast.notes:
        console.print(Text(f"note: {note}"))


def _forecast_by_task(forecast: Forecast) -> Table:
    columns = ["task", "examples", "mean loss", "summed loss", "share"]
    best = forecast.best
    if best is not None:
        columns.append("at the best scale")
    table = _simple_table(*columns, right=tuple(range(1, len(columns))))
    total = forecast.total(forecast.increases)
    means = forecast.mean_increases(forecast.increases)
    at_best = () if best is None else forecast.mean_increases(best.increases)
    for index, task in enumerate(forecast.tasks):
        count, increase = forecast.num_examples[index], forecast.increases[index]
        cells = [
            MISSING if count is None else f"{count:,}",
            _increase(means[index]),
            _increase(increase),
            _share(forecast.weights[index] * increase, total),
        ]
        if best is not None:
            mean = at_best[index]
            cells.append(_increase(best.increases[index] if mean is None else mean))
        table.add_row(Text(task), *cells)
    return table


def _forecast_by_scale(forecast: Forecast) -> Table:
    table = _simple_table("scale", "total", right=(0, 1))
    for task in forecast.tasks:
        table.add_column(Text(task), justify="right", no_wrap=True)
    for point in forecast.curve:
        shares = [w * x for w, x in zip(forecast.weights, point.increases, strict=True)]
        cells = (_increase(value) for value in (forecast.total(point.increases), *shares))
        table.add_row(f"{point.scale:g}", *cells)
    return table


def _best_scale(forecast: Forecast) -> str:
    best = forecast.best
    if best is None or forecast.scale is None:
        return ""
    how = "in closed form" if forecast.closed_form else "of those below"
    planned = forecast.total(forecast.increases)
    text = (
        f"Best scale {best.scale:.4g} ({how}): total {forecast.total(best.increases):.4g}; "
        f"planned {forecast.scale:.4g}: {planned:.4g}."
    )
    if forecast.unit is None:
        return text
    scales = ", ".join(f"{task} {best.scale * x:.4g}" for task, x in forecast.unit.items())
    return f"{text} Scales multiply the planned ones; best {scales}."


def _increase(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"


def _share(part: float, total: float) -> str:
    return f"{percent(part / total)} %" if total > 0 else MISSING


def print_inspection(
    inspection: Inspection, *, tensors: bool = False, console: Console | None = None
) -> None:
    """Print what a path holds.

    Args:
        inspection: What was found.
        tensors: Whether to list every tensor of the weights.
        console: Where to print; standard output when None.
    """
    console = console or Console()
    title = f"{inspection.path}: {inspection.kind} ({inspection.source})"
    console.print(Text(title, style="bold"), soft_wrap=True)
    facts = {"fingerprint": inspection.fingerprint, **inspection.facts}
    if inspection.curvature is not None:
        facts |= _curvature_facts(inspection.curvature)
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        label = Text(f"  {key.replace('_', ' '):<{width}}  ", style="dim")
        console.print(label.append(_fact(value), style="default"), soft_wrap=True)
    parts = _simple_table("part", "file", "tensors", "elements", "size", "types", right=(2, 3, 4))
    for part in inspection.parts:
        types = ", ".join(f"{dtype} × {count}" for dtype, count in part.dtypes.items())
        parts.add_row(
            Text(part.name),
            Text(part.file),
            f"{part.num_tensors:,}",
            f"{part.num_elements:,}",
            size(part.num_bytes),
            types,
        )
    _print_whole(console, parts)
    if tensors:
        table = _simple_table("tensor", "shape", "type", "trace", right=(3,))
        for tensor in inspection.tensors:
            shape = " × ".join(map(str, tensor.shape)) or "scalar"
            trace = MISSING if tensor.trace is None else f"{tensor.trace:.4g}"
            table.add_row(Text(tensor.name), shape, tensor.dtype, trace)
        _print_whole(console, table)
    for note in inspection.notes:
        console.print(Text(f"note: {note}"))


def _curvature_facts(curvature: CurvatureSummary) -> dict[str, object]:
    facts: dict[str, object] = {"trace": f"{curvature.trace:.6g}"}
    if curvature.mean_trace is not None:
        facts["trace_per_example"] = f"{curvature.mean_trace:.6g}"
    facts["zero_entries"] = f"{percent(curvature.zero_share)} %"
    if curvature.largest:
        facts["largest"] = ", ".join(
            f"{name} {percent(share)} %" for name, share in curvature.largest.items()
        )
    if curvature.quality is not None:
        from lit_merge.curvature.quality import in_words  # the whole engine: a quarter second

        facts["quality"] = in_words(curvature.quality)
        worst: Mapping[str, Any] = curvature.quality["worst"]
        facts["least_sure"] = ", ".join(
            f"{name} {percent(agreement['relative_error'])} %" for name, agreement in worst.items()
        )
    return facts


def _fact(value: object) -> str:
    if isinstance(value, dict):
        shown = {key: entry for key, entry in value.items() if entry not in (None, "", [], (), {})}
        return ", ".join(f"{key}: {_fact(entry)}" for key, entry in shown.items())
    if isinstance(value, list | tuple):
        return ", ".join(_fact(entry) for entry in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


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


def _simple_table(*columns: str, right: tuple[int, ...] = ()) -> Table:
    """Return a table with one rule below its header; ``right`` are the columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(
            column, justify="right" if index in right else "left", no_wrap=index in right
        )
    return table


def _print_whole(console: Console, table: Table) -> None:
    """Print a table; into a file or a pipe at its full width."""
    if not console.is_terminal:
        wide = console.options.update(max_width=_WIDEST)
        console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)


def _has_experts(evaluation: Evaluation) -> bool:
    return any(line.model == EXPERTS for line in evaluation.lines())


def _test_sizes(evaluation: Evaluation) -> dict[str, str]:
    return {
        task: "/".join(
            map(str, sorted({r.num_examples for r in evaluation.rows if r.task == task}))
        )
        for task in evaluation.tasks
    }
