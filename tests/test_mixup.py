"""Mixup: the blends are those of the definition, the experts answer for them, and then leave."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.merged.mixup import Mixup, require_blendable
from lit_merge.module import MergeModule
from lit_merge.tasks import DatasetTask, MultiTaskDataModule
from tests.references import softened_divergence
from tests.tiny_fits import QUIET, tiny_trainer
from tests.tiny_merge import CLASSES, expert_net, merge_module, tiny_data, write_experts

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

OPTIONS: dict[str, Any] = {"closed_form": "none", "trainable": "all", "mixup": 0.7}
FIT: dict[str, Any] = {"max_epochs": -1, "limit_val_batches": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    write_experts(path)
    return path


def mixup(alpha: float = 1.0, seed: int = 0) -> Mixup:
    return Mixup((), alpha, seed)


def weights(module: MergeModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.network.state_dict().items()}


class FirstStep(Callback):
    """Keeps the first batch, the network before its step, and the loss."""

    loss = 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == 0:
            self.batch, self.before = batch, copy.deepcopy(module.network)

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        if index == 0:
            self.loss = float(outputs["loss"])


def test_the_loss_is_the_distance_from_the_experts_at_the_blends(
    folder: Path, tmp_path: Path
) -> None:
    module = merge_module(folder, **OPTIONS, seed=5)
    step = FirstStep()
    trainer = tiny_trainer(tmp_path, step, enable_checkpointing=False, max_steps=1, **FIT)
    trainer.fit(module, datamodule=tiny_data())
    inputs, task = step.batch.inputs.double(), step.batch.task.tolist()

    random = np.random.default_rng((5, 0, 0))
    shares = random.beta(0.7, 0.7, size=len(task))
    partners = list(range(len(task)))
    for index in range(len(CLASSES)):
        rows = [row for row, own in enumerate(task) if own == index]
        for row, other in zip(rows, random.permutation(rows), strict=True):
            partners[row] = int(other)
    losses = []
    for row, (share, partner) in enumerate(zip(shares, partners, strict=True)):
        blend = (share * inputs[row] + (1 - share) * inputs[partner])[None].float()
        name = list(CLASSES)[task[row]]
        with torch.no_grad():
            own = step.before(blend, task[row])[:, : CLASSES[name]]
            losses.append(softened_divergence(own, expert_net(name)(blend), 2.0))
    assert step.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert module.mixup is None


def test_a_blend_stays_within_its_task_and_between_its_examples() -> None:
    task = torch.tensor([0, 1, 1, 0, 2, 1])
    inputs = {"x": task[:, None] * 10.0 + torch.rand(6, 1), "y": torch.zeros(6, 2, 2)}
    blends = mixup().blend(inputs, task, step=3, rank=0)
    assert torch.equal((blends["x"][:, 0] // 10).long(), task)
    assert blends["y"].shape == (6, 2, 2)
    assert torch.equal(blends["x"][4], inputs["x"][4])  # alone
    again = mixup().blend(inputs, task, step=3, rank=0)
    assert torch.equal(again["x"], blends["x"])
    for other in ({"step": 4, "rank": 0}, {"step": 3, "rank": 1}):
        assert not torch.equal(mixup().blend(inputs, task, **other)["x"], blends["x"])


def test_blends_of_a_small_alpha_are_next_to_an_example() -> None:
    inputs, task = torch.arange(1000.0), torch.zeros(1000, dtype=torch.int64)
    for alpha, near in ((0.01, True), (1.0, False)):
        blends = mixup(alpha).blend(inputs, task, step=0, rank=0)
        distance = float((blends - blends.round()).abs().median())  # examples are whole numbers
        assert (distance < 1e-3) is near


def test_a_resumed_fit_sees_the_same_blends(folder: Path, tmp_path: Path) -> None:
    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)

    whole = merge_module(folder, **OPTIONS)
    trainer = tiny_trainer(tmp_path, keep(), max_steps=4, **FIT)
    trainer.fit(whole, datamodule=tiny_data())
    resumed = merge_module(folder, **OPTIONS)
    trainer = tiny_trainer(tmp_path, keep(), max_steps=4, **FIT)
    path = tmp_path / "step=2.ckpt"
    trainer.fit(resumed, datamodule=tiny_data(), ckpt_path=path, weights_only=True)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.distributed
def test_two_processes_learn_with_mixup(folder: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "feature_weight": 0.5, "holdout": 0.25}
    module, before = merge_module(folder, **options), merge_module(folder, **options)
    trainer = tiny_trainer(
        tmp_path, devices=2, strategy="ddp_fork", max_epochs=2, enable_checkpointing=False
    )
    trainer.fit(module, datamodule=tiny_data(batch_size=8))
    assert float(trainer.callback_metrics["holdout/loss"]) < module_loss(before, tmp_path)


def module_loss(module: MergeModule, folder: Path) -> float:
    """Return the held-out loss of a module as it is."""
    found = []

    class Measure(Callback):
        def on_train_start(self, trainer: Any, own: Any) -> None:
            found.append(own.best.loss)

    options = {"max_steps": 1, "enable_checkpointing": False, **FIT}
    tiny_trainer(folder, Measure(), **options).fit(module, datamodule=tiny_data())
    return float(found[0])


@pytest.mark.parametrize(
    "inputs",
    [torch.ones(2, 3, dtype=torch.int64), {"x": torch.ones(2), "ids": torch.ones(2).int()}],
)
def test_tokens_cannot_be_blended(inputs: Any) -> None:
    with pytest.raises(InputError, match=r"mixup: must meet inputs of floating.*got torch.int"):
        require_blendable(inputs)


def test_tokens_are_refused_before_anything_is_solved(folder: Path, tmp_path: Path) -> None:
    tokens = [(torch.arange(6), -100)] * 12
    tasks = {n: DatasetTask(tokens, num_classes=c, unlabelled=True) for n, c in CLASSES.items()}
    module = merge_module(folder, mixup=1.0)
    trainer = tiny_trainer(tmp_path, enable_checkpointing=False, max_steps=1, **FIT)
    with pytest.raises(InputError, match=r"mixup: must meet inputs of floating-point"):
        trainer.fit(module, datamodule=MultiTaskDataModule(dict(tasks), batch_size=4))
    assert not bool(module.calibrated)
