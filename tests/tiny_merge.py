"""Tiny experts of two tasks with heads of different width, and their data."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lit_merge.expert import ExpertInfo, write_expert
from lit_merge.methods import TaskArithmetic
from lit_merge.module import MergeModule
from lit_merge.tasks import DatasetTask, MultiTaskDataModule

CLASSES = {"svhn": 5, "dtd": 3}
SIZES = {"svhn": 61, "dtd": 37}
TEST_SIZES = {"svhn": 29, "dtd": 17}
HEAD = ("head.weight", "head.bias")


class TinyNet(nn.Module):
    """Two hidden layers and a head."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 12), nn.GELU())
        self.head = nn.Linear(12, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))


def base_net(seed: int = 0) -> TinyNet:
    torch.manual_seed(seed)
    return TinyNet()


def expert_net(task: str) -> TinyNet:
    """Return the base with much noise on its weights, and a head for the task's classes."""
    net = copy.deepcopy(base_net())
    torch.manual_seed(sum(map(ord, task)))
    with torch.no_grad():
        for parameter in net.body.parameters():
            parameter += 0.4 * torch.randn_like(parameter)
    net.head = nn.Linear(12, CLASSES[task])
    with torch.no_grad():
        net.head.weight.mul_(4)
    return net.eval()


def examples(task: str, size: int, seed: int) -> TensorDataset:
    """Return random points, with the expert's own answers as labels in four of five cases."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 6, generator=generator)
    with torch.no_grad():
        labels = expert_net(task)(inputs).argmax(-1)
    labels[::5] = 0
    return TensorDataset(inputs, labels)


def tiny_tasks(**options: Any) -> dict[str, DatasetTask]:
    return {
        task: DatasetTask(
            examples(task, size, 0),
            examples(task, 23, 1),
            examples(task, TEST_SIZES[task], 2),
            num_classes=CLASSES[task],
            **options,
        )
        for task, size in SIZES.items()
    }


def tiny_data(**options: Any) -> MultiTaskDataModule:
    return MultiTaskDataModule(dict(tiny_tasks()), **{"batch_size": 16} | options)


def write_experts(folder: Path) -> dict[str, str]:
    """Write the base and the experts; return the experts' paths by task."""
    write_expert(
        folder / "base", weights=base_net().state_dict(), info=ExpertInfo(head_parameters=HEAD)
    )
    paths = {}
    for task in CLASSES:
        net = expert_net(task)
        # As a LightningModule saves it: everything under "model.".
        weights = {f"model.{name}": value for name, value in net.state_dict().items()}
        info = ExpertInfo(task=task, head_parameters=tuple(f"model.{name}" for name in HEAD))
        write_expert(folder / task, weights=weights, info=info)
        paths[task] = str(folder / task)
    return paths


def merge_module(folder: Path, **options: Any) -> MergeModule:
    """Return a module over the experts that :func:`write_experts` wrote into a folder."""
    experts = {task: str(folder / task) for task in CLASSES}
    settings = {"experts": experts, "base": str(folder / "base"), "method": TaskArithmetic(0.5)}
    return MergeModule(base_net(), **settings | options)
