"""``lit-merge export``: one task to a folder, several to a folder each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from lit_merge.cli import main
from lit_merge.export import export_task
from lit_merge.methods import EMR, Average
from lit_merge.streaming import merge
from tests.corrected_folders import CLASSES, logits_of, save_corrected
from tests.merge_files import TASKS, save_base, save_experts
from tests.tiny_models import images, tiny_vit


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


TIMM = (
    "--model=TimmClassifier", "--model.model_name=vit_tiny_patch16_224", "--model.num_classes=4",
    "--model.pretrained=false",
    "--model.model_kwargs={img_size: 32, patch_size: 8, depth: 2, embed_dim: 32, num_heads: 2}",
)  # fmt: skip


def test_a_corrected_folder_is_exported_with_its_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = save_corrected(tiny_vit(), "auto", tmp_path / "c")
    assert run(tmp_path / "c", "--tasks", "all", "--output", tmp_path / "out", *TIMM) == 0
    printed = capsys.readouterr().out
    assert printed.count(", exact to ") == 2
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2,
        num_classes=CLASSES["dtd"], checkpoint_path=tmp_path / "out" / "dtd" / "model.safetensors",
    ).eval()  # fmt: skip
    with torch.no_grad():
        found = plain(images(2))
    torch.testing.assert_close(found, logits_of(network, images(2), "dtd"), rtol=1e-5, atol=1e-5)
    options = ("--tasks", "all", "--format", "multi_task", "--fold", "require")
    assert run(tmp_path / "c", *options, "--output", tmp_path / "one", *TIMM) == 0
    assert (tmp_path / "one" / "multi_task.safetensors").is_file()
    assert capsys.readouterr().out.startswith(f"svhn, dtd: {tmp_path / 'one'} (")


def test_a_corrected_folder_without_its_network_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_corrected(tiny_vit(), "auto", tmp_path / "c")
    assert run(tmp_path / "c", "--task", "dtd", "--output", tmp_path / "out") == 2
    assert "model: must be given for" in error_of(capsys)
    assert run(tmp_path / "c", "--task", "dtdd", "--output", tmp_path / "out", *TIMM) == 2
    assert 'Did you mean "dtd"' in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_the_tasks_of_a_configuration_prove_the_export(tmp_path: Path) -> None:
    save_corrected(tiny_vit(), "auto", tmp_path / "c")
    arrays = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", x_train=arrays, y_train=np.arange(10) % 5)
    settings = {"path": str(tmp_path / "data.npz"), "num_classes": 5}
    task = {"class_path": "ImageTask", "init_args": settings}
    (tmp_path / "tasks.yaml").write_text(json.dumps({"dtd": task}))
    options = ("--task", "dtd", "--output", tmp_path / "out")
    assert run(tmp_path / "c", *options, "--examples", tmp_path / "tasks.yaml", *TIMM) == 0
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["correction"]["inputs"] == "given"
