"""Batch norms in a fit: what they normalise by, what they begin with, and what they end with."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lit_merge.distributed import is_dtensor
from lit_merge.expert import ExpertInfo, write_expert
from lit_merge.least_squares import LeastSquares
from lit_merge.methods import TaskArithmetic
from lit_merge.module import MergeModule
from lit_merge.tasks import DatasetTask, MultiTaskDataModule
from tests.references import softened_divergence
from tests.sharded_fits import in_torchrun
from tests.tiny_fits import QUIET, tiny_trainer
from tests.tiny_merge import HEAD, TinyNet

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


@pytest.fixture(autouse=True)
def steps_of_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fits of a few steps go somewhere."""
    monkeypatch.setattr("lit_merge.merged.learned.RISING_STEPS", 0)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


class NormNet(TinyNet):
    """The tiny network with a batch norm behind its first layer."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__(classes)
        self.body.insert(1, nn.BatchNorm1d(12))


def norm_expert(seed: int) -> NormNet:
    """Return a network whose running statistics are far from those of its inputs."""
    torch.manual_seed(seed)
    net = NormNet().eval()
    with torch.no_grad():
        net.body[1].weight.uniform_(0.5, 1.5)
        net.body[1].bias.normal_()
        net.body[1].running_mean.normal_()
        net.body[1].running_var.uniform_(0.2, 3.0)
    return net


def norm_data(**options: Any) -> MultiTaskDataModule:
    """Return two tasks of unlabelled points, of four classes."""
    generator = torch.Generator().manual_seed(0)
    tasks = {
        name: DatasetTask(
            TensorDataset(torch.randn(size, 6, generator=generator), torch.full((size,), -100)),
            num_classes=4,
            unlabelled=True,
        )
        for name, size in (("one", 32), ("two", 32))
    }
    return MultiTaskDataModule(dict(tasks), **{"batch_size": 16} | options)


@pytest.fixture(scope="module")
def norm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("norms")
    for number, name in enumerate(("base", "one", "two")):
        info = ExpertInfo(head_parameters=HEAD)
        write_expert(path / name, weights=norm_expert(number).state_dict(), info=info)
    return path


def norm_module(folder: Path, **options: Any) -> MergeModule:
    experts = {task: str(folder / task) for task in ("one", "two")}
    settings = {"base": str(folder / "base"), "method": TaskArithmetic(0.5), "trainable": "all"}
    return MergeModule(NormNet(), experts, **settings | options)


def norm_fit(module: MergeModule, folder: Path, *callbacks: Callback, **options: Any) -> Any:
    settings = {"enable_checkpointing": False, "max_epochs": -1, "limit_val_batches": 0}
    trainer = tiny_trainer(folder, *callbacks, **settings | options)
    trainer.fit(module, datamodule=norm_data())
    return trainer


class FirstBatch(Callback):
    """Keeps the first batch and the network before its step."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == 0:
            self.batch, self.before = batch, copy.deepcopy(module.network)


def test_a_step_that_trains_batch_norm_is_that_of_a_plain_loop(
    norm_folder: Path, tmp_path: Path
) -> None:
    options = {"closed_form": "none", "optimizer": "adam", "weights_lr": 0.01}
    module = norm_module(norm_folder, holdout=0.0, **options)
    seen = FirstBatch()
    norm_fit(module, tmp_path, seen, max_steps=1)
    net, batch = NormNet().train(), seen.batch
    shared = seen.before.shared_state()
    net.load_state_dict({**net.state_dict(), **shared})
    heads = list(seen.before.head_state().values())
    tasks, features = batch.task.tolist(), net.body(batch.inputs)
    logits = [
        nn.functional.linear(feature, *(heads[task][name] for name in HEAD))
        for task, feature in zip(tasks, features, strict=True)
    ]
    with torch.no_grad():
        experts = [norm_expert(1), norm_expert(2)]
        teacher = [experts[t](x[None])[0] for t, x in zip(tasks, batch.inputs, strict=True)]
    optimizer = torch.optim.Adam(net.body.parameters(), lr=0.01, eps=1e-6)
    softened_divergence(torch.stack(logits), torch.stack(teacher), 2.0).mean().backward()
    optimizer.step()
    found = module.network.shared_state()
    # A batch norm takes the offset of the layer before it away: its gradient is rounding.
    for name in found.keys() - {*HEAD, "body.0.bias"}:
        torch.testing.assert_close(found[name], net.state_dict()[name], rtol=1e-4, atol=5e-5)
    assert float((found["body.0.weight"] - shared["body.0.weight"]).abs().min()) > 1e-3
    assert not torch.equal(found["body.1.running_mean"], shared["body.1.running_mean"])


