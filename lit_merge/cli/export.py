"""``lit-merge export``: :func:`lit_merge.export.export_task` for one task or more.

``--format multi_task`` is :func:`lit_merge.export.multi_task.export_multi_task`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from torch import nn

# Imported for its classes: a configuration may name those that exist by their short names.
import lit_merge.tasks  # noqa: F401
from lit_merge.cli.json_output import JsonResult, add_json, json_result
from lit_merge.cli.parsing import (
    add_switch,
    command_parser,
    instantiate,
    is_first_process,
    parse,
)
from lit_merge.errors import InputError
from lit_merge.export import ExportResult, export_task
from lit_merge.export.corrected import Fold
from lit_merge.export.corrected_folder import is_corrected
from lit_merge.export.multi_task import export_multi_task
from lit_merge.merged.folder import open_merged
from lit_merge.merged.task_model import open_task_models, require_task
from lit_merge.output import require_free
from lit_merge.tasks.task import Task
from lit_merge.terminal import percent, size

Format = Literal["safetensors", "lightning", "multi_task"]


def export_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser("export", "Write the plain models of a merged folder's tasks.")
    parser.add_argument("--merged", type=str, required=True, help="The merged folder.")
    parser.add_argument("--task", type=str | None, help="The task whose model to write to output.")
    parser.add_argument(
        "--tasks",
        type=list[str] | str | None,
        help="Several tasks, [svhn,dtd], or all: a folder in the output for each.",
    )
    parser.add_argument("--output", type=str, required=True, help="The folder to write.")
    parser.add_argument(
        "--base",
        type=str | None,
        help="What was merged onto, where it is no longer where the merge found it.",
    )
    parser.add_subclass_arguments(
        nn.Module, "model", fail_untyped=False, required=False, help="The network, if corrected."
    )
    parser.add_argument(
        "--examples",
        type=dict[str, Task] | None,
        sub_configs=True,
        help="A Task per name, or a YAML file with them: their inputs prove a corrected export.",
    )
    parser.add_argument(
        "--fold",
        type=Fold,
        default="possible",
        help="possible, or require: a correction that stays between the layers is an error.",
    )
    parser.add_argument(
        "--format",
        type=Format,
        default="safetensors",
        help="safetensors, lightning for model.ckpt, multi_task for all tasks in one file.",
    )
    parser.add_argument(
        "--dtype", type=str | None, help="The floating type to write; the merge's by default."
    )
    add_switch(parser, "replace", "Replace existing output folders.")
    add_json(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge export``.

    Raises:
        InputError: As :func:`lit_merge.export.export_task`, and unless one of task and tasks is
            given.
    """
    parser = export_parser()
    options = parse(parser, argv)
    if not is_first_process():
        return 0
    with json_result("export", asked=options.json) as shown:
        results = []
        for result in _export(parser, options):
            results.append(result)
            if not shown.asked:
                _print_result(result)
        if shown.asked:
            _show_json(results, options, shown)
    return 0


def _export(parser: ArgumentParser, options: Namespace) -> Iterator[ExportResult]:
    """Export, and yield what was written."""
    tasks = _tasks(options)
    if options.format == "multi_task":
        options = instantiate(parser, options)
        yield export_multi_task(
            options.merged,
            options.output,
            model=options.model,
            tasks=tasks,
            examples=options.examples,
            dtype=options.dtype,
            replace=options.replace,
        )
        return
    outputs = _outputs(options, tasks)
    options = instantiate(parser, options)
    for task, output in outputs.items():
        yield export_task(
            options.merged,
            task,
            output,
            base=options.base,
            model=options.model,
            examples=options.examples,
            fold=options.fold,
            format=options.format,
            dtype=options.dtype,
            replace=options.replace,
        )


def _tasks(options: Namespace) -> tuple[str, ...]:
    """Return the tasks to export.

    Raises:
        InputError: No task is named, or there is no such task.
    """
    if (options.task is None) == (options.tasks is None):
        got = "neither" if options.task is None else "both"
        raise InputError(
            f"task: must be given, or tasks; got {got}. Name one task with --task, or several with "
            f"--tasks [svhn,dtd] or --tasks all."
        )
    if is_corrected(options.merged):
        with open_merged(options.merged) as parts:
            every = parts.tasks
    else:
        with open_task_models(options.merged, base=options.base) as models:
            every = models.parts.tasks
    named = options.tasks if options.task is None else options.task
    if options.task is None and named == "all" and "all" not in every:
        named = every
    tasks = (named,) if isinstance(named, str) else tuple(named)
    for task in tasks:
        require_task(task, every, path=options.merged)
    return tasks


def _outputs(options: Namespace, tasks: Sequence[str]) -> dict[str, str | Path]:
    """Return the folder to write by task, all of them checked before the first is written.

    Raises:
        InputError: A folder is not free.
    """
    several = options.task is None
    outputs = {t: Path(options.output) / t if several else options.output for t in tasks}
    for output in outputs.values():
        require_free(output, replace=options.replace)
    return outputs


def _show_json(results: Sequence[ExportResult], options: Namespace, shown: JsonResult) -> None:
    """Print every export's folder, size, error and notes as one object."""
    exports = [
        {
            "task": result.task,
            "output": result.path,
            "num_bytes": result.num_bytes,
            "share": result.share,
            "error": result.error,
            "notes": result.notes,
        }
        for result in results
    ]
    notes = dict.fromkeys(note for result in results for note in result.notes)
    shown.show({"exports": exports, "notes": list(notes)}, output=options.output)


def _print_result(result: ExportResult) -> None:
    used = "" if result.share is None else f", {percent(result.share)} % of the masked weights"
    exact = "" if result.error is None else f", exact to {result.error:.1g}"
    print(f"{result.task}: {result.path} ({size(result.num_bytes)}{used}{exact})")
    for note in result.notes:
        print(f"note: {note}")
