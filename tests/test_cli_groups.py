"""``groups`` in a merge and in a correction: experts of different bases in one command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_merge.cli import main
from lit_merge.correction import find_sites
from lit_merge.expert import ExpertInfo, write_expert
from lit_merge.tasks import DatasetTask
from tests.tiny_merge import CLASSES, HEAD, SIZES, base_net, examples, expert_net

ORDER = torch.randperm(12, generator=torch.Generator().manual_seed(0))
AVERAGE = {"class_path": "Average"}


class TinyTask(DatasetTask):
    """A task of tiny_merge by its name, as YAML can say it."""

    def __init__(self, name: str) -> None:
        super().__init__(examples(name, SIZES[name], 0), num_classes=CLASSES[name])


class ResidualNet(nn.Module):
    """Two residual blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(12, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(inputs)))


class Block(nn.Module):
    """Adds a hidden layer to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.down(self.up(inputs).relu())


def reordered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return TinyNet's weights with its hidden units in another order."""
    other = dict(state)
    for name in ("body.0.weight", "body.0.bias"):
        other[name] = state[name][ORDER]
    other["body.2.weight"] = state["body.2.weight"][:, ORDER]
    return other


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with experts of one base, and the second group's in another order."""
    info = ExpertInfo(head_parameters=HEAD)
    base, svhn, dtd = (n.state_dict() for n in (base_net(), expert_net("svhn"), expert_net("dtd")))
    states = {"a": base, "svhn": svhn, "dtd": dtd, "b": reordered(base), "dtd-b": reordered(dtd)}
    for name, weights in states.items():
        write_expert(tmp_path / name, weights=weights, info=info)
    return tmp_path


def groups(root: Path) -> dict[str, Any]:
    return {
        "first": {"base": str(root / "a"), "experts": {"svhn": str(root / "svhn")}},
        "second": {"base": str(root / "b"), "experts": {"dtd": str(root / "dtd-b")}},
    }


def one_base(root: Path) -> dict[str, Any]:
    """Return what the groups are but for their order."""
    experts = {task: str(root / task) for task in CLASSES}
    return {"base": str(root / "a"), "experts": experts}


def tasks() -> dict[str, Any]:
    return {
        name: {"class_path": "tests.test_cli_groups.TinyTask", "init_args": {"name": name}}
        for name in CLASSES
    }


def run(root: Path, command: str, content: dict[str, Any], *options: str) -> int:
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump({"output": str(root / "out"), **content}, sort_keys=False))
    return main([command, "--config", str(path), *options])


def merge(root: Path, **content: Any) -> dict[str, Any]:
    model = {"class_path": "tests.tiny_merge.TinyNet"}
    start = {"model": model, "tasks": tasks(), "groups": groups(root), "method": AVERAGE}
    return {**start, **content}


def correct(root: Path, **content: Any) -> dict[str, Any]:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    return {
        "model": {"class_path": "tests.tiny_merge.TinyNet"},
        "tasks": tasks(),
        "method": AVERAGE,
        "least_squares": {},
        "calibration_examples": 32,
        "trainer": {**quiet, "max_steps": 0, "default_root_dir": str(root)},
        **content,
    }


def assert_equal_models(one: Path, other: Path, tolerance: float = 1e-6) -> None:
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    for file in files:
        left, right = load_file(one / file), load_file(other / file)
        assert left.keys() == right.keys()
        for name, value in left.items():
            torch.testing.assert_close(value, right[name], atol=tolerance, rtol=tolerance)


def test_groups_are_merged_as_experts_of_one_base(root: Path) -> None:
    assert run(root, "merge", merge(root)) == 0
    assert run(root, "merge", {**one_base(root), "method": AVERAGE, "output": f"{root}/one"}) == 0
    assert_equal_models(root / "out", root / "one")
    record = json.loads((root / "out-aligned" / "align.json").read_text())
    assert record["settings"]["by"] == "activations"
    assert record["settings"]["tasks"] == list(CLASSES)


def test_align_takes_the_options_of_an_alignment(root: Path) -> None:
    model = {"class_path": "tests.tiny_merge.TinyNet"}
    align = {"by": "weights", "input_shape": [6], "cycle_consistent": True}
    content = merge(root, model=model, tasks=None, align=align, aligned=f"{root}/kept")
    assert run(root, "merge", content) == 0
    settings = json.loads((root / "kept" / "align.json").read_text())["settings"]
    assert (settings["by"], settings["cycle_consistent"]) == ("weights", True)
    assert not (root / "out-aligned").exists()


def test_without_alignment_experts_stay_in_their_order(root: Path) -> None:
    assert run(root, "merge", merge(root, align=False, tasks=None)) == 0
    merged = load_file(root / "out" / "model.safetensors")
    one, other = (load_file(root / name / "model.safetensors") for name in ("svhn", "dtd-b"))
    torch.testing.assert_close(
        merged["body.0.weight"], (one["body.0.weight"] + other["body.0.weight"]) / 2
    )