def test_a_fit_with_batch_norm_in_training_begins_with_the_outputs_of_the_closed_form(
    norm_folder: Path, tmp_path: Path
) -> None:
    closed = norm_module(norm_folder, least_squares=LeastSquares())
    norm_fit(closed, tmp_path, max_steps=0)
    path = closed.save_corrected(tmp_path / "closed")
    seen, experts = FirstBatch(), {task: str(norm_folder / task) for task in ("one", "two")}
    options = {"trainable": "all", "holdout": 0.25, "lr": 3.0}
    learned = MergeModule(NormNet(), experts, merged=str(path), **options)
    norm_fit(learned, tmp_path, seen, max_steps=3)
    norm = seen.before.network.body[1]
    inputs = seen.batch.inputs
    for task in ("one", "two"):
        expected = closed(inputs, task)
        torch.testing.assert_close(
            seen.before(inputs, learned.tasks.index(task)), expected, rtol=1e-4, atol=1e-5
        )
        # With such a learning rate it only gets worse: it ends with the state that it began with.
        torch.testing.assert_close(learned(inputs, task), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(learned.network.network.body[1].running_mean, norm.running_mean)
    transparent = closed.network.network.body[1]
    assert transparent.running_var.min() > 0.99
    assert norm.running_var.min() > 0
    assert float((norm.running_var - transparent.running_var).abs().max()) > 0.05


def _fit_of_a_part(folder: Path, path: Path, name: str, rank: int) -> bool:
    parts = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    module = norm_module(folder, holdout=0.25, holdout_every=2, weights_lr=0.01)
    # By default DistributedDataParallel gives all ranks the first one's buffers at every step.
    strategy = parts if name == "fsdp" else DDPStrategy(broadcast_buffers=False)
    norm_fit(module, path, max_steps=4, strategy=strategy, devices=2)
    sharded = is_dtensor(module.network.network.body[1].weight)
    module.save_corrected(path / name)
    return sharded


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:.*returned a view tensor")
def test_sharded_batch_norms_are_trained_as_whole_ones_are(
    norm_folder: Path, tmp_path: Path
) -> None:
    for name, sharded in (("ddp", False), ("fsdp", True)):
        run = partial(_fit_of_a_part, norm_folder, tmp_path, name)
        assert in_torchrun(run, layout="fsdp", folder=tmp_path) == [sharded] * 2
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("ddp", "fsdp"))
    assert "body.1.running_mean" in whole
    assert sorted(whole) == sorted(parts)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=2e-5, msg=name)


def test_a_resumed_fit_does_not_touch_its_batch_norms_again(
    norm_folder: Path, tmp_path: Path
) -> None:
    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)

    whole = norm_module(norm_folder, holdout=0.25)
    norm_fit(whole, tmp_path, keep(), max_steps=4, enable_checkpointing=True)
    resumed = norm_module(norm_folder, holdout=0.25)
    trainer = tiny_trainer(tmp_path, keep(), max_epochs=-1, max_steps=4, limit_val_batches=0)
    trainer.fit(
        resumed, datamodule=norm_data(), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True
    )
    for name, value in state(whole.network).items():
        torch.testing.assert_close(state(resumed.network)[name], value, rtol=1e-5, atol=1e-6)


def test_frozen_batch_norms_keep_their_running_statistics(
    norm_folder: Path, tmp_path: Path
) -> None:
    for options in ({"batch_norm_mode": "freeze"}, {"trainable": "scale_shift"}):
        module = norm_module(norm_folder, holdout=0.0, **options)
        module.configure_model()
        before = state(module.network.network)
        norm_fit(module, tmp_path, max_steps=2)
        names = changed(before, state(module.network.network))
        assert ("body.1.weight" in names) == ("trainable" not in options)
        assert not {n for n in names if "running" in n or "tracked" in n}


def test_a_last_batch_of_one_example_is_normalised_by_running_statistics(
    norm_folder: Path, tmp_path: Path
) -> None:
    module = norm_module(norm_folder, holdout=0.0)
    trainer = tiny_trainer(tmp_path, max_epochs=1, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(module, datamodule=norm_data(batch_size=63))
    assert module.network.network.body[1].num_batches_tracked == 1


def test_corrections_stay_where_batch_norms_are_replaced(norm_folder: Path) -> None:
    module = norm_module(norm_folder, sites="norm")
    module.configure_model()
    network = module.network.eval()
    network.corrections.at("body.1").set_(0, torch.full((12,), 3.0), torch.ones(12))
    inputs = torch.randn(5, 6)
    before = network(inputs, 0)
    # What Lightning does with sync_batchnorm.
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert not torch.allclose(network(inputs, 0), before)
    network.keep_attached()
    torch.testing.assert_close(network(inputs, 0), before)


@pytest.mark.distributed
def test_two_processes_end_with_the_same_running_statistics(
    norm_folder: Path, tmp_path: Path
) -> None:
    module = norm_module(norm_folder, holdout=0.25, holdout_every=1, weights_lr=0.01)
    trainer = tiny_trainer(
        tmp_path, Ranks(tmp_path), devices=2, strategy="ddp_fork", max_steps=3, max_epochs=-1,
        enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=norm_data(batch_size=8))
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-6, atol=1e-7)
    assert int(one["network.body.1.num_batches_tracked"]) > 0


class Ranks(Callback):
    """Writes what every rank ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        torch.save(state(module.network), self.folder / f"rank{trainer.global_rank}.pt")
