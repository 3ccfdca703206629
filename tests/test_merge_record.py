from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lit_merge.checkpoint import save_tensors
from lit_merge.errors import InputError
from lit_merge.merge_record import read_merge_record
from lit_merge.methods import EMR, TIES
from lit_merge.report import write_report
from lit_merge.streaming import Override, merge


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    for index, name in enumerate(("base", "a", "b")):
        state = {"w": torch.arange(6.0).view(2, 3) * (index + 1), "n": torch.tensor(3)}
        save_tensors(tmp_path / f"{name}.safetensors", state)
    experts = {task: tmp_path / f"{task}.safetensors" for task in "ab"}
    output = tmp_path / "merged"
    merge(tmp_path / "base.safetensors", experts, TIES(density=0.5), output, progress=False)
    return output


def test_record_of_a_merge_is_read_as_it_was_written(merged: Path) -> None:
    record = read_merge_record(merged / "merge.json")
    assert record.name == str(merged)
    assert record.method.startswith("TIES(density=0.5")
    assert record.tasks == ("a", "b")
    assert record.actions() == {"merge": (1, 6), "keep": (1, 1)}
    assert {t.name: (t.shape, t.dtype) for t in record.tensors} == {
        "w": ((2, 3), "float32"),
        "n": ((), "int64"),
    }
    assert "versions" in record.provenance
    assert "tensors" not in record.provenance


def test_another_format_is_refused(merged: Path) -> None:
    file = merged / "merge.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 9}))
    with pytest.raises(InputError, match="must be the record of a merge with format_version 1"):
        read_merge_record(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": [{"name": "w"}]},
        {"tensors": 3},
        {"method": "TIES"},
        {"traces": {"a": "many"}},
        {"traces": []},
    ],
)
def test_damaged_record_is_refused_by_name(merged: Path, changes: dict[str, object]) -> None:
    file = merged / "merge.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=r"merge\.json: must hold the record of a merge"):
        read_merge_record(file)


def test_what_is_special_about_a_merge_is_provenance(tmp_path: Path) -> None:
    for index, name in enumerate(("base", "a", "b")):
        state = {n: torch.arange(6.0) * (index + 1) for n in ("v", "w")}
        save_tensors(tmp_path / f"{name}.safetensors", state)
    merge(
        tmp_path / "base.safetensors",
        {task: tmp_path / f"{task}.safetensors" for task in "ab"},
        EMR(),
        tmp_path / "merged",
        overrides={"w": Override(action="keep")},
        accumulate="float64",
        progress=False,
    )
    record = read_merge_record(tmp_path / "merged" / "merge.json")
    assert record.actions() == {"merge": (1, 6), "keep": (1, 6)}
    assert record.provenance["leaves"] == 2
    assert record.provenance["accumulate"] == "float64"
    assert record.provenance["overrides"]["w"]["action"] == "keep"
    path = write_report(tmp_path / "report.html", None, merges=[record])
    assert "accumulate: float64" in path.read_text()
