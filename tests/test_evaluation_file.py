from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lit_merge.errors import InputError
from lit_merge.evaluation import Evaluation, EvaluationRow, VarianceRow
from lit_merge.evaluation.file import read_evaluation, read_json_object, write_evaluation

ROWS = (
    EvaluationRow("average", "merged", "a", 0.6, 100, 1.2),
    EvaluationRow("svhn", "expert", "a", 0.8, 100, 0.4),
    EvaluationRow("probe", "control", "a", 0.7, 100),
    EvaluationRow("fitted", "corrected", "a", 0.75, 100, stage=2),
)
EVALUATION = Evaluation(
    ROWS,
    (VarianceRow("average", "merged", "a", "fc1", 0.5),),
    ("a note",),
    {"versions": {"lit_merge": "0.1.0"}},
)


def test_written_evaluation_is_read_back_equal(tmp_path: Path) -> None:
    path = write_evaluation(tmp_path / "evaluation.json", EVALUATION)
    assert read_evaluation(path) == EVALUATION


def test_existing_evaluation_is_replaced_only_when_told(tmp_path: Path) -> None:
    path = write_evaluation(tmp_path / "evaluation.json", EVALUATION)
    with pytest.raises(InputError, match=r"evaluation\.json"):
        write_evaluation(path, Evaluation(ROWS[:1]))
    write_evaluation(path, Evaluation(ROWS[:1]), replace=True)
    assert read_evaluation(path) == Evaluation(ROWS[:1])


def test_an_evaluation_from_before_there_were_stages_is_read(tmp_path: Path) -> None:
    content = EVALUATION.as_dict() | {"format_version": 1}
    content["rows"] = [
        {key: value for key, value in row.items() if key != "stage"} for row in content["rows"]
    ]
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read_evaluation(path).rows == tuple(replace(row, stage=None) for row in ROWS)


def test_a_perplexity_is_written_and_read_and_may_be_missing_in_old_files(tmp_path: Path) -> None:
    rows = tuple(replace(row, nll=0.0, perplexity=1.0) for row in ROWS)
    path = write_evaluation(tmp_path / "evaluation.json", Evaluation(rows))
    assert read_evaluation(path).rows == rows
    content = json.loads(path.read_text(encoding="utf-8")) | {"format_version": 2}
    for row in content["rows"]:
        del row["perplexity"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert {row.perplexity for row in read_evaluation(path).rows} == {None}


def changed(**entries: object) -> str:
    return json.dumps(EVALUATION.as_dict() | entries)


GOOD_ROW = EVALUATION.as_dict()["rows"][0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "must hold a JSON object; got list"),
        ("{}", 'must be an evaluation with "format_version" and "rows"'),
        (changed(format_version=4), "format_version must be 1 to 3; got 4"),
        (changed(format_version=0), "format_version must be 1 to 3; got 0"),
        (changed(format_version=True), "format_version must be 1 to 3; got True"),
        (changed(rows=[GOOD_ROW | {"stage": "1"}]), r"rows\[0\]: stage must be int"),
        (changed(rows=[GOOD_ROW | {"stage": 0}]), "stage must count from 1; got 0"),
        (changed(rows={}), "rows: must be a list; got dict"),
        (changed(rows=[3]), r"rows\[0\]: must be an object; got int"),
        (changed(rows=[{"model": "m"}]), r"rows\[0\]: must have the keys"),
        (changed(rows=[GOOD_ROW | {"extra": 1}]), r"rows\[0\]: must have the keys"),
        (changed(rows=[GOOD_ROW | {"accuracy": "1"}]), r"rows\[0\]: accuracy must be float"),
        (changed(rows=[GOOD_ROW | {"num_examples": True}]), "num_examples must be int"),
        (changed(rows=[GOOD_ROW | {"accuracy": 2}]), r"accuracy must be a share in \[0, 1\]"),
        (changed(variances=[{"model": "m"}]), r"variances\[0\]: must have the keys"),
        (changed(notes="x"), "notes must be a list of strings"),
        (changed(provenance=[]), "provenance must be an object"),
    ],
)
def test_damaged_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_evaluation(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: must be a readable file"):
        read_json_object(tmp_path / "none.json")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="must be JSON"):
        read_json_object(path)
