"""What cannot be measured is refused with a message that says what to do; nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, TensorDataset

from lit_merge.callbacks import DiagonalHessian
from lit_merge.checkpoint_curvature import curvature_of_checkpoint
from lit_merge.errors import InputError
from tests.tiny_fits import (
    NUM_EXAMPLES,
    QUIET,
    TinyClassifier,
    assert_same,
    examples,
    fit,
    hessian_in,
    loader,
    tiny_classifier,
    tiny_trainer,
)

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

TWO = {"devices": 2, "strategy": "ddp_fork"}


class WithData(TinyClassifier):
    def train_dataloader(self) -> Any:
        return loader()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    saving = ModelCheckpoint(dirpath=folder, filename="tiny")
    tiny_trainer(folder, saving).fit(tiny_classifier(), loader())
    return folder / "tiny.ckpt"


def measure(folder: Path, checkpoint: Path, module: Any, **settings: Any) -> Path:
    trainer = settings.pop("trainer", {})
    settings = {"output": folder / "expert", "labels": "observed", **settings}
    return curvature_of_checkpoint(
        tiny_trainer(folder, **trainer), module, checkpoint=checkpoint, **settings
    )


def refused(folder: Path, checkpoint: Path, module: Any, message: str, **settings: Any) -> None:
    """Require an error of a pass, after which there is no trace of it."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=message):
        measure(folder, checkpoint, module, **settings)
    assert sorted(folder.rglob("*")) == before


class Contrastive(WithData):
    """Every example is compared with all others of its batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features = normalize(self(batch[0]), dim=-1)
        return cross_entropy(features @ features.T / 0.1, torch.arange(len(features)))


def test_a_contrastive_loss_is_refused(tmp_path, run) -> None:
    message = r"loss: must be the mean over the examples.*contrastive"
    refused(tmp_path, run, Contrastive(), message)
    with pytest.raises(InputError, match=message):
        fit(tmp_path, DiagonalHessian(labels="observed"), module=Contrastive())


class SelfTraining(WithData):
    """Has a BatchNorm, and puts itself into train mode in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.train()
        return cross_entropy(self(self.norm(batch[0])), batch[1])


@pytest.mark.parametrize("max_examples", [None, 1])
def test_batch_statistics_by_a_step_that_calls_train_are_refused(
    tmp_path, max_examples: int | None
) -> None:
    """Also with one example, of which there are no statistics."""
    saving = ModelCheckpoint(dirpath=tmp_path, filename="norm")
    tiny_trainer(tmp_path, saving, max_epochs=1).fit(SelfTraining())
    message = (
        r"training_step: must leave the model in the mode.*got 'norm' \(BatchNorm1d\) put into"
    )
    refused(tmp_path, tmp_path / "norm.ckpt", SelfTraining(), message, max_examples=max_examples)


def test_batch_norm_itself_is_measured_in_eval_mode(tmp_path) -> None:
    class Norm(SelfTraining):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self(self.norm(batch[0])), batch[1])

    saving = ModelCheckpoint(dirpath=tmp_path, filename="norm")
    tiny_trainer(tmp_path, saving, max_epochs=1).fit(Norm())
    folder = measure(tmp_path, tmp_path / "norm.ckpt", Norm())
    assert {"norm.weight", "norm.bias"} < set(hessian_in(folder))


class Broken(WithData):
    """Example 37 makes the loss NaN."""

    def train_dataloader(self) -> Any:
        data = loader()
        data.dataset.tensors[0][37] = float("nan")
        return data


def test_the_example_that_makes_the_loss_nan_is_named(tmp_path, run) -> None:
    refused(
        tmp_path,
        run,
        Broken(),
        r"loss: must be finite; got nan .* Of the data set, it is example 37 by itself",
    )


