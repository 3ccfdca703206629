"""What timm writes is read, and what we write is loaded by timm."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

import lit_merge
from lit_merge.checkpoint import open_checkpoint

NAME = "test_efficientnet"
SETTINGS = {"num_classes": 5, "in_chans": 1}


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made: nn.Module = timm.create_model(NAME, pretrained=False, **SETTINGS)
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return made.eval()


def folder_of(path: Path, seed: int, safe: bool | Literal["both"] = True) -> Path:
    save_for_hf(model(seed), str(path), safe_serialization=safe)
    return path


def mean(seeds: list[int]) -> dict[str, Tensor]:
    states = [model(seed).state_dict() for seed in seeds]
    return {
        name: torch.stack([s[name].double() for s in states]).mean(0).to(value.dtype)
        for name, value in states[0].items()
    }


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_the_hub_is_read(tmp_path: Path, safe: bool) -> None:
    with open_checkpoint(folder_of(tmp_path / "x", 0, safe)) as opened:
        assert opened.source == "huggingface"
        for name, value in model(0).state_dict().items():
            assert torch.equal(opened.tensor(name), value)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timm")
    experts = {f"t{i}": folder_of(folder / f"t{i}", i) for i in (1, 2)}
    base = folder_of(folder / "base", 0)
    lit_merge.merge(
        base,
        experts,
        method=lit_merge.Average(),
        output=folder / "merged",
        policy=lit_merge.ParametersPolicy(heads="merge"),
        progress=False,
    )
    return folder / "merged"


X = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(3))


def reference() -> Tensor:
    made: nn.Module = timm.create_model(NAME, pretrained=False, **SETTINGS)
    made.load_state_dict(mean([1, 2]))
    found: Tensor = made.eval()(X)
    return found


def test_timm_loads_the_merged_folder(merged: Path) -> None:
    made = timm.create_model(f"local-dir:{merged}", pretrained=True)
    torch.testing.assert_close(made.eval()(X), reference(), rtol=1e-4, atol=1e-5)
    assert made.num_classes == 5


def test_timm_loads_the_merged_file_into_a_named_model(merged: Path) -> None:
    made = timm.create_model(
        NAME,
        pretrained=True,
        pretrained_cfg_overlay={
            "file": str(merged / "model.safetensors"),
            "num_classes": 5,
            "input_size": (1, 32, 32),
        },
        **SETTINGS,
    )
    torch.testing.assert_close(made.eval()(X), reference(), rtol=1e-4, atol=1e-5)


def training_file(path: Path, **states: Any) -> Path:
    """Write what timm's training script does."""
    content = {"epoch": 3, "arch": NAME, "args": argparse.Namespace(lr=0.1), "version": 2, **states}
    torch.save({**content, "optimizer": {"state": {0: {"m": torch.ones(3)}}}}, path)
    return path


def test_a_training_file_is_read_as_timm_reads_it(tmp_path: Path) -> None:
    raw, average = model(1).state_dict(), model(2).state_dict()
    path = training_file(tmp_path / "last.pth.tar", state_dict=raw, state_dict_ema=average)
    for weights, ema in (("averaged", True), ("raw", False)):
        own = timm.models.load_state_dict(str(path), use_ema=ema, weights_only=False)
        with open_checkpoint(path, weights=weights) as opened:  # type: ignore[arg-type]
            assert set(opened) == set(own)
            assert all(torch.equal(opened.tensor(name), own[name]) for name in own)


def test_a_merge_says_that_it_took_the_average(tmp_path: Path) -> None:
    raw, average = model(1).state_dict(), model(2).state_dict()
    path = training_file(tmp_path / "last.pth", state_dict=raw, state_dict_ema=average)
    result = lit_merge.merge(
        None,
        {"a": path, "b": training_file(tmp_path / "other.pth", state_dict=raw)},
        method=lit_merge.Average(),
        output=tmp_path / "merged",
        progress=False,
    )
    assert any("holds averaged and raw weights: took averaged" in note for note in result.notes)
