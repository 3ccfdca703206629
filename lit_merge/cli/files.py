"""``lit-merge report`` and ``lit-merge inspect``: the commands that only read files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_merge.cli.parsing import command_parser, parse
from lit_merge.errors import InputError
from lit_merge.evaluation import Evaluation
from lit_merge.evaluation.file import read_evaluation, read_json_object
from lit_merge.merge_record import MERGE_FILE, MergeRecord, read_merge_record


def report(argv: Sequence[str]) -> int:
    """Run ``lit-merge report``.

    Raises:
        InputError: If a file is neither an evaluation nor a merge's record, or the output is there.
    """
    from lit_merge.report import DEFAULT_TITLE, write_report

    parser = command_parser("report", "Write one self-contained HTML page.")
    parser.add_argument(
        "files", nargs="+", type=str, help="evaluation.json, merge.json or merged folders."
    )
    parser.add_argument("--output", type=str, default="report.html", help="The file to write.")
    parser.add_argument("--title", type=str, default=DEFAULT_TITLE, help="The page's title.")
    parser.add_argument("--replace", action="store_true", help="Replace an existing file.")
    options = parse(parser, argv)
    evaluation, merges = _read_all(options.files)
    path = write_report(
        options.output, evaluation, merges=merges, title=options.title, replace=options.replace
    )
    print(f"report: {path}")
    return 0


def _read_all(files: Sequence[str]) -> tuple[Evaluation | None, list[MergeRecord]]:
    evaluation: tuple[str, Evaluation] | None = None
    merges: list[MergeRecord] = []
    for name in files:
        path = Path(name) / MERGE_FILE if Path(name).is_dir() else Path(name)
        content = read_json_object(path)
        if "rows" not in content:
            merges.append(read_merge_record(path))
        elif evaluation is None:
            evaluation = name, read_evaluation(path)
        else:
            raise InputError(
                f"{name}: must be the only evaluation of a report; got {evaluation[0]} before it. "
                "Evaluate all models in one run, or write a report for each."
            )
    return (evaluation[1] if evaluation else None), merges


def inspect(argv: Sequence[str]) -> int:
    """Run ``lit-merge inspect``.

    Raises:
        InputError: If a path does not exist or holds nothing that lit-merge knows.
    """
    parser = command_parser("inspect", "Say what a path holds.")
    parser.add_argument("paths", nargs="+", type=str, help="Checkpoint files or folders.")
    parser.add_argument("--tensors", action="store_true", help="List every tensor.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")
    options = parse(parser, argv)

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, TaskID

    from lit_merge.inspection import inspect_path
    from lit_merge.terminal import print_inspection

    inspections = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for path in options.paths:
            bar = progress.add_task(escape(path), total=None)

            def advance(done: int, total: int, bar: TaskID = bar) -> None:
                progress.update(bar, completed=done, total=total)

            inspections.append(inspect_path(path, advance=advance))
    if options.json:
        contents = [inspection.as_dict() for inspection in inspections]
        if not options.tensors:
            for content in contents:
                del content["tensors"]
        shown = contents[0] if len(contents) == 1 else contents
        json.dump(shown, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        for inspection in inspections:
            print_inspection(inspection, tensors=options.tensors)
    return 0