def test_what_was_saved_before_a_nan_can_be_gone_on_with(tmp_path, run) -> None:
    with pytest.raises(InputError, match=r"example 37 by itself"):
        measure(tmp_path, run, Broken(), batch_size=2, save_every=0.0)
    assert not (tmp_path / "expert").exists()
    assert (tmp_path / "expert.partial" / "rank-0.safetensors").exists()
    whole = measure(tmp_path, run, WithData(), output=tmp_path / "whole")
    resumed = measure(tmp_path, run, WithData(), batch_size=2)
    assert_same(hessian_in(resumed), hessian_in(whole))


@pytest.mark.distributed
def test_the_rank_of_a_nan_is_named(tmp_path, run) -> None:
    with pytest.raises(Exception, match=r"on rank [01], it is example 37 by itself"):
        measure(tmp_path, run, Broken(), trainer=TWO)
    assert not (tmp_path / "expert").exists()


def test_a_module_without_trained_parameters_is_refused(tmp_path, run) -> None:
    module = WithData()
    module.requires_grad_(False)
    refused(tmp_path, run, module, r"WithData: must have trainable parameters; got none")


def test_a_loss_of_no_parameter_is_refused(tmp_path, run) -> None:
    class Detached(WithData):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self(batch[0]).detach(), batch[1])

    refused(tmp_path, run, Detached(), r"loss: must depend on the trainable parameters")


class Unlabelled(WithData):
    """Yields inputs and nothing else."""

    def train_dataloader(self) -> Any:
        inputs = TensorDataset(examples().tensors[0])
        return DataLoader(inputs, batch_size=8, collate_fn=self.collate)

    @staticmethod
    def collate(parts: list[Any]) -> dict[str, Tensor]:
        return {"x": torch.stack([part[0] for part in parts])}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch["x"]), batch["labels"])


class WithoutTarget(Unlabelled):
    def curvature_loss(self, batch: Any) -> Tensor:
        return cross_entropy(self(batch["x"]), batch.get("labels"))


@pytest.mark.parametrize("labels", ["sampled", "observed"])
def test_a_step_that_needs_labels_says_so(tmp_path, run, labels: Any) -> None:
    message = r"Unlabelled\.training_step: must find labels in the batch; got KeyError: 'labels'"
    refused(tmp_path, run, Unlabelled(), message, labels=labels)


def test_observed_labels_that_are_none_are_refused_with_the_fix(tmp_path, run) -> None:
    message = r'curvature_loss: must find labels in the batch.*use labels="sampled"'
    refused(tmp_path, run, WithoutTarget(), message, labels="observed")


def test_sampled_labels_need_none(tmp_path, run) -> None:
    without = measure(tmp_path, run, WithoutTarget(), labels="sampled", output=tmp_path / "a")
    labelled = measure(tmp_path, run, WithData(), labels="sampled", output=tmp_path / "b")
    assert_same(hessian_in(without), hessian_in(labelled))


def test_a_model_of_transformers_without_labels_says_so(tmp_path, run) -> None:
    class LossOfNone(Unlabelled):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    refused(tmp_path, run, LossOfNone(), r"got NoneType\. Models of transformers return none for")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ("length", rf"same examples on every rank; got {NUM_EXAMPLES} of them on rank 0 and 60"),
        ("order", r"same examples in the same order on every rank; got other first examples"),
    ],
)
def test_data_that_differ_between_ranks_are_refused(
    tmp_path, run, difference: str, message: str
) -> None:
    class Differing(WithData):
        def train_dataloader(self) -> Any:
            rank = self.trainer.global_rank
            if difference == "length":
                return loader(NUM_EXAMPLES - rank)
            data = loader()
            order = torch.randperm(NUM_EXAMPLES, generator=torch.Generator().manual_seed(rank))
            data.dataset.tensors = tuple(tensor[order] for tensor in data.dataset.tensors)
            return data

    with pytest.raises(Exception, match=message):
        measure(tmp_path, run, Differing(), trainer=TWO)
    assert not (tmp_path / "expert").exists()
