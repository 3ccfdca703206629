from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from lit_merge.callbacks import ActivationStatistics, DiagonalHessian
from lit_merge.checkpoint import open_checkpoint
from lit_merge.checkpoint_curvature import curvature_of_checkpoint
from lit_merge.cli import main
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, open_expert, write_expert
from tests.sharded_fits import SIZES, ShardedClassifier, in_torchrun, sharded_trainer
from tests.tiny_fits import (
    NUM_EXAMPLES,
    QUIET,
    TinyClassifier,
    by_loop,
    examples,
    hessian_in,
    loader,
    tiny_trainer,
)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*returned a view tensor"),
    pytest.mark.filterwarnings("ignore::lit_merge.curvature.CurvatureWarning"),
    *(pytest.mark.filterwarnings(line) for line in QUIET),
]

LAYOUTS = ["fsdp", "tensor", pytest.param("both", marks=pytest.mark.slow)]


class Still(ShardedClassifier):
    """Makes steps of length zero, so that sharded and whole weights stay the same."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class StillWhole(TinyClassifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def hessian_of(folder: Path) -> dict[str, torch.Tensor]:
    expert = open_expert(folder)
    assert expert.hessian is not None
    return {name: expert.hessian.tensor(name) for name in expert.hessian}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Check to 1e-6 of each tensor's largest entry."""
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        error = (found[name] - value).abs().max()
        assert error <= 1e-6 * value.abs().max(), name


def _fit(folder: Path, layout: str, settings: dict[str, Any], rank: int) -> bool:
    torch.manual_seed(0)
    callback = DiagonalHessian(**settings)
    sharded_trainer(folder, layout, callback, max_epochs=1).fit(Still(), loader())
    return callback.written == folder / "expert"


def same_quality(one: dict[str, Any], other: dict[str, Any]) -> bool:
    worst = zip(one.pop("worst").values(), other.pop("worst").values(), strict=True)
    return all(a[k] == pytest.approx(b[k], rel=1e-4) for a, b in [(one, other), *worst] for k in b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", [{}, {"labels": "observed", "max_examples": 40}])
def test_a_sharded_fit_ends_with_the_curvature_of_one_process(
    tmp_path, layout: str, settings: dict[str, Any]
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    torch.manual_seed(0)
    trainer = tiny_trainer(alone, DiagonalHessian(**settings), max_epochs=1)
    trainer.fit(StillWhole(), loader())
    found = in_torchrun(partial(_fit, shared, layout, settings), layout=layout, folder=tmp_path)
    assert found == [True] * len(found)
    assert_close(hessian_in(shared), hessian_in(alone))
    one, other = (open_expert(folder).info for folder in (alone, shared))
    assert one.fingerprint == other.fingerprint
    assert one.num_examples == other.num_examples == NUM_EXAMPLES
    mine, theirs = one.details["curvature"], other.details["curvature"]
    if layout == "tensor":  # the halves have the same batches only where all ranks have all data
        assert same_quality(mine.pop("quality"), theirs.pop("quality"))
    else:
        assert sum(mine.pop("quality")["num_examples"]) == sum(
            theirs.pop("quality")["num_examples"]
        )
    assert mine == theirs


def _replicated(folder: Path, rank: int) -> None:
    torch.manual_seed(0)
    callback = DiagonalHessian(batch_size=4)
    settings = {"strategy": "ddp", "devices": 2, "max_epochs": 1}
    tiny_trainer(folder, callback, **settings).fit(StillWhole(), loader())


def test_quality_is_that_of_as_many_ranks_with_whole_parameters(tmp_path) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    in_torchrun(partial(_replicated, whole), layout="fsdp", folder=tmp_path)
    settings = {"batch_size": 4}
    in_torchrun(partial(_fit, shared, "fsdp", settings), layout="fsdp", folder=tmp_path)
    one, other = (
        open_expert(folder).info.details["curvature"]["quality"] for folder in (whole, shared)
    )
    assert one["num_examples"] == other["num_examples"]
    assert same_quality(one, other)


def _refused(folder: Path, case: str, rank: int) -> str:
    callbacks: dict[str, Any] = {
        "best": DiagonalHessian(weights="best"),
        "hutchinson": DiagonalHessian(estimator="hutchinson"),
        "in-training": DiagonalHessian(estimator="exact-in-training"),
        "activations": ActivationStatistics(),
    }
    saving = ModelCheckpoint(dirpath=folder, monitor="loss")
    trainer = sharded_trainer(folder, "fsdp", callbacks[case], saving)
    with pytest.raises(InputError) as caught:
        trainer.fit(Still(), loader())
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("best", 'weights: must be "last" where parameters are sharded; got "best". Run'),
        ("hutchinson", "must have whole parameters on every rank; got 4 sharded ones"),
        ("in-training", "must have whole parameters on every rank; got 4 sharded ones"),
        ("activations", "must have whole parameters on every rank; got 4 sharded ones"),
    ],
)
def test_what_does_not_work_in_shards_is_refused_before_training(
    tmp_path, case: str, message: str
) -> None:
    for found in in_torchrun(partial(_refused, tmp_path, case), layout="fsdp", folder=tmp_path):
        assert message in found


