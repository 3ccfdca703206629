"""Tiny Lightning modules, data and Trainers: fits of a fraction of a second."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lit_merge.callbacks import DiagonalHessian
from lit_merge.checkpoint import load_into
from lit_merge.expert import open_expert
from tests.references import squared_gradients_by_loop

NUM_EXAMPLES = 61
"""Odd, prime, and no multiple of anything that tests divide it by."""

MICRO = [range(i, min(i + 8, NUM_EXAMPLES)) for i in range(0, NUM_EXAMPLES, 8)]
"""The examples of the micro-batches of an epoch in order: seven of eight, one of five."""

QUIET = [
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:.*does not have many workers",
    "ignore:Starting from v1.9.0, `tensorboardX` has been removed",
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
    "ignore:.*use of fork.. may lead to deadlocks",
]
"""What Lightning warns about in tiny fits, for ``pytestmark``."""


class TinyClassifier(pl.LightningModule):
    """Two linear layers in ``model``, the second of them the head; the optimizer is Adam."""

    def __init__(self, lr: float = 0.05, **options: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.options = options
        self.model = nn.Sequential()
        self.model.add_module("body", nn.Linear(4, 6))
        self.model.add_module("gelu", nn.GELU())
        self.model.add_module("head", nn.Linear(6, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = cross_entropy(self(inputs), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr, **self.options)


def examples(size: int = NUM_EXAMPLES, *, seed: int = 0) -> TensorDataset:
    """Return points of three overlapping clouds and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % 3
    centres = torch.eye(3, 4)
    inputs = centres[labels] + 0.6 * torch.randn(size, 4, generator=generator)
    return TensorDataset(inputs, labels)


def loader(size: int = NUM_EXAMPLES, *, batch_size: int = 8, **settings: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    options = {"shuffle": True, "generator": generator, **settings}
    return DataLoader(examples(size), batch_size=batch_size, **options)


def tiny_classifier(seed: int = 0, **options: Any) -> TinyClassifier:
    torch.manual_seed(seed)
    return TinyClassifier(**options)


def tiny_trainer(folder: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    """Return a Trainer on one CPU that prints and logs nothing; checkpoints go to ``folder``."""
    if settings.get("enable_checkpointing", True) and not any(
        isinstance(callback, ModelCheckpoint) for callback in callbacks
    ):
        callbacks = (*callbacks, ModelCheckpoint(dirpath=folder))
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**{**defaults, **settings})


def fit(
    folder: Path,
    callback: pl.Callback,
    *others: pl.Callback,
    module: TinyClassifier | None = None,
    data: Any = None,
    **settings: Any,
) -> TinyClassifier:
    module = module or tiny_classifier()
    tiny_trainer(folder, callback, *others, **settings).fit(module, data or loader())
    return module


def hessian_in(folder: Path) -> dict[str, Tensor]:
    expert = open_expert(folder)
    assert expert.hessian is not None
    return {name: expert.hessian.tensor(name).clone() for name in expert.hessian}


def by_loop(module: nn.Module, indices: Any = range(NUM_EXAMPLES)) -> dict[str, Tensor]:
    """Return the sum of squared gradients with observed labels, in float64, one by one."""
    detached = tiny_classifier()  # without the Trainer
    load_into(detached, module.state_dict())
    return squared_gradients_by_loop(detached, [examples()[list(indices)]], cross_entropy_of)


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=tolerance, atol=tolerance * 1e-3
        )


def cross_entropy_of(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean loss of a tiny classifier."""
    return cross_entropy(model(batch[0]), batch[1])


class Still(TinyClassifier):
    """Makes steps of length zero, so that the gradients at its weights stay the same."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0, **self.options)


def still(**options: Any) -> Still:
    torch.manual_seed(0)
    return Still(**options)


class StatefulBatches:
    """Batches in order that a resumed fit goes on with where it stopped."""

    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return len(MICRO)

    def __iter__(self) -> Iterator[Any]:
        self.next %= len(MICRO)  # an epoch ends without asking for more than its length
        while self.next < len(MICRO):
            self.next += 1
            yield examples()[list(MICRO[self.next - 1])]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def squared(**settings: Any) -> DiagonalHessian:
    return DiagonalHessian(estimator="squared-batch-gradient", **settings)


def in_order(**settings: Any) -> DataLoader[Any]:
    return loader(shuffle=False, **settings)
