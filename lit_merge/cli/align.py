"""``lit-merge align``: the function :func:`lit_merge.align.align` with its arguments from YAML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jsonargparse import ArgumentParser
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

# Imported for its classes: a configuration may name those that exist by their short names.
import lit_merge.tasks  # noqa: F401
from lit_merge.align import AlignResult, align
from lit_merge.alignment.groups import ExpertGroup
from lit_merge.cli.json_output import add_json, json_result
from lit_merge.cli.parsing import add_switch, command_parser, instantiate, parse
from lit_merge.cli.training import quiet
from lit_merge.merged.aligned_folder import num_moved
from lit_merge.output import require_free
from lit_merge.tasks.task import Task
from lit_merge.terminal import MISSING


def align_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser("align", "Bring experts of different bases into one order of units.")
    parser.add_subclass_arguments(nn.Module, "model", fail_untyped=False, required=True)
    parser.add_argument(
        "--groups",
        type=dict[str, ExpertGroup],
        required=True,
        help="Base and experts by group; the first group is the reference.",
    )
    parser.add_argument(
        "--tasks",
        type=dict[str, Task] | None,
        sub_configs=True,
        help="Where unlabelled examples come from, to match by activations: a Task per name, or a "
        "YAML file with them.",
    )
    parser.add_argument("--output", type=str, default="aligned", help="The folder to write.")
    parser.add_argument(
        "--input_shape",
        type=list[int] | None,
        help="Shape of one input, where there are no tasks: [3, 224, 224].",
    )
    added = {"model", "groups", "tasks", "output", "example_inputs", "input_shape", "progress"}
    switches = {"curvature", "cycle_consistent", "replace"}
    parser.add_function_arguments(align, skip={*added, *switches})
    add_switch(parser, "curvature", "Weight the comparison of weights by the bases' Hessians.")
    add_switch(parser, "cycle_consistent", "Match every base with all others, not with the first.")
    add_switch(parser, "replace", "Replace an existing output folder.")
    add_json(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge align``.

    Raises:
        InputError: As :func:`lit_merge.align.align`, and for a configuration that does not fit it.
    """
    quiet()
    parser = align_parser()
    config = parse(parser, argv)
    require_free(config.output, replace=config.replace)
    options = instantiate(parser, config).as_dict()
    del options["config"]
    with json_result("align", asked=options.pop("json")) as shown:
        result = align(**options)
        if shown.asked:
            shown.show(alignment_content(result), output=result.path)
        else:
            print_alignment(result)
    return 0


def alignment_content(result: AlignResult) -> dict[str, object]:
    """Return what was aligned, for JSON."""
    found = result.alignment
    return {
        "groups": result.groups,
        "by": found.by,
        "objective": {"before": found.before, "after": found.after},
        "symmetries": [
            {
                "name": symmetry.name,
                "size": symmetry.size,
                "inside": symmetry.inside,
                "moved": {
                    g: num_moved(own[symmetry.name]) for g, own in found.permutations.items()
                },
                "similarity": {g: own[symmetry.name] for g, own in found.similarity.items()},
            }
            for symmetry in result.symmetries
        ],
        "rejected": result.rejected,
        "differences": result.differences,
    }


def print_alignment(result: AlignResult, *, console: Console | None = None) -> None:
    """Print what was aligned: a line per symmetry that lies in no other, and how well it matches.

    Args:
        result: What :func:`lit_merge.align.align` returned.
        console: Where to print; standard output when None.
    """
    console = console or Console()
    found = result.alignment
    if found.by == "none":
        text = f"Midpoint of the bases of {', '.join(result.groups)} as they are: {result.path}"
        console.print(Text(text, style="bold"), soft_wrap=True)
        return
    names = ", ".join(result.groups[1:])
    title = f"Aligned {names} with {result.groups[0]} by {found.by} into {result.path}"
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("symmetry", overflow="fold")
    for column in ("units", "inside", "moved", "alike before", "after"):
        table.add_column(column, justify="right", no_wrap=True)
    for symmetry in result.symmetries:
        if symmetry.inside is None:
            inner = sum(other.inside == symmetry.name for other in result.symmetries)
            moved = (num_moved(own[symmetry.name]) for own in found.permutations.values())
            alike = [own[symmetry.name] for own in found.similarity.values()]
            known = [pair for pair in alike if pair is not None]
            table.add_row(
                Text(symmetry.name),
                f"{symmetry.size:,}",
                f"{inner:,}" if inner else "",
                f"{sum(moved):,}",
                *(_mean(pair[side] for pair in known) for side in (0, 1)),
            )
    console.print(table)
    worst = max(result.differences.values())
    text = f"Objective {found.before:.4g} → {found.after:.4g}. Aligned experts' outputs differ by "
    console.print(Text(f"{text}at most {worst:.0e} of the largest.", style="dim"), soft_wrap=True)


def _mean(values: Iterable[float]) -> str:
    every = list(values)
    return f"{sum(every) / len(every):.3f}" if every else MISSING
