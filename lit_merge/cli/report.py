"""``lit-merge report``: one page from the files and folders that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lit_merge.cli.json_output import add_json, json_result
from lit_merge.cli.parsing import command_parser, parse
from lit_merge.errors import InputError
from lit_merge.evaluation import Evaluation
from lit_merge.evaluation.file import read_evaluation, read_json_object
from lit_merge.merge_record import MERGE_FILE, MergeRecord, read_merge_record
from lit_merge.report.alignment_record import ALIGN_FILE, AlignmentRecord, read_alignment
from lit_merge.report.comparisons import ComparedExperts, compare_experts, compare_merged
from lit_merge.report.forecast_record import ForecastRecord, read_forecast
from lit_merge.report.recorded import evaluated_merges
from lit_merge.report.scales import CORRECTION_FILE, CorrectionScales, read_scales


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge report``.

    Raises:
        InputError: If a file is nothing that a report is made of, or the output is there.
    """
    from lit_merge.output import require_free_file
    from lit_merge.report import DEFAULT_TITLE, write_report

    parser = command_parser("report", "Write one self-contained HTML page.")
    parser.add_argument(
        "files",
        nargs="+",
        type=str,
        help="evaluation.json, forecast.json; merged, corrected, aligned or expert folders.",
    )
    parser.add_argument("--base", type=str | None, help="What expert folders were fine-tuned from.")
    parser.add_argument(
        "--overlap",
        type=bool,
        default=True,
        help="Whether to compare the experts of merges from their files.",
    )
    parser.add_argument("--output", type=str, default="report.html", help="The file to write.")
    parser.add_argument("--title", type=str, default=DEFAULT_TITLE, help="The page's title.")
    parser.add_argument("--replace", action="store_true", help="Replace an existing file.")
    add_json(parser)
    options = parse(parser, argv)
    require_free_file(options.output, replace=options.replace)
    with json_result("report", asked=options.json) as result:
        found = read_all(options.files)
        compared = _compared(found, options.base, merged=options.overlap)
        path = write_report(
            options.output,
            found.evaluation,
            merges=found.merges,
            corrections=found.corrections,
            alignments=found.alignments,
            forecasts=found.forecasts,
            experts=compared,
            evaluated=found.evaluated_merges(),
            title=options.title,
            replace=options.replace,
        )
        if result.asked:
            notes = [note for one in compared for note in one.notes]
            result.show({"files": options.files, "notes": notes}, output=path)
        else:
            print(f"report: {path}")
    return 0


@dataclass
class Found:
    """What the files of a report are.

    Attributes:
        evaluation: The one evaluation; None without one.
        place: Its file; empty without one.
        merges: The records of merges, in the order of the files.
        corrections: The scales of corrected folders, likewise.
        alignments: The records of alignments, likewise.
        forecasts: The forecasts, likewise.
        experts: The expert folders, likewise.
    """

    evaluation: Evaluation | None = None
    place: str = ""
    merges: list[MergeRecord] = field(default_factory=list)
    corrections: list[CorrectionScales] = field(default_factory=list)
    alignments: list[AlignmentRecord] = field(default_factory=list)
    forecasts: list[ForecastRecord] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)

    def evaluated_merges(self) -> dict[str, MergeRecord]:
        """Return how the evaluation's merged models were made, as far as it can be found."""
        if self.evaluation is None:
            return {}
        return evaluated_merges(self.evaluation, self.merges, beside=self.place)


def read_all(files: Sequence[str]) -> Found:
    """Read what a report is made of; expert folders are not opened yet.

    Raises:
        InputError: A file is none of them, is damaged, or is a second evaluation.
    """
    found = Found()
    for name in files:
        path = Path(name)
        if path.is_dir():
            known = (CORRECTION_FILE, ALIGN_FILE, MERGE_FILE)
            file = next((file for file in known if (path / file).is_file()), None)
            if file is None:
                found.experts.append(_expert(name))
                continue
            path /= file
        if path.name == CORRECTION_FILE:
            found.corrections.append(read_scales(path.parent))
            continue
        content = read_json_object(path)
        if "symmetries" in content:
            found.alignments.append(read_alignment(path))
        elif "planned" in content and "curve" in content:
            found.forecasts.append(read_forecast(path))
        elif "rows" not in content:
            found.merges.append(read_merge_record(path))
        elif found.evaluation is None:
            found.place, found.evaluation = name, read_evaluation(path)
        else:
            raise InputError(
                f"{name}: must be the only evaluation of a report; got {found.place} before it. "
                "Evaluate all models in one run, or write a report for each."
            )
    return found


def _expert(name: str) -> str:
    from lit_merge.expert import open_expert

    try:
        open_expert(name).close()
    except InputError as error:
        raise InputError(
            f"{name}: must be a merged, corrected, aligned or expert folder; got none of them "
            f"({error}). Check the path."
        ) from error
    return name


def _compared(found: Found, base: str | None, *, merged: bool) -> list[ComparedExperts]:
    if base is not None and not found.experts:
        raise InputError(
            f"base: must come with expert folders; got {base!r} and no expert. Name their folders, "
            "or leave base out: the records of merges say theirs."
        )
    compared = list(compare_merged(found.merges)) if merged else []
    return [*compared, compare_experts(base, found.experts)] if found.experts else compared