class Stream(IterableDataset[Any]):
    """Every data rank yields a share of the examples of its own."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def __iter__(self) -> Iterator[Any]:
        return iter([examples()[i] for i in range(self.rank, NUM_EXAMPLES, self.size)])


class Streaming(Still):
    def curvature_dataloader(self) -> DataLoader[Any]:
        mesh = self.device_mesh
        assert mesh is not None
        data = mesh["data_parallel"]
        return DataLoader(Stream(data.get_local_rank(), data.size()), batch_size=8)


def _stream(folder: Path, layout: str, rank: int) -> None:
    torch.manual_seed(0)
    callback = DiagonalHessian(labels="observed")
    sharded_trainer(folder, layout, callback, max_epochs=1).fit(Streaming(), loader())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stream_is_measured_in_shards(tmp_path, layout: str) -> None:
    found = in_torchrun(partial(_stream, tmp_path, layout), layout=layout, folder=tmp_path)
    assert found == [None] * len(found)
    torch.manual_seed(0)
    assert_close(hessian_in(tmp_path), by_loop(StillWhole()))


class Broken(Still):
    """Its loss is not finite on one example."""

    def curvature_loss(self, batch: Any) -> torch.Tensor:
        inputs, labels = batch
        loss = torch.nn.functional.cross_entropy(self(inputs), labels)
        bad = (inputs == examples().tensors[0][17]).all(1).any() and self.trainer.global_step > 0
        return loss * torch.nan if bad else loss


def _broken(folder: Path, rank: int) -> str:
    trainer = sharded_trainer(folder, "fsdp", DiagonalHessian(), max_epochs=1)
    with pytest.raises(InputError) as caught:
        trainer.fit(Broken(), loader())
    return str(caught.value)


def test_a_loss_that_is_not_finite_on_one_rank_ends_the_pass_on_all(tmp_path) -> None:
    found = in_torchrun(partial(_broken, tmp_path), layout="fsdp", folder=tmp_path)
    assert all("loss: must be finite; got nan on the examples" in message for message in found)
    assert not (tmp_path / "expert").exists()


def _of_checkpoint(folder: Path, layout: str, settings: dict[str, Any], rank: int) -> str:
    torch.manual_seed(1)
    trainer = sharded_trainer(folder / "trainer", layout)
    path = curvature_of_checkpoint(
        trainer,
        ShardedClassifier(),
        Data(),
        checkpoint=folder / "weights.ckpt",
        output=folder / "shared",
        **settings,
    )
    return path.name


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


def saved(folder: Path) -> Path:
    """Return a checkpoint of a classifier that nobody else has."""
    torch.manual_seed(5)
    path = folder / "weights.ckpt"
    torch.save({"state_dict": TinyClassifier().state_dict()}, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_measured_in_shards(tmp_path, layout: str) -> None:
    curvature_of_checkpoint(
        tiny_trainer(tmp_path),
        TinyClassifier(),
        Data(),
        checkpoint=saved(tmp_path),
        output=tmp_path / "alone",
    )
    found = in_torchrun(
        partial(_of_checkpoint, tmp_path, layout, {}), layout=layout, folder=tmp_path
    )
    assert found == ["shared"] * len(found)
    one, other = (open_expert(tmp_path / name).info for name in ("alone", "shared"))
    assert one.fingerprint == other.fingerprint
    assert_close(hessian_of(tmp_path / "shared"), hessian_of(tmp_path / "alone"))


def _by_command(folder: Path, layout: str, rank: int) -> int:
    data, tensor = SIZES[layout]
    strategy = {"data_parallel_size": str(data), "tensor_parallel_size": str(tensor)}
    return main(
        [
            "curvature",
            "--model=tests.sharded_fits.ShardedClassifier",
            "--data=tests.test_sharded_passes.Data",
            f"--checkpoint={folder / 'weights.ckpt'}",
            f"--output={folder / 'shared'}",
            "--trainer.accelerator=cpu",
            f"--trainer.devices={data * tensor}",
            "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
            *(f"--trainer.strategy.{name}={value}" for name, value in strategy.items()),
            "--labels=observed",
        ]
    )


@pytest.mark.parametrize("layout", ["fsdp", "tensor"])
def test_the_command_measures_a_checkpoint_in_shards(tmp_path, layout: str) -> None:
    saved(tmp_path)
    torch.manual_seed(5)
    expected = by_loop(TinyClassifier())
    found = in_torchrun(partial(_by_command, tmp_path, layout), layout=layout, folder=tmp_path)
    assert found == [0] * len(found)
    with open_checkpoint(tmp_path / "shared" / "hessian.safetensors") as hessian:
        assert_close({name: hessian.tensor(name) for name in hessian}, expected)


def _sites(folder: Path, rank: int) -> str:
    with pytest.raises(InputError) as caught:
        _of_checkpoint(folder, "fsdp", {"sites": "auto"}, rank)
    return str(caught.value)


def test_activation_statistics_are_refused_in_shards(tmp_path) -> None:
    saved(tmp_path)
    for found in in_torchrun(partial(_sites, tmp_path), layout="fsdp", folder=tmp_path):
        assert "sites: must be None where parameters are sharded; got 'auto'" in found


def test_a_folder_is_completed_in_shards(tmp_path) -> None:
    path = saved(tmp_path)
    torch.manual_seed(5)
    write_expert(tmp_path / "shared", weights=TinyClassifier().state_dict(), info=ExpertInfo())
    found = in_torchrun(
        partial(_of_checkpoint, tmp_path, "fsdp", {}), layout="fsdp", folder=tmp_path
    )
    assert found == ["shared"] * 2
    assert path.is_file()
    assert sorted(hessian_of(tmp_path / "shared")) == sorted(TinyClassifier().state_dict())


class Meta(ShardedClassifier):
    """Gets its memory from the strategy, after it was sharded."""

    def configure_model(self) -> None:
        self.to("meta")
        super().configure_model()


def _late(folder: Path, rank: int) -> str:
    trainer = sharded_trainer(folder / "trainer", "fsdp")
    settings = {"checkpoint": folder / "weights.ckpt", "output": folder / "shared"}
    return curvature_of_checkpoint(trainer, Meta(), Data(), labels="observed", **settings).name


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
def test_weights_are_loaded_after_the_strategy_has_made_room(tmp_path) -> None:
    saved(tmp_path)
    torch.manual_seed(5)
    expected = by_loop(TinyClassifier())
    assert in_torchrun(partial(_late, tmp_path), layout="fsdp", folder=tmp_path) == ["shared"] * 2
    assert_close(hessian_of(tmp_path / "shared"), expected)
