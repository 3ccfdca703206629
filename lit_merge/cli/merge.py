"""``lit-merge merge``: the function :func:`lit_merge.merge` with its arguments from YAML."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lit_merge.cli.parsing import (
    add_switch,
    command_parser,
    instantiate,
    parse,
)
from lit_merge.errors import InputError
from lit_merge.methods import MergeMethod
from lit_merge.streaming import MergeWarning, merge, merge_all, plan_all
from lit_merge.streaming.overrides import with_setting
from lit_merge.streaming.unfinished import Process
from lit_merge.terminal import print_merge, print_plan


def merge_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser("merge", "Merge experts into one model, from files to files.")
    parser.add_argument("--base", type=str | None, help="What the experts were fine-tuned from.")
    parser.add_argument(
        "--experts",
        type=dict[str, str] | list[str],
        required=True,
        help="Expert folders or checkpoints by task name, or a list of them.",
    )
    parser.add_argument("--output", type=str, default="merged", help="The folder to write.")
    parser.add_argument(
        "--outputs",
        type=dict[str, MergeMethod] | None,
        help="Methods by folder, instead of method and output: all of them from one reading.",
    )
    parser.add_argument(
        "--sweep",
        type=dict[str, list[Any]] | None,
        help="Values by setting of the method: a folder in the output for each combination, all "
        "of them from one reading.",
    )
    parser.add_argument(
        "--base_hessian", type=str | None, help="The base's own Hessian: a file or folder."
    )
    added = {"base", "experts", "output", "base_hessian"}
    parser.add_function_arguments(merge, skip={*added, "replace", "progress"})
    add_switch(parser, "replace", "Replace an existing output folder.")
    add_switch(parser, "plan", "Check every header, say what would happen, and write nothing.")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge merge``.

    Under a launcher of several processes (torchrun, srun) each of them merges its share, and the
    first one says what was done.

    Raises:
        InputError: As :func:`lit_merge.merge`, and for a configuration that does not fit it.
    """
    parser = merge_parser()
    config = parse(parser, argv)
    options = instantiate(parser, config).as_dict()
    del options["config"]
    only_plan = options.pop("plan")
    outputs = _outputs(options)
    if only_plan:
        if Process.from_environment().rank == 0:
            for report in plan_all(outputs=outputs, **options):
                print_plan(report)
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)  # shown below the table instead
        results = merge_all(outputs=outputs, **options)
    if Process.from_environment().rank == 0:
        for result in results:
            print_merge(result)
    return 0


def _outputs(options: dict[str, Any]) -> dict[str | Path, MergeMethod]:
    """Return the method by output folder, and take what says so out of the options.

    Raises:
        InputError: outputs and sweep are given together, or a method lacks a swept setting.
    """
    method, output = options.pop("method"), options.pop("output")
    outputs, sweep = options.pop("outputs"), options.pop("sweep")
    if outputs and sweep:
        raise InputError(
            "sweep: must be given without outputs; got both. List the methods under outputs."
        )
    if outputs:
        return dict(outputs)
    if not sweep:
        return {output: method}
    found: dict[str | Path, MergeMethod] = {}
    for values in itertools.product(*sweep.values()):
        chosen = method
        for key, value in zip(sweep, values, strict=True):
            chosen = with_setting(chosen, key, value, f"sweep[{key!r}]")
        name = ",".join(f"{key}={value}" for key, value in zip(sweep, values, strict=True))
        if Path(output) / name in found:
            raise InputError(f"sweep: must have every value once; got {name} twice. Remove one.")
        found[Path(output) / name] = chosen
    return found
