"""``lit-merge align`` from a YAML file, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lit_merge.cli import main
from lit_merge.expert import ExpertInfo, write_expert
from tests.tiny_merge import HEAD, base_net


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return a configuration of two groups of the same net in different orders."""
    state = base_net().state_dict()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    other = dict(state)
    for name in ("body.0.weight", "body.0.bias"):
        other[name] = state[name][order]
    other["body.2.weight"] = state["body.2.weight"][:, order]
    info = ExpertInfo(head_parameters=HEAD)
    for name, weights in {"a": state, "svhn": state, "b": other, "dtd": other}.items():
        write_expert(tmp_path / name, weights=weights, info=info)
    content = {
        "model": {"class_path": "tests.tiny_merge.TinyNet"},
        "groups": {
            "first": {"base": str(tmp_path / "a"), "experts": {"svhn": str(tmp_path / "svhn")}},
            "second": {"base": str(tmp_path / "b"), "experts": {"dtd": str(tmp_path / "dtd")}},
        },
        "input_shape": [6],
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "align.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_experts_are_aligned_and_a_table_is_printed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["align", "--config", str(config)]) == 0
    dtd, svhn = (load_file(tmp_path / "out" / t / "model.safetensors") for t in ("dtd", "svhn"))
    assert all(torch.equal(dtd[name], svhn[name]) for name in svhn)
    printed = capsys.readouterr().out
    assert f"Aligned second with first by weights into {tmp_path / 'out'}" in printed
    row = next(line for line in printed.splitlines() if "body.0.weight[0]" in line)
    moved = json.loads((tmp_path / "out" / "align.json").read_text())["symmetries"][0]["moved"]
    assert row.split()[1:3] == ["12", str(moved["second"])]
    assert row.split()[-1] == "1.000"
    assert "Objective" in printed


def test_options_go_before_the_file(config: Path, tmp_path: Path) -> None:
    options = ("--cycle_consistent", "--output", str(tmp_path / "other"))
    assert main(["align", "--config", str(config), *options]) == 0
    settings = json.loads((tmp_path / "other" / "align.json").read_text())["settings"]
    assert settings["cycle_consistent"]


def test_an_existing_output_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["align", "--config", str(config)]) == 0
    assert main(["align", "--config", str(config)]) == 2
    assert "must be empty or absent" in capsys.readouterr().err
    assert main(["align", "--config", str(config), "--replace"]) == 0


def test_a_group_without_a_base_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(config.read_text())
    del content["groups"]["second"]["base"]
    config.write_text(yaml.safe_dump(content))
    assert main(["align", "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert "groups" in error
    assert "Traceback" not in error
