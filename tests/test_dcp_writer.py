from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lit_merge.checkpoint import Checkpoint, StateDict, open_checkpoint
from lit_merge.checkpoint.dcp_writer import write_distributed
from lit_merge.errors import InputError
from tests.processes import on_ranks
from tests.sharded_nets import mesh_of, shard_fully, small_transformer

STATE = {
    "fc.weight": torch.randn(6, 5, generator=torch.Generator().manual_seed(0)),
    "fc.half": torch.arange(60.0).reshape(3, 4, 5).bfloat16(),
    "turned": torch.arange(12.0).reshape(3, 4).T,
    "part": torch.arange(20.0)[5:11],
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}


def loaded(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is meant
        dcp.load(content, checkpoint_id=folder, no_dist=True)
    return content


def zeros() -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in STATE.items()}


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_dcp_loads_what_was_written(tmp_path: Path, key: str | None) -> None:
    write_distributed(tmp_path / "c", StateDict(STATE), key=key)
    found = loaded(tmp_path / "c", {key: zeros()} if key else zeros())
    state = found[key] if key else found
    assert all(torch.equal(state[name], value) for name, value in STATE.items())
    with open_checkpoint(tmp_path / "c") as opened:
        assert all(torch.equal(opened.tensor(name), value) for name, value in STATE.items())
        assert set(opened) == set(STATE)
        assert opened.source == ("lightning" if key else "torch")


def test_each_tensor_is_read_once_and_alone(tmp_path: Path) -> None:
    class Reading(Checkpoint):
        def __init__(self) -> None:
            own = StateDict(STATE)
            self.path, self.source, self.metadata = own.path, own.source, own.metadata
            self.infos, self.own = own.infos, own
            self.read_names: list[str] = []

        def read_into(self, name: str, start: int, out: Tensor) -> None:
            self.read_names.append(name)
            self.own.read_into(name, start, out)

    weights = Reading()
    write_distributed(tmp_path / "c", weights)
    assert sorted(weights.read_names) == sorted(STATE)


@pytest.mark.distributed
def test_two_ranks_with_sharded_parameters_load_it(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = {
        name: torch.randn_like(value) for name, value in small_transformer().state_dict().items()
    }
    write_distributed(tmp_path / "c", StateDict(state), key="model")

    def load(rank: int) -> bool:
        model = small_transformer()
        shard_fully(model, mesh_of(2, 1)["data_parallel"])
        content = {"model": get_model_state_dict(model)}
        assert any(isinstance(value, DTensor) for value in content["model"].values())
        dcp.load(content, checkpoint_id=tmp_path / "c")
        set_model_state_dict(model, content["model"])
        return all(
            torch.equal(value.full_tensor(), state[name])  # type: ignore[operator]
            for name, value in model.state_dict().items()
        )

    assert on_ranks(load, world_size=2, folder=tmp_path) == [True, True]


class Module(L.LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.net[0].weight, DTensor):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def test_step(self, batch: list[Tensor]) -> None:
        self.log("sum", self.net(batch[0]).sum(), sync_dist=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.net(batch[0]).square().mean()


X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))


def sharding_trainer(folder: Path) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        strategy=ModelParallelStrategy(process_group_backend="gloo"),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def in_lightning(folder: Path) -> tuple[bool, float, float]:
    """Train sharded, write back what was trained plus one, and let Lightning load that."""
    warnings.simplefilter("ignore")
    data = DataLoader(TensorDataset(X), batch_size=8)
    trainer = sharding_trainer(folder)
    trainer.fit(Module(), data)
    trainer.save_checkpoint(folder / "base.ckpt")
    with open_checkpoint(folder / "base.ckpt") as base:
        full = {n: p.full_tensor() for n, p in trainer.lightning_module.state_dict().items()}
        same = all(torch.equal(base.tensor(n), value) for n, value in full.items())
        same &= set(base) == set(full) and base.source == "lightning"
        state = {name: base.tensor(name) + 1 for name in base}
    write_distributed(
        folder / "merged.ckpt", StateDict(state), key="state_dict", template=folder / "base.ckpt"
    )
    meta = torch.load(folder / "merged.ckpt" / "meta.pt", weights_only=True)
    same &= meta["hyper_parameters"] == {"width": 4}
    found = sharding_trainer(folder).test(
        Module(), data, ckpt_path=folder / "merged.ckpt", verbose=False
    )
    reference = Module()
    reference.load_state_dict(state)
    return same, found[0]["sum"], float(reference.net(X).sum())


@pytest.mark.distributed
def test_lightning_loads_it_sharded_and_writes_what_we_read(tmp_path: Path) -> None:
    results = on_ranks(lambda _: in_lightning(tmp_path), world_size=1, folder=tmp_path)
    assert isinstance(results[0], tuple), results
    same, found, wanted = results[0]
    assert same
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_template_without_a_key_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="template: must come with a key"):
        write_distributed(tmp_path / "c", StateDict(STATE), template=tmp_path / "base.ckpt")


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write_distributed(tmp_path / "c", StateDict(STATE))
    with pytest.raises(InputError, match="must be empty or absent"):
        write_distributed(tmp_path / "c", StateDict(STATE))
    write_distributed(tmp_path / "c", StateDict({"x": torch.ones(2)}), replace=True)
    assert list(open_checkpoint(tmp_path / "c")) == ["x"]
