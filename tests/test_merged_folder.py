"""Merged and corrected folders: written whole, read back, refused when damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_merge.correction import Site
from lit_merge.errors import InputError
from lit_merge.merged.folder import CorrectionRecord, has_masks, open_merged, write_corrected

RECORD = CorrectionRecord(
    tasks=("svhn", "dtd"),
    num_classes=(10, None),
    sites=(Site("body.0", 3, -1),),
    correction="lit_merge.correction.rescale.RescaleShift",
    calibrated=True,
    settings={"lr": 0.01, "sites": "auto"},
    merge={"method": "Average"},
)
WEIGHTS = {"body.0.weight": torch.ones(3, 2)}
HEADS = {task: {"head.weight": torch.full((2, 3), float(i))} for i, task in enumerate(RECORD.tasks)}
CORRECTIONS = {"body/0.weight": torch.ones(2, 3), "body/0.bias": torch.zeros(2, 3)}


def written(path: Path, record: CorrectionRecord = RECORD) -> Path:
    return write_corrected(
        path, weights=WEIGHTS, heads=HEADS, corrections=CORRECTIONS, record=record
    )


def test_a_corrected_folder_is_read_as_it_was_written(tmp_path):
    with open_merged(written(tmp_path / "x")) as parts:
        assert parts.record == RECORD
        assert parts.tasks == RECORD.tasks
        assert parts.merge == RECORD.merge
        assert torch.equal(parts.weights.tensor("body.0.weight"), WEIGHTS["body.0.weight"])
        assert torch.equal(parts.heads["dtd"].tensor("head.weight"), torch.ones(2, 3))
        assert set(parts.corrections) == set(CORRECTIONS)


def test_a_corrected_folder_holds_plain_tensors_and_json(tmp_path):
    folder = written(tmp_path / "x")
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == [
        "correction.json",
        "corrections.safetensors",
        "heads/dtd.safetensors",
        "heads/svhn.safetensors",
        "model.safetensors",
    ]
    assert torch.equal(load_file(folder / "model.safetensors")["body.0.weight"], torch.ones(3, 2))
    content = json.loads((folder / "correction.json").read_text())
    assert content["format_version"] == 1
    assert {"lit_merge", "torch", "lightning"} <= set(content["versions"])


def test_a_merged_folder_gives_the_tasks_of_the_merge(tmp_path):
    written(tmp_path / "x")
    (tmp_path / "x" / "correction.json").unlink()
    (tmp_path / "x" / "merge.json").write_text('{"tasks": ["svhn", "dtd"], "method": 1}')
    with open_merged(tmp_path / "x") as parts:
        assert parts.record is None
        assert parts.corrections is None
        assert parts.tasks == ("svhn", "dtd")
        assert parts.merge["method"] == 1


def test_an_existing_folder_is_kept_unless_it_may_be_replaced(tmp_path):
    written(tmp_path / "x")
    with pytest.raises(InputError, match="must be empty or absent"):
        written(tmp_path / "x")
    write_corrected(
        tmp_path / "x", weights=WEIGHTS, heads={}, corrections={},
        record=replace(RECORD, sites=()), replace=True,
    )  # fmt: skip
    with open_merged(tmp_path / "x") as parts:
        assert parts.heads == {}
        assert parts.corrections is None


def test_a_folder_that_is_neither_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must be a folder with merge.json or correction.json"):
        open_merged(tmp_path).__enter__()


def test_a_missing_head_is_named(tmp_path):
    folder = written(tmp_path / "x")
    (folder / "heads" / "dtd.safetensors").unlink()
    with pytest.raises(
        InputError, match="heads: must hold the head of every task; got none for 'dtd'"
    ):
        open_merged(folder).__enter__()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "must have format_version 1; got 2"),
        ({"tasks": ["../../etc/x", "dtd"]}, "must hold the names of the tasks"),
        ({"tasks": ["a/b", "dtd"]}, "must hold the names of the tasks"),
        ({"tasks": []}, "must hold the names of the tasks"),
        ({"tasks": "svhn"}, "must hold the names of the tasks"),
        ({"tasks": [1, 2]}, "must hold the names of the tasks"),
        ({"num_classes": [10]}, "must have num_classes for each task"),
        ({"num_classes": ["ten", 3]}, r"got a damaged record \(ValueError"),
        ({"sites": [{"name": "body"}]}, r"got a damaged record \(KeyError"),
        ({"sites": 3}, r"got a damaged record \(TypeError"),
        ({"settings": None}, r"got a damaged record \(TypeError"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, change, message):
    folder = written(tmp_path / "x")
    file = folder / "correction.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=f"correction.json: .*{message}"):
        open_merged(folder).__enter__()


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_a_file_that_is_no_record_is_named(tmp_path, content):
    folder = written(tmp_path / "x")
    (folder / "correction.json").write_text(content)
    with pytest.raises(InputError, match=r"correction.json: must"):
        open_merged(folder).__enter__()


def test_no_record_at_all_is_named():
    with pytest.raises(
        InputError, match="checkpoint: must hold the record of a correction; got none"
    ):
        CorrectionRecord.from_dict(None, source="checkpoint")


def masked(folder: Path, **changes: object) -> Path:
    """Write a merged folder with masks, by hand."""
    written(folder)
    (folder / "correction.json").unlink()
    (folder / "masks").mkdir()
    for task in RECORD.tasks:
        bits = {"body.0.weight": torch.tensor([5], dtype=torch.uint8)}
        save_file(bits, folder / "masks" / f"{task}.safetensors", {"scale": "1"})
    record = {"tasks": list(RECORD.tasks), "method": {"class_path": "EMR"}, **changes}
    (folder / "merge.json").write_text(json.dumps(record))
    return folder


def test_masks_are_parts_of_a_merged_folder_and_not_one_model(tmp_path):
    with open_merged(masked(tmp_path / "x")) as parts:
        assert set(parts.masks) == set(RECORD.tasks)
        assert parts.masks["dtd"].tensor("body.0.weight").tolist() == [5]
        with pytest.raises(
            InputError, match=r"^there: must be one model for all tasks; got a merg"
        ):
            parts.require_one_model("there")
    assert has_masks(tmp_path / "x")
    with open_merged(written(tmp_path / "y")) as parts:
        parts.require_one_model("there")
    assert not has_masks(tmp_path / "y")
    assert not has_masks(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": {"class_path": "lit_merge.methods.emr.EMR"}}, True),
        ({"method": {"class_path": "lit_merge.methods.tall_masks.TALLMasks"}}, True),
        ({"method": {"class_path": "lit_merge.methods.tall_masks.Consensus"}}, False),
        ({"method": {"class_path": "os.path.EMR"}}, False),
        ({"overrides": {"*": {"method": {"class_path": "lit_merge.methods.emr.EMR"}}}}, True),
        ({"overrides": {"*": {"method": None}, "a": 3}, "method": None}, False),
        ({"masks": {}, "method": {"class_path": "lit_merge.methods.emr.EMR"}}, False),
        ({"masks": {"svhn": "masks/svhn.safetensors"}}, True),
    ],
)
def test_the_record_tells_that_masks_belong_to_a_merge(tmp_path, changes, expected):
    folder = masked(tmp_path / "x", **changes)
    shutil.rmtree(folder / "masks")
    assert has_masks(folder) is expected


@pytest.mark.parametrize(
    ("heads", "expected"),
    [({}, RECORD.tasks), ({"dtd": 1}, RECORD.tasks), ({"dtd": 1, "cars": 2}, ("dtd", "cars"))],
)
def test_heads_that_a_merge_brought_along_are_tasks(tmp_path, heads, expected):
    folder = masked(tmp_path / "x", heads=heads, masks={})
    shutil.copy(folder / "heads" / "dtd.safetensors", folder / "heads" / "cars.safetensors")
    with open_merged(folder) as parts:
        assert parts.tasks == tuple(expected)
        assert set(parts.heads) == set(expected)


def test_names_of_heads_cannot_leave_the_folder(tmp_path):
    folder = masked(tmp_path / "x", heads={"../x": "y"}, masks={})
    with pytest.raises(InputError, match=r"merge\.json: must hold the names of the tasks"):
        open_merged(folder).__enter__()
