"""What ``lit-merge report`` makes of the files and folders that it is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lit_merge.cli.report import read_all
from lit_merge.correction import Site
from lit_merge.errors import InputError
from lit_merge.evaluation import Evaluation, EvaluationRow
from lit_merge.evaluation.file import write_evaluation
from lit_merge.merged.folder import CorrectionRecord, write_corrected

ALIGN = {
    "format_version": 1,
    "reference": "left",
    "groups": {"left": {"experts": {"a": "x"}}, "right": {"experts": {"b": "y"}}},
    "objective": {"before": 1.0, "after": 2.0},
    "symmetries": [],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_evaluation(
        tmp_path / "evaluation.json", Evaluation((EvaluationRow("m", "merged", "a", 0.5, 10),))
    )
    write_corrected(
        tmp_path / "corrected",
        weights={"w": torch.ones(1)},
        heads={},
        corrections={"fc.weight": torch.ones(1, 2), "fc.bias": torch.zeros(1, 2)},
        record=CorrectionRecord(("a",), (2,), (Site("fc", 2, -1),), "RescaleShift", True),
    )
    (tmp_path / "aligned").mkdir()
    (tmp_path / "aligned" / "align.json").write_text(json.dumps(ALIGN))
    return tmp_path


@pytest.mark.parametrize("suffix", [("", ""), ("/correction.json", "/align.json")])
def test_every_kind_is_known_by_its_content_as_a_folder_and_as_a_file(
    folder: Path, suffix: tuple[str, str]
) -> None:
    corrected, aligned = f"{folder}/corrected{suffix[0]}", f"{folder}/aligned{suffix[1]}"
    found = read_all([aligned, f"{folder}/evaluation.json", corrected, corrected])
    assert found.evaluation is not None
    assert [one.name for one in found.corrections] == [str(folder / "corrected")] * 2
    assert [one.name for one in found.alignments] == [str(folder / "aligned")]
    assert found.merges == []


def test_a_folder_with_nothing_to_report_is_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: must be a merged, .* or expert folder; got none"):
        read_all([str(folder / "empty")])


def test_a_second_evaluation_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"must be the only evaluation of a report; got .*evaluat"):
        read_all([str(folder / "evaluation.json")] * 2)
