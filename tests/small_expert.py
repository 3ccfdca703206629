"""A small expert with everything in its folder: head, BatchNorm, Hessian, activations."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lit_merge.expert import ExpertInfo, write_expert


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)


def weights() -> dict[str, Tensor]:
    return Classifier().state_dict()


def hessian() -> dict[str, Tensor]:
    return {name: p.detach() ** 2 for name, p in Classifier().named_parameters()}


def activations() -> dict[str, Tensor]:
    return {
        "body.0.count": torch.tensor(9),
        "body.0.mean": torch.arange(4.0),
        "body.0.m2": torch.ones(4),
    }


INFO = ExpertInfo(
    task="svhn",
    estimator="PerExampleFisher",
    labels="sampled",
    num_examples=60,
    head_parameters=("head.weight", "head.bias"),
    frozen_parameters=("body.0.bias",),
    details={"seed": 0, "module": "Classifier"},
)


def written(path: Path) -> Path:
    return write_expert(
        path, weights=weights(), info=INFO, hessian=hessian(), activations=activations()
    )
