"""Tiny fits that are steps of a timeline, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_merge.callbacks import TemporalMerging
from lit_merge.expert import open_expert
from lit_merge.parameters import ParametersPolicy
from tests.tiny_fits import fit, tiny_classifier

SHARED = ParametersPolicy(heads="merge")
BODY = ("model.body.weight", "model.body.bias")


class Start(pl.Callback):
    """Remembers the weights that training begins with."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = {name: v.detach().clone() for name, v in pl_module.state_dict().items()}


def step(
    folder: Path, task: str, *others: pl.Callback, seed: int = 0, module: Any = None, **rules: Any
) -> dict[str, Tensor]:
    """Add a step to a timeline; return the weights that it began with."""
    start = Start()
    settings = {name: rules.pop(name) for name in list(rules) if name.startswith("max_")}
    temporal = TemporalMerging(str(folder), task=task, **rules)
    settings = {"max_epochs": 1, "enable_checkpointing": False, **settings}
    fit(folder.parent, temporal, *others, start, module=module or tiny_classifier(seed), **settings)
    return start.weights


def weights(folder: Path) -> dict[str, Tensor]:
    expert = open_expert(folder)
    return {name: expert.weights.tensor(name).clone() for name in expert.weights}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **tolerance)


def record(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "timeline.json").read_text())
    assert isinstance(content, dict)
    return content
