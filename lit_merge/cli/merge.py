"""``lit-merge merge``: the function :func:`lit_merge.merge` with its arguments from YAML."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from lit_merge.cli.parsing import (
    add_switch,
    command_parser,
    instantiate,
    is_first_process,
    parse,
)
from lit_merge.streaming import MergeWarning, merge
from lit_merge.terminal import print_merge


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
        "--base_hessian", type=str | None, help="The base's own Hessian: a file or folder."
    )
    added = {"base", "experts", "output", "base_hessian"}
    parser.add_function_arguments(merge, skip={*added, "replace", "progress"})
    add_switch(parser, "replace", "Replace an existing output folder.")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge merge``.

    Under a launcher of several processes (torchrun, srun) the first one merges and the others
    leave at once: a merge is bound by the disk.

    Raises:
        InputError: As :func:`lit_merge.merge`, and for a configuration that does not fit it.
    """
    parser = merge_parser()
    config = parse(parser, argv)
    options = instantiate(parser, config)
    if not is_first_process():
        return 0
    del options["config"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)  # shown below the table instead
        result = merge(**options.as_dict())
    print_merge(result)
    return 0
