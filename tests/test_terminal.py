from __future__ import annotations

import io
import math
from pathlib import Path

import torch
from rich.console import Console

from lit_merge.checkpoint import TensorInfo
from lit_merge.evaluation import Evaluation, EvaluationRow
from lit_merge.parameters import TensorPlan
from lit_merge.streaming import MergeResult
from lit_merge.terminal import print_evaluation, print_merge

ROWS = (
    EvaluationRow("expert a", "expert", "a", 0.8, 100, 0.4),
    EvaluationRow("a long name [bold] of a merged model", "merged", "a", 0.6, 100, 1.25),
    EvaluationRow("probe", "control", "a", 0.7, 100),
)


def printed(width: int = 80) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=width), stream


def test_evaluation_has_accuracy_share_of_the_experts_and_loss_of_every_model() -> None:
    console, stream = printed()
    print_evaluation(Evaluation(ROWS, notes=("a [note]",)), console=console)
    text = stream.getvalue()
    (merged,) = [line for line in text.splitlines() if "merged model" in line]
    assert merged.split()[-4:] == ["75.0", "60.0", "60.0", "1.250"]
    (probe,) = [line for line in text.splitlines() if "probe" in line]
    assert probe.split()[1:] == ["87.5", "70.0", "70.0", "–"]
    assert "note: a [note]" in text
    assert "a 100" in text


def test_a_language_task_shows_its_perplexity() -> None:
    console, stream = printed()
    nll = math.log(20.0)
    language = EvaluationRow("m", "merged", "news", 0.3, 640, nll, perplexity=20.0)
    print_evaluation(
        Evaluation((EvaluationRow("m", "merged", "a", 0.6, 100, 1.0),)), console=console
    )
    assert "perplexity" not in stream.getvalue()
    print_evaluation(Evaluation((language,)), console=console)
    text = stream.getvalue()
    line = text.splitlines()[-3].split()
    assert line == ["m", "–", "30.0", "20", "2.996", "20"]
    assert "of news perplexity. Test examples or tokens: news 640" in text


def test_names_are_no_markup() -> None:
    console, stream = printed()
    print_evaluation(Evaluation(ROWS), console=console)
    assert "[bold]" in stream.getvalue()


def test_file_gets_the_whole_table_however_narrow() -> None:
    console, stream = printed(width=20)
    print_evaluation(Evaluation(ROWS), console=console)
    assert "a long name [bold] of a merged model" in stream.getvalue()
    assert "1.250" in stream.getvalue()


def test_merge_is_summed_up_by_action_with_traces_and_warnings() -> None:
    info = TensorInfo((2, 3), torch.float32)
    result = MergeResult(
        path=Path("out"),
        record=(
            TensorPlan("a", "merge", "", info),
            TensorPlan("b", "merge", "", info),
            TensorPlan("c", "keep", "", info),
        ),
        tasks=("x", "y"),
        seconds=1.25,
        traces={"x": 200.0, "y": 50.0},
        notes=("a note",),
        warnings=("a [warning]",),
    )
    console, stream = printed()
    print_merge(result, console=console)
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert ["merge", "2", "12"] in lines
    assert ["keep", "1", "6"] in lines
    assert ["y", "50", "25.0", "%"] in lines
    assert "Merged x, y into out" in stream.getvalue()
    assert "note: a note" in stream.getvalue()
    assert "warning: a [warning]" in stream.getvalue()
