"""The commands from training to report, on images that are learned in a second."""

from __future__ import annotations

import csv
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lit_merge.checkpoint import open_checkpoint
from lit_merge.cli import main
from lit_merge.evaluation.file import read_evaluation
from lit_merge.expert import open_expert

CLASSES = {"base": 4, "a": 3, "b": 2}
NETWORK = {
    "model_name": "vit_tiny_patch16_224",
    "model_kwargs": {
        "img_size": 16,
        "patch_size": 8,
        "in_chans": 1,
        "depth": 1,
        "embed_dim": 32,
        "num_heads": 2,
    },
}


class Run:
    """A folder with data, a trained base, two experts, and the configurations to go on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rng = np.random.default_rng(0)
        for name, classes in CLASSES.items():
            prototypes = rng.integers(0, 255, (classes, 16, 16))
            arrays = {}
            for split, count in (("train", 45), ("test", 31)):
                labels = np.arange(count) % classes
                noisy = prototypes[labels] + rng.normal(0, 60, (count, 16, 16))
                arrays[f"x_{split}"] = noisy.clip(0, 255).astype(np.uint8)
                arrays[f"y_{split}"] = labels
            np.savez(root / f"{name}.npz", **arrays)
        self.tasks = {name: self.task(name) for name in ("a", "b")}
        self.write("tasks", self.tasks)
        self.statuses = [
            self("fit", self.fit("base")),
            *(self("fit", self.fit(name, checkpoint=self.checkpoint("base"))) for name in "ab"),
        ]

    def __call__(self, command: str, config: dict[str, Any], *options: str) -> int:
        return main([command, "--config", str(self.write(command, config)), *options])

    def write(self, name: str, content: Any) -> Path:
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def task(self, name: str) -> dict[str, Any]:
        path = str(self.root / f"{name}.npz")
        options = {"path": path, "num_classes": CLASSES[name], "channels": 1}
        return {"class_path": "ImageTask", "init_args": options}

    def model(self, name: str, **options: Any) -> dict[str, Any]:
        arguments = {**NETWORK, "num_classes": CLASSES[name], **options}
        return {"class_path": "TimmClassifier", "init_args": arguments}

    def trainer(self, **options: Any) -> dict[str, Any]:
        quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        return {**quiet, "enable_model_summary": False, **options}

    def fit(self, name: str, checkpoint: str | None = None) -> dict[str, Any]:
        start = {} if checkpoint is None else {"checkpoint": checkpoint, "head": "fresh"}
        folder = str(self.root / "runs" / name)
        callbacks: list[dict[str, Any]] = [
            {
                "class_path": "ModelCheckpoint",
                "init_args": {"dirpath": f"{folder}/checkpoints", "save_last": True},
            }
        ]
        if name != "base":
            options = {"task": name, "output": f"{folder}/expert"}
            callbacks += [
                {"class_path": kind, "init_args": options}
                for kind in ("DiagonalHessian", "ActivationStatistics")
            ]
        data = {"task": self.task(name), "batch_size": 16}
        return {
            "model": self.model(name, lr=3e-3, **start),
            "data": {"class_path": "TaskDataModule", "init_args": data},
            "trainer": self.trainer(max_epochs=2, default_root_dir=folder, callbacks=callbacks),
        }

    def checkpoint(self, name: str) -> str:
        return str(self.root / "runs" / name / "checkpoints" / "last.ckpt")

    @property
    def experts(self) -> dict[str, str]:
        return {name: str(self.root / "runs" / name) for name in ("a", "b")}

    def merge(self, output: str) -> dict[str, Any]:
        return {
            "base": self.checkpoint("base"),
            "experts": self.experts,
            "method": {"class_path": "GradientMatching", "init_args": {"scale": 1.0}},
            "output": str(self.root / output),
        }

    def correct(self, output: str, *, merged: str = "merged", steps: int = 3) -> dict[str, Any]:
        return {
            "model": self.model("a"),
            "merged": str(self.root / merged),
            "experts": self.experts,
            "tasks": self.tasks,
            "calibration_examples": 32,
            "batch_size": 8,
            "trainer": self.trainer(max_steps=steps, default_root_dir=str(self.root)),
            "output": str(self.root / output),
        }

    def evaluate(self, output: str) -> dict[str, Any]:
        return {
            "model": self.model("a"),
            "models": {
                "start": {"path": self.checkpoint("base"), "kind": "base"},
                **self.experts,
                "gradient matching": str(self.root / "merged"),
                "fitted": str(self.root / "corrected"),
            },
            "tasks": self.tasks,
            "trainer": self.trainer(default_root_dir=str(self.root)),
            "output": str(self.root / output),
        }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def merged(run: Run) -> Run:
    assert run("merge", run.merge("merged")) == 0
    return run


@pytest.fixture(scope="module")
def corrected(merged: Run) -> Run:
    assert merged("correct", merged.correct("corrected")) == 0
    return merged


@pytest.fixture(autouse=True)
def _no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIT_MERGE_TRACEBACK", raising=False)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.index("lit-merge: error: ") :]


def test_fit_ends_with_expert_folders(run: Run) -> None:
    assert run.statuses == [0, 0, 0]
    for name in ("a", "b"):
        expert = open_expert(run.experts[name])
        assert expert.info.task == name
        assert expert.info.num_examples == 45
        assert expert.hessian is not None
        assert expert.activations is not None
        expert.close()


def test_fit_writes_its_configuration_beside_the_checkpoints(run: Run) -> None:
    written = run.root / "runs" / "a" / "checkpoints" / "config.yaml"
    config = yaml.safe_load(written.read_text())
    assert config["seed_everything"] == 0
    assert config["data"]["init_args"]["batch_size"] == 16


def test_fit_leaves_nothing_in_the_working_folder(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = run.fit("base")
    del config["trainer"]["default_root_dir"]
    config["trainer"]["callbacks"][0]["init_args"]["dirpath"] = str(run.root / "elsewhere")
    assert run("fit", config, "--trainer.max_epochs", "1") == 0
    assert list(tmp_path.iterdir()) == []
    assert (run.root / "elsewhere" / "config.yaml").is_file()


def curvature(run: Run, output: str) -> dict[str, Any]:
    """Return the configuration of a pass over the checkpoint of expert a."""
    config = {**run.fit("a"), "trainer": run.trainer(), "checkpoint": run.checkpoint("a")}
    return {**config, "output": str(run.root / output), "task": "a"}


def test_curvature_of_a_checkpoint_is_what_the_callback_gathers(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("curvature", curvature(run, "again")) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"^curvature: relative error [\d.]+ %, rank correlation 0\.\d\d", printed, re.M
    )
    with (
        open_checkpoint(run.root / "again" / "hessian.safetensors") as found,
        open_checkpoint(run.root / "runs/a/expert/hessian.safetensors") as expected,
    ):
        assert set(found) == set(expected)
        for name in found:
            torch.testing.assert_close(found.tensor(name), expected.tensor(name))


def test_curvature_takes_the_options_of_a_pass(run: Run) -> None:
    config = curvature(run, "hessian")
    options = ["--estimator", "hutchinson", "--samples", "2", "--save_every", "null"]
    assert run("curvature", config, *options) == 0
    info = open_expert(run.root / "hessian").info
    assert (info.estimator, info.labels) == ("hutchinson", "observed")
    assert info.details["curvature"]["samples"] == 2


def test_curvature_adds_matrices_to_a_folder_without_its_diagonal(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--estimator", "none", "--gram", "true", "--kronecker", "true"]
    assert run("curvature", curvature(run, "matrices"), *options) == 0
    assert capsys.readouterr().out.startswith("expert: ")
    expert = open_expert(run.root / "matrices")
    assert expert.hessian is None
    assert expert.gram is not None
    assert expert.kronecker is not None


def test_curvature_options_that_do_not_go_together_are_an_error(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    config = curvature(run, "never")
    assert run("curvature", config, "--labels", "expected", "--samples", "2") == 2
    assert 'samples: must be 1 without labels "sampled"; got 2' in error_of(capsys)
    assert not (run.root / "never").exists()


def test_merge_prints_what_it_did(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", run.merge("shown"), "--method", "TIES", "--method.density", "0.3") == 0
    printed = capsys.readouterr().out
    assert "Merged a, b into" in printed
    assert "per-task" in printed
    record = json.loads((run.root / "shown" / "merge.json").read_text())
    assert record["method"]["init_args"]["density"] == 0.3


def test_merge_takes_experts_as_a_list(run: Run) -> None:
    config = {**run.merge("listed"), "experts": list(run.experts.values())}
    assert run("merge", config) == 0
    assert json.loads((run.root / "listed" / "merge.json").read_text())["tasks"] == ["a", "b"]


def test_merge_refuses_an_output_that_is_there_until_told(
    merged: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merged("merge", merged.merge("twice")) == 0
    assert merged("merge", merged.merge("twice")) == 2
    assert "twice" in error_of(capsys)
    assert merged("merge", merged.merge("twice"), "--replace") == 0
    assert merged("merge", {**merged.merge("twice"), "replace": True}) == 0
    assert merged("merge", {**merged.merge("twice"), "replace": True}, "--replace", "false") == 2


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"metod": "TIES"}, (), "Option 'metod' is not accepted. Did you mean \"method\"?"),
        ({"experts": {"a": "/none"}}, (), "/none: must exist"),
        ({}, ("--method", "GradientMatch"), 'Did you mean "GradientMatching"?'),
        ({}, ("--method", "Nonsense"), "must be the name of a class; got Nonsense"),
        ({}, ("--method", "TIES", "--method.dnsity", "1"), 'Did you mean "density"?'),
        ({}, ("--method", "TIES", "--method.density", "7"), "density: must be"),
        ({}, ("--method.scale", "big"), "scale"),
        ({}, ("--policy.heads", "drop"), "heads"),
        ({}, ("--outptu", "x"), 'Did you mean "--output"?'),
        ({}, ("--config", "/none.yaml"), "/none.yaml"),
        ({"dtype": "float8"}, (), "dtype: must be one of"),
    ],
)
def test_merge_with_a_mistake_is_one_clear_line(
    run: Run,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    options: tuple[str, ...],
    message: str,
) -> None:
    assert run("merge", {**run.merge("wrong"), **changes}, *options) == 2
    error = error_of(capsys)
    assert message in error
    assert error.count("\n") == 1
    assert not (run.root / "wrong").exists()


def test_merge_without_experts_names_what_is_missing(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run.merge("wrong")
    del config["experts"]
    assert run("merge", config) == 2
    assert "experts" in error_of(capsys)


def test_corrected_folder_is_fitted_from_the_closed_form(corrected: Run) -> None:
    closed = corrected.correct("closed", steps=0)
    assert corrected("correct", closed) == 0
    with (
        open_checkpoint(corrected.root / "closed" / "corrections.safetensors") as start,
        open_checkpoint(corrected.root / "corrected" / "corrections.safetensors") as fitted,
    ):
        assert set(start) == set(fitted)
        moved = [not torch.equal(start.tensor(name), fitted.tensor(name)) for name in start]
        changed = [
            not torch.equal(start.tensor(name), torch.ones(start.infos[name].shape))
            for name in start
            if name.endswith("weight")
        ]
    assert any(moved)
    assert all(changed)


def test_a_correction_can_be_repeated_from_its_record_and_its_page(corrected: Run) -> None:
    root = corrected.root
    record = json.loads((root / "corrected" / "correction.json").read_text())
    (root / "again.yaml").write_text(record["configuration"])
    assert main(["correct", "--config", str(root / "again.yaml"), "--output", str(root / "b")]) == 0
    with (
        open_checkpoint(root / "corrected" / "corrections.safetensors") as one,
        open_checkpoint(root / "b" / "corrections.safetensors") as two,
    ):
        assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one)
    page = root / "corrected.html"
    assert main(["report", str(root / "corrected"), "--output", str(page)]) == 0
    assert record["configuration"].strip() in html.unescape(page.read_text())


def test_tasks_may_stand_in_a_file_of_their_own(
    merged: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**merged.correct("from-file", steps=0), "tasks": str(merged.root / "tasks.yaml")}
    assert merged("correct", config) == 0
    assert "corrected: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"experts": {"a": "/none", "c": "/none"}},
            "experts: must be those that were merged, a, b",
        ),
        ({"merged": "/none"}, "/none: must be a folder with merge.json"),
        ({"calibration": 3}, 'Did you mean "calibration_examples"?'),
        ({"calibration_examples": 1}, "calibration_examples: must be at least 2"),
        ({"tasks": {}}, "tasks: must hold at least one task"),
        ({"sites": "nonsense.*"}, "nonsense.*"),
    ],
)
def test_correct_with_a_mistake_is_one_clear_line(
    merged: Run,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    assert merged("correct", {**merged.correct("wrong"), **changes}) == 2
    assert message in error_of(capsys)
    assert not (merged.root / "wrong").exists()


def test_unknown_task_name_is_refused(merged: Run, capsys: pytest.CaptureFixture[str]) -> None:
    config = merged.correct("wrong")
    config["tasks"] = {"a": config["tasks"]["a"], "bee": config["tasks"]["b"]}
    assert merged("correct", config) == 2
    assert "must have the model's tasks, a, b; got a, bee" in error_of(capsys)


def test_correct_refuses_an_output_before_it_begins(
    corrected: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert corrected("correct", corrected.correct("corrected")) == 2
    assert "corrected: must be empty or absent" in error_of(capsys)


def test_evaluation_is_written_and_printed_as_json(
    corrected: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--json", "--linear_probe", "--variance", "--examples", "16")
    assert corrected("evaluate", corrected.evaluate("all.json"), *options) == 0
    printed = json.loads(capsys.readouterr().out)
    evaluation = read_evaluation(corrected.root / "all.json")
    written = json.loads((corrected.root / "all.json").read_text())
    assert {key: printed[key] for key in written} == written
    assert (printed["command"], printed["warnings"]) == ("evaluate", [])
    lines = {line.model: line for line in evaluation.lines()}
    assert set(lines) == {
        "experts",
        "start",
        "linear probe on start",
        "gradient matching",
        "fitted",
    }
    assert {row.kind for row in evaluation.variances} == {"expert", "merged", "corrected"}
    assert "lit-merge evaluate --config" in evaluation.provenance["command"]
    assert yaml.safe_load(evaluation.provenance["configuration"])["linear_probe"] is True


def test_report_and_inspect_take_what_the_others_wrote(
    corrected: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    root = corrected.root
    assert corrected("evaluate", corrected.evaluate("shown.json")) == 0
    printed = capsys.readouterr().out
    assert "% of" in printed
    assert "gradient matching" in printed
    files = [str(root / name) for name in ("shown.json", "merged", "corrected")]
    output = str(root / "report.html")
    assert main(["report", *files, "--output", output, "--title", "Two tasks"]) == 0
    page = Path(output).read_text(encoding="utf-8")
    assert "<h1>Two tasks</h1>" in page
    assert "GradientMatching(" in page
    assert "What each step brings" in page
    assert f"Correction: {root / 'corrected'}" in page
    assert main(["report", *files, "--output", output]) == 2
    assert main(["report", files[0], *files, "--output", output, "--replace"]) == 2
    assert "must be the only evaluation" in error_of(capsys)
    paths = [str(root / "runs/a"), str(root / "merged"), str(root / "corrected")]
    assert main(["inspect", *paths, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["kind"] for entry in found["paths"]] == ["expert", "merged", "corrected"]
    assert "tensors" not in found["paths"][0]
    assert main(["inspect", paths[0], "--tensors", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tensors"]) > 10
    assert main(["inspect", *paths, "--tensors"]) == 0
    assert "model.head.weight" in capsys.readouterr().out


def result_of(capsys: pytest.CaptureFixture[str], command: str) -> dict[str, Any]:
    """Return the one object on the standard output, after checking what every command says."""
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["command"] == command
    assert found["seconds"] > 0
    assert isinstance(found["warnings"], list)
    return found


def test_json_of_fit_names_the_expert_the_checkpoint_and_the_last_values(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run.fit("a")
    callbacks = config["trainer"]["callbacks"]
    callbacks[0]["init_args"]["dirpath"] = str(tmp_path / "checkpoints")
    for callback in callbacks[1:]:
        callback["init_args"] = {**callback["init_args"], "output": str(tmp_path / "expert")}
    assert run("fit", config, "--json") == 0
    found = result_of(capsys, "fit")
    assert found["output"] == str(tmp_path / "expert")
    assert Path(found["checkpoint"]).is_file()
    assert found["epochs"] == 2
    assert found["metrics"]["train/loss"] > 0


def test_json_of_merge_correct_and_export(
    merged: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**merged.merge("merged"), "output": str(tmp_path / "merged")}
    assert merged("merge", config, "--plan", "--json") == 0
    (plan,) = result_of(capsys, "merge")["plans"]
    assert plan["output"] == str(tmp_path / "merged")
    assert {tensor["action"] for tensor in plan["tensors"]} == {"merge", "per-task"}
    assert merged("merge", config, "--json") == 0
    found = result_of(capsys, "merge")
    assert found["output"] == str(tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert found["traces"] == record["traces"]
    assert sum(part["tensors"] for part in found["tensors"].values()) == len(record["tensors"])
    sweep = {**config, "method": {"class_path": "TaskArithmetic"}, "output": str(tmp_path / "all")}
    assert merged("merge", sweep, "--sweep", "{scale: [0.3, 0.5]}", "--json") == 0
    found = result_of(capsys, "merge")
    assert [one["output"] for one in found["merges"]] == found["output"]
    assert len(found["output"]) == 2

    config = {**merged.correct("corrected"), "output": str(tmp_path / "corrected")}
    assert merged("correct", config, "--json") == 0
    found = result_of(capsys, "correct")
    assert (found["output"], found["steps"]) == (str(tmp_path / "corrected"), 3)
    assert found["metrics"]["train/loss"] >= 0
    arguments = ["--merged", str(tmp_path / "merged"), "--task", "a", "--json"]
    assert main(["export", *arguments, "--output", str(tmp_path / "a")]) == 0
    (export,) = result_of(capsys, "export")["exports"]
    assert (export["task"], export["output"]) == ("a", str(tmp_path / "a"))
    assert main(["inspect", str(tmp_path / "a"), "--json"]) == 0
    assert result_of(capsys, "inspect")["kind"] == "exported"


def test_json_of_curvature_has_its_quality(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**curvature(run, "json"), "output": str(tmp_path / "expert")}
    assert run("curvature", config, "--json") == 0
    found = result_of(capsys, "curvature")
    assert (found["output"], found["num_examples"]) == (str(tmp_path / "expert"), 45)
    assert found["quality"]["relative_error"] > 0


def test_loggers_have_losses_and_learning_rates(merged: Run, tmp_path: Path) -> None:
    config = {**merged.correct("logged", steps=20), "output": str(tmp_path / "corrected")}
    del config["trainer"]["logger"]
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "logs")]
    options = [*logger, "--holdout", "0.25", "--holdout_every", "10"]
    assert merged("correct", config, *options) == 0
    (file,) = (tmp_path / "logs").glob("**/metrics.csv")
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    held_out = [float(row["holdout/loss"]) for row in rows if row["holdout/loss"]]
    by_task = [key for key in rows[0] if re.fullmatch(r"holdout/.+/loss", key)]
    first = next(row for row in rows if row["holdout/loss"])
    assert len(by_task) == 2
    assert held_out[0] == pytest.approx(sum(float(first[key]) for key in by_task) / 2)
    (name,) = [key for key in rows[0] if key.startswith("lr-")]
    rates = [float(row[name]) for row in rows if row[name]]
    assert len(losses) == 4  # every 5th of 20 steps
    assert len(held_out) >= 1
    assert all(loss >= 0 for loss in (*losses, *held_out))
    assert all(rate > 0 for rate in rates)


def test_a_logger_without_its_package_is_an_error_that_names_it(
    merged: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning.fabric.loggers import tensorboard

    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(tensorboard, name, False)
    logger = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", str(tmp_path)]
    config = {**merged.correct("never"), "output": str(tmp_path / "never")}
    del config["trainer"]["logger"]
    assert merged("correct", config, *logger) == 2
    assert "pip install tensorboard" in error_of(capsys)
    config = merged.fit("base")
    del config["trainer"]["logger"]
    assert merged("fit", config, *logger) == 2
    assert "pip install tensorboard" in error_of(capsys)


def test_files_after_options_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "a.json", "--output", str(tmp_path / "r.html"), "b.json"]) == 2
    assert "Give files before the options" in error_of(capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {"x": "/none"}}, "models.x: must exist; got '/none'"),
        ({"model": {"class_path": "TimClassifier"}}, 'Did you mean "TimmClassifier"?'),
        ({"trainer": {"devcies": 2}}, "devcies"),
        ({"tasks": {"a": {"class_path": "ImageTask", "init_args": {"pth": "x"}}}}, "pth"),
        ({"modles": {"x": "y"}}, 'Did you mean "models"?'),
        ({"variances": None}, 'Did you mean "variance"?'),
    ],
)
def test_evaluate_with_a_mistake_is_one_clear_line(
    run: Run, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert run("evaluate", {**run.evaluate("wrong.json"), **changes}) == 2
    assert message in error_of(capsys)
    assert not (run.root / "wrong.json").exists()


def test_missing_data_file_is_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    config = run.fit("a")
    config["data"]["init_args"]["task"]["init_args"]["path"] = "/none.npz"
    config["trainer"] |= {"default_root_dir": str(run.root / "new"), "callbacks": None}
    assert run("fit", config) == 2
    assert "/none.npz" in error_of(capsys)


def test_fit_with_an_unknown_option_is_one_clear_line(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", run.fit("a"), "--model.learning_rate", "1") == 2
    assert "learning_rate" in error_of(capsys)
    assert run("fit", run.fit("a"), "--trainer.max_epoch", "1") == 2
    assert "max_epoch" in error_of(capsys)


def test_fit_as_one_of_two_strangers_is_refused(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("fit", run.fit("a")) == 2
    assert "must use all processes that the launcher started; got 2" in error_of(capsys)
