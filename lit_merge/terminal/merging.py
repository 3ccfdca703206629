"""What a merge has done, or would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from lit_merge.merge_record import count_actions
from lit_merge.terminal.text import MISSING, percent, print_whole, simple_table, size

if TYPE_CHECKING:
    from lit_merge.streaming import MergeResult, PlanReport


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
    table = simple_table("action", "tensors", "elements", right=(1, 2))
    actions = count_actions((tensor.action, tensor.info.numel) for tensor in result.record)
    for action, (tensors, elements) in actions.items():
        table.add_row(action, f"{tensors:,}", f"{elements:,}")
    print_whole(console, table)
    if result.traces:
        largest = max(result.traces.values())
        traces = simple_table("expert", "Hessian trace", "of the largest", right=(1, 2))
        for task, trace in result.traces.items():
            share = f"{percent(trace / largest)} %" if largest > 0 else MISSING
            traces.add_row(Text(task), f"{trace:.4g}", share)
        print_whole(console, traces)
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
    tensors = simple_table("tensor", "shape", "type", "action", "why", "method")
    for tensor in plan.record:
        shape = " × ".join(map(str, tensor.info.shape)) or "scalar"
        dtype = str(tensor.info.dtype).removeprefix("torch.")
        method = plan.methods.get(tensor.alias_of or tensor.name, "")
        tensors.add_row(
            Text(tensor.name), shape, dtype, tensor.action, Text(tensor.reason), Text(method)
        )
    print_whole(console, tensors)
    files = simple_table("file", "size", right=(1,))
    for file, num_bytes in plan.files.items():
        files.add_row(Text(file), size(num_bytes))
    print_whole(console, files)
    survey = "; its survey reads the inputs before that" if plan.survey else ""
    console.print(
        Text(f"One reading: {size(plan.bytes_read)}. Expected: {plan.seconds:.1f} s{survey}.")
    )
    for note in plan.notes:
        console.print(Text(f"note: {note}"))
