"""``lit-merge export``: the function :func:`lit_merge.export.export_task`, for one task or more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lit_merge.cli.parsing import add_switch, command_parser, is_first_process, parse
from lit_merge.errors import InputError
from lit_merge.export import ExportFormat, ExportResult, export_task
from lit_merge.merged.task_model import open_task_models
from lit_merge.output import require_free
from lit_merge.terminal import percent, size


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
    parser.add_argument(
        "--format",
        type=ExportFormat,
        default="safetensors",
        help="safetensors, or lightning for model.ckpt.",
    )
    parser.add_argument(
        "--dtype", type=str | None, help="The floating type to write; the merge's by default."
    )
    add_switch(parser, "replace", "Replace existing output folders.")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge export``.

    Raises:
        InputError: As :func:`lit_merge.export.export_task`, and unless one of task and tasks is
            given.
    """
    options = parse(export_parser(), argv)
    if not is_first_process():
        return 0
    for task, output in _outputs(options).items():
        result = export_task(
            options.merged,
            task,
            output,
            base=options.base,
            format=options.format,
            dtype=options.dtype,
            replace=options.replace,
        )
        _print_result(result)
    return 0


def _outputs(options: Namespace) -> dict[str, str | Path]:
    """Return the folder to write by task, all of them checked before the first is written.

    Raises:
        InputError: No task is named, or there is no such task, or a folder is not free.
    """
    if (options.task is None) == (options.tasks is None):
        got = "neither" if options.task is None else "both"
        raise InputError(
            f"task: must be given, or tasks; got {got}. Name one task with --task, or several with "
            f"--tasks [svhn,dtd] or --tasks all."
        )
    outputs: dict[str, str | Path] = {}
    with open_task_models(options.merged, base=options.base) as models:
        if options.task is not None:
            outputs[options.task] = options.output
        else:
            every = models.parts.tasks
            named = every if options.tasks == "all" and "all" not in every else options.tasks
            for task in [named] if isinstance(named, str) else named:
                outputs[task] = Path(options.output) / task
        for task, output in outputs.items():
            models.require(task)
            require_free(output, replace=options.replace)
    return outputs


def _print_result(result: ExportResult) -> None:
    used = "" if result.share is None else f", {percent(result.share)} % of the masked weights"
    print(f"{result.task}: {result.path} ({size(result.num_bytes)}{used})")
    for note in result.notes:
        print(f"note: {note}")
