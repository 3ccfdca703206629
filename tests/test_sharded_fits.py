from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lit_merge.callbacks import DiagonalHessian
from lit_merge.expert import open_expert
from tests.sharded_fits import SIZES, ShardedClassifier, in_torchrun, sharded_trainer
from tests.tiny_fits import (
    QUIET,
    assert_same,
    examples,
    hessian_in,
    tiny_classifier,
    tiny_trainer,
)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*returned a view tensor"),
    *(pytest.mark.filterwarnings(line) for line in QUIET),
]


def in_order(batch_size: int) -> DataLoader[Any]:
    """Return 48 examples in their order: every step of all ranks is over 16 in a row."""
    data = TensorDataset(*(tensor[:48] for tensor in examples().tensors))
    return DataLoader(data, batch_size=batch_size)


def _fit(folder: Path, layout: str, estimator: str, rank: int) -> None:
    torch.manual_seed(0)
    trainer = sharded_trainer(
        folder, layout, DiagonalHessian(estimator=estimator), overfit_batches=1.0
    )
    trainer.fit(ShardedClassifier(), in_order(16 // SIZES[layout][0]))


@pytest.mark.parametrize("estimator", ["squared-batch-gradient", "adam"])
@pytest.mark.parametrize("layout", ["fsdp", "tensor", pytest.param("both", marks=pytest.mark.slow)])
def test_steps_of_a_sharded_fit_count_what_one_process_counts(
    tmp_path, layout: str, estimator: str
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    trainer = tiny_trainer(alone, DiagonalHessian(estimator=estimator), overfit_batches=1.0)
    trainer.fit(tiny_classifier(), in_order(16))
    found = in_torchrun(partial(_fit, shared, layout, estimator), layout=layout, folder=tmp_path)
    assert found == [None] * len(found)
    assert_same(hessian_in(shared), hessian_in(alone), tolerance=1e-5)
    one, other = (open_expert(folder) for folder in (alone, shared))
    for name in one.weights:
        torch.testing.assert_close(one.weights.tensor(name), other.weights.tensor(name))
    assert one.info.details["curvature"] == other.info.details["curvature"]
    assert one.info.head_parameters == other.info.head_parameters
    assert one.info.base_fingerprint == other.info.base_fingerprint


def _resume(folder: Path, layout: str, rank: int) -> int:
    """Fit in one go, and in two parts of which the second loads a checkpoint of one per rank."""

    def fit(part: str, seed: int, **settings: Any) -> None:
        torch.manual_seed(seed)
        saving = ModelCheckpoint(dirpath=folder / part, every_n_train_steps=3, save_top_k=-1)
        callbacks = (DiagonalHessian(estimator="squared-batch-gradient"), saving)
        ckpt_path = settings.pop("ckpt_path", None)
        trainer = sharded_trainer(
            folder / part, layout, *callbacks, overfit_batches=1.0, **settings
        )
        trainer.fit(ShardedClassifier(), in_order(16 // SIZES[layout][0]), ckpt_path=ckpt_path)

    fit("whole", 0)
    fit("parts", 0, max_epochs=1)
    kept = folder / "parts" / "epoch=0-step=3.ckpt"
    assert kept.is_dir()
    fit("parts", 7, max_epochs=2, ckpt_path=kept)
    return len(list((folder / "parts").glob("squared-*.safetensors")))


@pytest.mark.parametrize("layout", ["fsdp", "tensor"])
def test_a_resumed_sharded_fit_ends_as_if_it_had_not_stopped(tmp_path, layout: str) -> None:
    found = in_torchrun(partial(_resume, tmp_path, layout), layout=layout, folder=tmp_path)
    assert found == [2, 2]
    assert_same(hessian_in(tmp_path / "parts"), hessian_in(tmp_path / "whole"), tolerance=1e-6)
    one, other = (open_expert(tmp_path / part).info for part in ("whole", "parts"))
    assert one.fingerprint == other.fingerprint
    assert one.details["curvature"] == other.details["curvature"]
    assert one.details["curvature"]["num_steps"] == [6]
