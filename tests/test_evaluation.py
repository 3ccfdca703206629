from __future__ import annotations

import math
from dataclasses import replace

import pytest
from scipy.stats import binomtest

from lit_merge.errors import InputError
from lit_merge.evaluation import (
    EXPERTS,
    Evaluation,
    EvaluationRow,
    Kind,
    VarianceRow,
    wilson_interval,
)

ROWS = (
    EvaluationRow("average", "merged", "a", 0.6, 100, 1.2),
    EvaluationRow("average", "merged", "b", 0.3, 50, 1.6),
    EvaluationRow("svhn expert", "expert", "a", 0.8, 100, 0.4),
    EvaluationRow("dtd expert", "expert", "b", 0.6, 50, 0.8),
    EvaluationRow("probe", "control", "a", 0.7, 100),
    EvaluationRow("probe", "control", "b", 0.5, 50),
    EvaluationRow("half", "merged", "a", 0.4, 100, 2.0),
)
VARIANCES = (
    VarianceRow("average", "merged", "a", "fc1", 0.5),
    VarianceRow("svhn expert", "expert", "a", "fc1", 1.0),
)
EVALUATION = Evaluation(ROWS, VARIANCES, ("a note",), {"versions": {"lit_merge": "0.1.0"}})


def test_lines_are_sorted_by_kind_and_the_experts_share_one() -> None:
    lines = EVALUATION.lines()
    assert [line.model for line in lines] == [EXPERTS, "probe", "average", "half"]
    assert [cell.accuracy if cell else None for cell in lines[0].cells] == [0.8, 0.6]


def test_normalised_mean_is_the_mean_of_the_ratios_to_the_experts() -> None:
    average = next(line for line in EVALUATION.lines() if line.model == "average")
    assert average.accuracy == pytest.approx(0.45)
    assert average.normalised == pytest.approx((0.6 / 0.8 + 0.3 / 0.6) / 2)
    assert average.nll == pytest.approx(1.4)


def test_the_perplexity_of_a_line_is_the_geometric_mean_of_language_tasks() -> None:
    rows = tuple(
        EvaluationRow("m", "merged", task, 0.5, 90, math.log(value), perplexity=value)
        for task, value in (("a", 4.0), ("b", 9.0))
    )
    assert Evaluation(rows).lines()[0].perplexity == pytest.approx(6.0)
    mixed = (rows[0], replace(rows[1], perplexity=None))
    assert Evaluation(mixed).lines()[0].perplexity is None
    assert Evaluation(ROWS).lines()[0].perplexity is None


def test_experts_are_normalised_to_one() -> None:
    assert EVALUATION.lines()[0].normalised == pytest.approx(1.0)


def test_means_over_missing_tasks_or_losses_are_missing() -> None:
    lines = {line.model: line for line in EVALUATION.lines()}
    assert lines["half"].accuracy is None
    assert lines["half"].normalised is None
    assert lines["half"].cells[1] is None
    assert lines["probe"].nll is None
    assert lines["probe"].accuracy == pytest.approx(0.6)


def test_without_experts_nothing_is_normalised() -> None:
    evaluation = Evaluation(tuple(row for row in ROWS if row.kind == "merged"))
    assert [line.normalised for line in evaluation.lines()] == [None, None]


def test_an_expert_that_gets_nothing_right_normalises_nothing() -> None:
    rows = (EvaluationRow("e", "expert", "a", 0.0, 9), EvaluationRow("m", "merged", "a", 0.5, 9))
    assert [line.normalised for line in Evaluation(rows).lines()] == [None, None]


@pytest.mark.parametrize(("right", "total"), [(0, 7), (3, 7), (50, 100), (997, 1000), (7, 7)])
def test_wilson_interval_is_scipys(right: int, total: int) -> None:
    expected = binomtest(right, total).proportion_ci(method="wilson")
    low, high = wilson_interval(right / total, total)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_row_has_its_own_interval() -> None:
    assert ROWS[0].interval == wilson_interval(0.6, 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": 1.5}, r"accuracy must be a share in \[0, 1\]; got 1\.5"),
        ({"accuracy": math.nan}, "accuracy must be a share"),
        ({"num_examples": 0}, "num_examples must be at least 1; got 0"),
        ({"nll": math.inf}, "nll must be finite; got inf"),
        ({"kind": "magic"}, "kind must be one of expert, base, control, merged, corrected"),
        ({"model": ""}, "model must have a name"),
        ({"task": ""}, "task must have a name"),
        ({"stage": 0}, "stage must count from 1; got 0"),
        ({"stage": 1, "kind": "base"}, "stage must be left out but for the kinds merged and corr"),
        ({"perplexity": 3.0}, r"perplexity must be exp\(nll\), 3\.32.*; got 3\.0"),
        ({"perplexity": 3.0, "nll": None}, r"perplexity must be exp\(nll\), None; got 3\.0"),
    ],
)
def test_row_with_an_impossible_value_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(ROWS[0], **changes)  # type: ignore[arg-type]


def test_variance_that_is_negative_or_no_number_is_refused() -> None:
    for value in (-1.0, math.nan):
        with pytest.raises(InputError, match=r'variance of "fc1".*must be finite'):
            replace(VARIANCES[0], variance=value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((ROWS[0], ROWS[0]), "must be there once; got it twice"),
        (
            (ROWS[2], replace(ROWS[2], model="other")),
            'task "a": must have one expert; got "svhn expert" and "other"',
        ),
        (
            (ROWS[0], replace(ROWS[1], kind="base")),
            'model "average" must be of one kind; got merged and base',
        ),
        (
            (ROWS[0], replace(ROWS[1], stage=2)),
            'model "average" must be of one stage; got None and 2',
        ),
        (
            (replace(ROWS[0], stage=2), replace(ROWS[0], model="other", stage=2)),
            "stage 2: must be one model; got 'average' and 'other'",
        ),
    ],
)
def test_rows_that_contradict_each_other_are_refused(
    rows: tuple[EvaluationRow, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Evaluation(rows)


def models(*entries: tuple[str, Kind, int | None]) -> Evaluation:
    return Evaluation(
        tuple(EvaluationRow(name, kind, "a", 0.5, 9, stage=stage) for name, kind, stage in entries)
    )


def test_stages_are_in_the_order_of_their_numbers_whatever_the_order_of_the_models() -> None:
    evaluation = models(
        ("learned", "corrected", 7),
        ("TIES", "merged", None),
        ("TACT", "corrected", 2),
        ("average", "merged", 1),
        ("other", "corrected", None),
    )
    assert [line.model for line in evaluation.stages()] == ["average", "TACT", "learned"]


def test_without_numbers_the_one_merge_and_its_corrections_are_the_stages() -> None:
    evaluation = models(
        ("TACT", "corrected", None),
        ("base", "base", None),
        ("average", "merged", None),
        ("probe", "control", None),
        ("learned", "corrected", None),
    )
    assert [line.model for line in evaluation.stages()] == ["average", "TACT", "learned"]


def test_of_several_merges_or_of_one_model_there_are_no_stages() -> None:
    several = models(("x", "merged", None), ("y", "merged", None), ("z", "corrected", None))
    assert several.stages() == ()
    assert models(("x", "merged", None)).stages() == ()
    assert models(("x", "merged", 1), ("y", "merged", None)).stages() == ()
