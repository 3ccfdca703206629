"""``lit-merge merge``: the function :func:`lit_merge.merge` with its arguments from YAML.

With ``groups`` in place of base and experts, :func:`lit_merge.align.align` comes first.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch import nn

from lit_merge.cli.groups import add_groups, align_groups, aligned_folder, require_alone
from lit_merge.cli.json_output import add_json, json_result
from lit_merge.cli.merge_json import merges_content, plan_content
from lit_merge.cli.parsing import (
    add_switch,
    command_parser,
    instantiate,
    parse,
)
from lit_merge.errors import InputError
from lit_merge.methods import MergeMethod
from lit_merge.output import require_free
from lit_merge.streaming import MergeWarning, merge, merge_all, plan_all
from lit_merge.streaming.overrides import with_setting
from lit_merge.streaming.unfinished import Process
from lit_merge.terminal import print_merge, print_plan

_YAML = (".yaml", ".yml", ".json")


def merge_parser(*, networks: bool = True) -> ArgumentParser:
    """Return the parser of the command.

    Args:
        networks: Whether it knows ``model`` and ``tasks``, for which groups alone have use.
    """
    parser = command_parser("merge", "Merge experts into one model, from files to files.")
    parser.add_argument("--base", type=str | None, help="What the experts were fine-tuned from.")
    parser.add_argument(
        "--experts",
        type=dict[str, str] | list[str] | None,
        help="Expert folders or checkpoints by task name, or a list of them.",
    )
    add_groups(parser)
    if networks:
        # Imports Lightning, which takes seconds.
        from lit_merge.cli.training import add_tasks, quiet

        quiet()
        parser.add_subclass_arguments(
            nn.Module, "model", fail_untyped=False, required=False, help="With groups: the network."
        )
        add_tasks(parser, required=False)
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
    add_json(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge merge``.

    Under a launcher of several processes (torchrun, srun) each of them merges its share, and the
    first one says what was done.

    Raises:
        InputError: As :func:`lit_merge.merge`, and for a configuration that does not fit it.
    """
    parser = merge_parser(networks=_names_networks(argv))
    config = parse(parser, argv)
    made = instantiate(parser, config)
    is_first = Process.from_environment().rank == 0
    with json_result("merge", asked=made.json) as result:
        if made.groups:
            made.base, made.experts = _aligned(made)
        options = _files(made)
        only_plan = options.pop("plan")
        outputs = _outputs(options)
        if only_plan:
            plans = plan_all(outputs=outputs, **options) if is_first else []
            if result.asked and is_first:
                result.show({"plans": [plan_content(plan) for plan in plans]})
            for plan in () if result.asked else plans:
                print_plan(plan)
            return 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MergeWarning)  # shown below the table instead
            merges = merge_all(outputs=outputs, **options)
        if result.asked and is_first:
            paths = [merge_result.path for merge_result in merges]
            output = paths[0] if len(paths) == 1 else paths
            result.show(merges_content(merges), output=output)
        elif is_first:
            for merge_result in merges:
                print_merge(merge_result)
    return 0


def _names_networks(argv: Sequence[str]) -> bool:
    """Return whether arguments or configurations name groups, a model or tasks, or ask for help."""
    words = ("--groups", "--model", "--tasks", "--help", "--print_config")
    if any(word.startswith(words) for word in argv):
        return True
    paths = (Path(word.removeprefix("--config=").removeprefix("-c=")) for word in argv)
    files = (path for path in paths if path.suffix in _YAML and path.is_file())
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in files)
    return any(re.search(r"^(groups|model|tasks)\s*:", text, re.MULTILINE) for text in texts)


def _files(options: Namespace) -> dict[str, Any]:
    """Return the options that are about files, after checking those that are not.

    Raises:
        InputError: There are no experts, or options that only groups have use for.
    """
    if not options.experts:
        raise InputError(
            "experts: must be given, or groups of them by base; got neither. Name each expert's "
            "path: --experts.TASK PATH."
        )
    for name in ("model", "tasks", "aligned"):
        if options.get(name) and not options.groups:
            raise InputError(
                f"{name}: must be left out without groups; got {options[name]!r}. Experts of one "
                "base are merged from their files alone."
            )
    apart = {"config", "groups", "align", "aligned", "model", "tasks", "json"}
    return {name: value for name, value in options.as_dict().items() if name not in apart}


def _aligned(options: Namespace) -> tuple[str, dict[str, str]]:
    """Align the groups, and return the base and the experts to merge.

    Raises:
        InputError: The options do not go together, or as :func:`lit_merge.align.align`.
    """
    require_alone(options, "base", "experts", "plan")
    if not options.model:
        raise InputError(
            "model: must be given with groups, to find what can be permuted; got none. Name the "
            "network: model: {class_path: …}."
        )
    folder = aligned_folder(options)
    if not options.outputs and not options.sweep:
        require_free(options.output, replace=options.replace)
    return align_groups(options, folder, model=options.model, tasks=options.tasks)


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
