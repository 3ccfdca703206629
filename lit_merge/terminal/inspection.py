"""What a path holds, and warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from lit_merge.terminal.text import MISSING, percent, print_whole, simple_table, size

if TYPE_CHECKING:
    from lit_merge.inspection import CurvatureSummary, Inspection


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
    facts: dict[str, object] = dict(inspection.facts)
    if inspection.fingerprint is not None:
        facts = {"fingerprint": inspection.fingerprint, **facts}
    if inspection.curvature is not None:
        facts |= _curvature_facts(inspection.curvature)
    width = max((len(key) for key in facts), default=0)
    for key, value in facts.items():
        label = Text(f"  {key.replace('_', ' '):<{width}}  ", style="dim")
        console.print(label.append(_fact(value), style="default"), soft_wrap=True)
    parts = simple_table("part", "file", "tensors", "elements", "size", "types", right=(2, 3, 4))
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
    if inspection.parts:
        print_whole(console, parts)
    if tensors and inspection.tensors:
        table = simple_table("tensor", "shape", "type", "trace", right=(3,))
        for tensor in inspection.tensors:
            shape = " × ".join(map(str, tensor.shape)) or "scalar"
            trace = MISSING if tensor.trace is None else f"{tensor.trace:.4g}"
            table.add_row(Text(tensor.name), shape, tensor.dtype, trace)
        print_whole(console, table)
    for note in inspection.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    print_warnings(inspection.warnings, console=console)


def print_warnings(warnings: Sequence[str], *, console: Console | None = None) -> None:
    """Print warnings, a line each.

    Args:
        warnings: What is probably wrong.
        console: Where to print; standard output when None.
    """
    console = console or Console()
    for warning in warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


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
