"""``lit-merge export``: one task to a folder, several to a folder each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_merge.cli import main
from lit_merge.export import export_task
from lit_merge.methods import EMR, Average
from lit_merge.streaming import merge
from tests.merge_files import TASKS, save_base, save_experts


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    return Path(merge(base, experts, EMR(), tmp_path / "merged", progress=False).path)


def run(merged: Path, *options: str | Path) -> int:
    return main(["export", "--merged", str(merged), *map(str, options)])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.index("lit-merge: error: ") :]


def test_one_task_is_what_the_library_exports(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(merged, "--task", "dtd", "--output", tmp_path / "out", "--dtype", "float64") == 0
    result = export_task(merged, "dtd", tmp_path / "library", dtype="float64", progress=False)
    left = load_file(tmp_path / "out" / "model.safetensors")
    right = load_file(tmp_path / "library" / "model.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert left["emb.weight"].dtype == torch.float64
    printed = capsys.readouterr().out
    assert result.share is not None
    assert f"dtd: {tmp_path / 'out'} (" in printed
    assert f"{100 * result.share:.1f} % of the masked weights" in printed


@pytest.mark.parametrize("tasks", ["all", "[svhn,dtd]"])
def test_several_tasks_get_a_folder_each(merged: Path, tmp_path: Path, tasks: str) -> None:
    assert run(merged, "--tasks", tasks, "--output", tmp_path / "out") == 0
    for task in TASKS:
        record = json.loads((tmp_path / "out" / task / "export.json").read_text())
        assert record["task"] == task


def test_a_single_name_among_tasks_is_a_list_of_one(merged: Path, tmp_path: Path) -> None:
    assert run(merged, "--tasks", "dtd", "--output", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dtd"]


def test_notes_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    merge(base, experts, Average(), tmp_path / "merged", progress=False)
    options = ("--task", "dtd", "--output", tmp_path / "out", "--format", "lightning")
    assert run(tmp_path / "merged", *options) == 0
    assert "note: " in capsys.readouterr().out
    assert (tmp_path / "out" / "model.ckpt").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "task: must be given, or tasks; got neither"),
        (("--task", "dtd", "--tasks", "all"), "task: must be given, or tasks; got both"),
        (("--task", "dtdd"), "got 'dtdd'. Did you mean \"dtd\"?"),
        (("--tasks", "[svhn,cars]"), "task: must be one of svhn, dtd"),
        (("--task", "dtd", "--base", "/none"), "/none: must be the base that"),
        (("--task", "dtd", "--format", "onnx"), "onnx"),
        (("--task", "dtd", "--dtype", "int8"), "dtype: must be one of"),
        (("--taks", "dtd"), "--ta"),
    ],
)
def test_a_mistake_is_one_clear_line_and_writes_nothing(
    merged: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    assert run(merged, *options, "--output", tmp_path / "out") == 2
    error = error_of(capsys)
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_taken_stops_before_the_first_is_written(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "dtd").mkdir(parents=True)
    (tmp_path / "out" / "dtd" / "notes.txt").touch()
    assert run(merged, "--tasks", "all", "--output", tmp_path / "out") == 2
    assert "must be empty or absent" in error_of(capsys)
    assert not (tmp_path / "out" / "svhn").exists()
    assert run(merged, "--tasks", "all", "--output", tmp_path / "out", "--replace") == 0


def test_only_the_first_of_several_processes_exports(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(merged, "--task", "dtd", "--output", tmp_path / "out") == 0
    assert not (tmp_path / "out").exists()