def test_a_sweep_is_of_the_aligned_experts(root: Path) -> None:
    method = {"class_path": "TaskArithmetic", "init_args": {"scale": 1.0}}
    assert run(root, "merge", merge(root, method=method, sweep={"scale": [0.2, 0.5]})) == 0
    assert sorted(path.name for path in (root / "out").iterdir()) == ["scale=0.2", "scale=0.5"]


def test_one_command_corrects_groups_as_experts_of_one_base(root: Path) -> None:
    assert run(root, "correct", correct(root, groups=groups(root))) == 0
    content = correct(root, **one_base(root), output=f"{root}/one")
    assert run(root, "correct", content) == 0
    assert_equal_models(root / "out", root / "one", tolerance=1e-3)


def test_the_aligned_experts_teach_a_fit(root: Path) -> None:
    content = correct(root, groups=groups(root), align={"by": "both"})
    assert run(root, "correct", content, "--trainer.max_steps", "3") == 0
    assert (root / "out").is_dir()
    assert run(root, "correct", content, "--trainer.max_steps", "3", "--replace") == 0


def test_sites_that_only_a_run_shows_are_found(root: Path) -> None:
    torch.manual_seed(0)
    net = ResidualNet()
    for name in ("res", "res-a", "res-b"):
        write_expert(root / name, weights=net.state_dict(), info=ExpertInfo())
    experts = {"svhn": str(root / "res-a"), "dtd": str(root / "res-b")}
    data = {
        name: {"class_path": "tests.test_cli_groups.FourClasses", "init_args": {"seed": seed}}
        for seed, name in enumerate(experts)
    }
    content = correct(root, base=str(root / "res"), experts=experts, tasks=data, sites="block")
    content["model"] = {"class_path": "tests.test_cli_groups.ResidualNet"}
    assert run(root, "correct", content) == 0
    sites = find_sites(net, where="block", exclude=("head",), example_inputs=torch.randn(2, 6))
    tensors = load_file(root / "out" / "corrections.safetensors")
    for site in sites:
        assert any(site.name.replace(".", "/") in n or site.name in n for n in tensors), tensors
    assert {site.name for site in sites} == {"blocks.0", "blocks.1"}


class FourClasses(DatasetTask):
    """Random points of four classes."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(40, 6, generator=generator)
        super().__init__([(point, i % 4) for i, point in enumerate(points)], num_classes=4)


@pytest.mark.parametrize(
    ("command", "changes", "options", "message"),
    [
        ("merge", {"base": "x"}, (), "base: must be left out where groups are given; got 'x'"),
        ("merge", {"experts": {"a": "x"}}, (), "experts: must be left out where groups are given"),
        ("merge", {}, ("--plan",), "plan: must be left out where groups are given"),
        ("merge", {"model": None}, (), "model: must be given with groups"),
        ("merge", {"groups": None}, (), "experts: must be given, or groups of them by base"),
        (
            "merge",
            {"groups": None, "experts": {"a": "x"}},
            (),
            "model: must be left out without groups",
        ),
        ("merge", {"align": {"by": "x"}}, (), "x"),
        ("merge", {"align": {"batch_size": 1}}, (), "batch_size: must be at least 2; got 1"),
        ("merge", {"output": "s3://bucket/out"}, (), "aligned: must be given where the output is"),
        ("correct", {"merged": "x"}, (), "merged: must be left out where groups are given"),
        ("correct", {"experts": {"a": "x"}}, (), "experts: must be left out where groups"),
        ("correct", {"groups": None}, (), "merged: must be given, or experts, or groups"),
        (
            "correct",
            {"groups": None, "experts": {"a": "x"}, "aligned": "y"},
            (),
            "aligned: must be left out without groups; got 'y'",
        ),
        ("correct", {}, ("--correction", "no_such.Thing"), "no_such: must be a module that can"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    changes: dict[str, Any],
    options: tuple[str, ...],
    message: str,
) -> None:
    content = merge(root) if command == "merge" else correct(root, groups=groups(root))
    assert run(root, command, {**content, **changes}, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (root / "out-aligned").exists()


@pytest.mark.parametrize("command", ["merge", "correct"])
def test_an_aligned_folder_is_not_overwritten(
    root: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (root / "out-aligned").mkdir()
    (root / "out-aligned" / "precious").touch()
    content = merge(root) if command == "merge" else correct(root, groups=groups(root))
    assert run(root, command, content) == 2
    assert "must be empty or absent" in capsys.readouterr().err
    assert run(root, command, content, "--replace") == 0
    assert not (root / "out-aligned" / "precious").exists()


@pytest.mark.parametrize("command", ["merge", "correct"])
def test_several_processes_are_told_to_align_first(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    content = merge(root) if command == "merge" else correct(root, groups=groups(root))
    assert run(root, command, content) == 2
    assert 'Run "lit-merge align" first' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_that_lightning_starts_find_the_aligned_folder(root: Path) -> None:
    content = correct(root, groups=groups(root), output=str(root / "out"))
    content["trainer"] |= {"devices": 2, "strategy": "ddp", "max_steps": 2}
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    command = [sys.executable, "-m", "lit_merge", "correct", "--config", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Aligned second with first") == 1
    assert (root / "out" / "model.safetensors").is_file()
