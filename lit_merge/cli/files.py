"""``lit-merge report`` and ``lit-merge inspect``: the commands that only read files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lit_merge.cli.parsing import command_parser, parse
from lit_merge.errors import InputError
from lit_merge.evaluation import Evaluation
from lit_merge.evaluation.file import read_evaluation, read_json_object
from lit_merge.merge_record import MERGE_FILE, MergeRecord, read_merge_record
from lit_merge.report.alignment_record import ALIGN_FILE, AlignmentRecord, read_alignment
from lit_merge.report.scales import CORRECTION_FILE, CorrectionScales, read_scales


def report(argv: Sequence[str]) -> int:
    """Run ``lit-merge report``.

    Raises:
        InputError: If a file is neither an evaluation nor a merge's record, or the output is there.
    """
    from lit_merge.report import DEFAULT_TITLE, write_report

    parser = command_parser("report", "Write one self-contained HTML page.")
    parser.add_argument(
        "files",
        nargs="+",
        type=str,
        help="evaluation.json, merge.json, align.json; merged, corrected or aligned folders.",
    )
    parser.add_argument("--output", type=str, default="report.html", help="The file to write.")
    parser.add_argument("--title", type=str, default=DEFAULT_TITLE, help="The page's title.")
    parser.add_argument("--replace", action="store_true", help="Replace an existing file.")
    options = parse(parser, argv)
    found = _read_all(options.files)
    path = write_report(
        options.output,
        found.evaluation,
        merges=found.merges,
        corrections=found.corrections,
        alignments=found.alignments,
        title=options.title,
        replace=options.replace,
    )
    print(f"report: {path}")
    return 0


@dataclass
class _Found:
    """What the files of a report are.

    Attributes:
        evaluation: The one evaluation; None without one.
        merges: The records of merges, in the order of the files.
        corrections: The scales of corrected folders, likewise.
        alignments: The records of alignments, likewise.
    """

    evaluation: Evaluation | None = None
    merges: list[MergeRecord] = field(default_factory=list)
    corrections: list[CorrectionScales] = field(default_factory=list)
    alignments: list[AlignmentRecord] = field(default_factory=list)


def _read_all(files: Sequence[str]) -> _Found:
    found = _Found()
    first = ""
    for name in files:
        path = Path(name)
        if path.is_dir():
            known = (CORRECTION_FILE, ALIGN_FILE)
            path /= next((file for file in known if (path / file).is_file()), MERGE_FILE)
        if path.name == CORRECTION_FILE:
            found.corrections.append(read_scales(path.parent))
            continue
        content = read_json_object(path)
        if "symmetries" in content:
            found.alignments.append(read_alignment(path))
        elif "rows" not in content:
            found.merges.append(read_merge_record(path))
        elif found.evaluation is None:
            first, found.evaluation = name, read_evaluation(path)
        else:
            raise InputError(
                f"{name}: must be the only evaluation of a report; got {first} before it. "
                "Evaluate all models in one run, or write a report for each."
            )
    return found


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
