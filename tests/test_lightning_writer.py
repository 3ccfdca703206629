from __future__ import annotations

import os
import resource
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_merge.checkpoint import Checkpoint, StateDict, open_checkpoint, save_tensors
from lit_merge.checkpoint.dcp_writer import write_distributed
from lit_merge.checkpoint.lightning_writer import write_lightning_checkpoint
from lit_merge.checkpoint.torch_writer import save_streamed
from lit_merge.errors import InputError

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))


class Module(L.LightningModule):
    def __init__(self, width: int, settings: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Linear(width, 3))
        self.loaded: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self(batch[0]).square().mean()

    def test_step(self, batch: list[Tensor]) -> None:
        self.log("sum", self(batch[0]).double().sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["classes"] = ["a", "b"]
        checkpoint["memory"] = {"queue": [torch.ones(3)]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = checkpoint


class Tied(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight


def trainer(folder: Path, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.fixture(autouse=True)
def _quiet(recwarn: pytest.WarningsRecorder) -> None:
    """Lightning advises more workers."""


def fitted(folder: Path, *callbacks: L.Callback) -> Path:
    torch.manual_seed(0)
    fit = trainer(folder, *callbacks)
    fit.fit(Module(6, {"lr": 0.1}), DataLoader(TensorDataset(X), batch_size=4))
    fit.save_checkpoint(folder / "base.ckpt")
    return folder / "base.ckpt"


def changed(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {
        name: (value + 0.5).contiguous() if value.is_floating_point() else value.clone()
        for name, value in ((name, checkpoint.tensor(name)) for name in checkpoint)
    }


def load(path: Path, **settings: Any) -> Module:
    return Module.load_from_checkpoint(path, map_location="cpu", weights_only=True, **settings)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The 'test_dataloader' does not have many workers")
class TestFromATemplate:
    def test_the_module_gets_the_weights_and_its_settings(self, tmp_path: Path) -> None:
        base = fitted(tmp_path)
        state = changed(open_checkpoint(base))
        save_tensors(tmp_path / "merged.safetensors", state)
        with open_checkpoint(tmp_path / "merged.safetensors") as weights:
            notes = write_lightning_checkpoint(tmp_path / "merged.ckpt", weights, base)
        assert notes == (
            f"{tmp_path}/merged.ckpt: without 'memory' of {base}, which holds tensors",
        )
        module = load(tmp_path / "merged.ckpt")
        reference = Module(6)
        reference.load_state_dict(state)
        assert torch.equal(module.eval()(X), reference.eval()(X))
        assert module.hparams == {"width": 6, "settings": {"lr": 0.1}}
        content = torch.load(tmp_path / "merged.ckpt", weights_only=True)
        old = torch.load(base, weights_only=True)
        assert content["epoch"] == content["global_step"] == 0
        assert content["pytorch-lightning_version"] == old["pytorch-lightning_version"]
        assert set(old) - set(content) == {
            "callbacks", "loops", "lr_schedulers", "memory", "optimizer_states",
        }  # fmt: skip
        assert module.loaded["classes"] == ["a", "b"]

    def test_a_trainer_tests_it(self, tmp_path: Path) -> None:
        base = fitted(tmp_path)
        state = changed(open_checkpoint(base))
        write_lightning_checkpoint(tmp_path / "merged.ckpt", StateDict(state), base)
        data = DataLoader(TensorDataset(X), batch_size=8)
        found = trainer(tmp_path).test(
            Module(6), data, ckpt_path=tmp_path / "merged.ckpt", verbose=False
        )
        reference = Module(6).eval()
        reference.load_state_dict(state)
        assert found[0]["sum"] == pytest.approx(float(reference(X).double().sum()), abs=1e-6)

    def test_an_average_in_the_template_is_not_carried_over(self, tmp_path: Path) -> None:
        base = fitted(tmp_path, WeightAveraging())
        with open_checkpoint(base) as weights:
            assert weights.metadata["weights"] == "averaged"
            write_lightning_checkpoint(tmp_path / "merged.ckpt", weights, base)
            merged = open_checkpoint(tmp_path / "merged.ckpt")
            assert "weights" not in merged.metadata
            assert all(torch.equal(merged.tensor(n), weights.tensor(n)) for n in weights)

    @pytest.mark.parametrize("old", ["1.5.0", "1.9.0", "2.0.0"])
    def test_a_template_of_an_older_lightning_is_taken(self, tmp_path: Path, old: str) -> None:
        base = fitted(tmp_path)
        content = torch.load(base, weights_only=True)
        torch.save({**content, "pytorch-lightning_version": old}, base)
        with open_checkpoint(base) as weights:
            write_lightning_checkpoint(tmp_path / "merged.ckpt", weights, base)
        module = load(tmp_path / "merged.ckpt")
        assert torch.equal(module.net[0].weight, content["state_dict"]["net.0.weight"])

    def test_names_are_those_of_the_template(self, tmp_path: Path) -> None:
        base = fitted(tmp_path)
        state = {n.removeprefix("net."): v for n, v in changed(open_checkpoint(base)).items()}
        content = torch.load(base, weights_only=True)
        compiled = {f"net._orig_mod.{n}": v for n, v in state.items()}
        torch.save({**content, "state_dict": compiled}, tmp_path / "compiled.ckpt")
        for template, names in (
            (base, content["state_dict"]),
            (tmp_path / "compiled.ckpt", compiled),
        ):
            path = tmp_path / f"of-{template.name}"
            write_lightning_checkpoint(path, StateDict(state), template)
            assert list(torch.load(path, weights_only=True)["state_dict"]) == list(names)


def lightning_file(path: Path, state: Mapping[str, Tensor], **more: Any) -> Path:
    content = {"pytorch-lightning_version": "2.6.0", "state_dict": dict(state), **more}
    torch.save(content, path)
    return path


def test_tied_tensors_stay_tied_and_are_written_once(tmp_path: Path) -> None:
    module = Tied()
    template = lightning_file(tmp_path / "base.ckpt", module.state_dict())
    weights = {"words.weight": torch.randn(7, 4)}
    write_lightning_checkpoint(tmp_path / "x.ckpt", StateDict(weights), template)
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert list(state) == ["words.weight", "head.weight"]
    assert state["words.weight"].data_ptr() == state["head.weight"].data_ptr()
    loaded = Tied.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert torch.equal(loaded.head.weight, weights["words.weight"])


def test_without_a_template_there_are_no_settings(tmp_path: Path) -> None:
    state = Module(6).state_dict()
    save_tensors(tmp_path / "base.safetensors", state)
    torch.save(state, tmp_path / "base.pt")
    for template in (None, tmp_path / "base.safetensors", tmp_path / "base.pt", tmp_path):
        (tmp_path / "x.ckpt").unlink(missing_ok=True)
        (note,) = write_lightning_checkpoint(tmp_path / "x.ckpt", StateDict(state), template)
        assert "has no hyper-parameters, since" in note
        module = load(tmp_path / "x.ckpt", width=6)
        assert all(torch.equal(v, state[n]) for n, v in module.state_dict().items())
        (tmp_path / "x.ckpt").unlink()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a.x": torch.ones(2)}, "must hold every tensor of .*base.ckpt; got none for 'a.y'"),
        (
            {"a.x": torch.ones(2), "a.y": torch.ones(3), "a.z": torch.ones(1)},
            "must hold only tensors of .*base.ckpt; got 'a.z'",
        ),
        (
            {"a.x": torch.ones(2), "a.y": torch.ones(4)},
            r"tensor 'a.y' must have the shape \[3\] of .*; got \[4\]",
        ),
    ],
)
def test_a_template_of_another_model_is_an_error(
    tmp_path: Path, state: dict[str, Tensor], message: str
) -> None:
    own = {"a.x": torch.ones(2), "a.y": torch.ones(3)}
    template = lightning_file(tmp_path / "base.ckpt", own)
    with pytest.raises(InputError, match=message):
        write_lightning_checkpoint(tmp_path / "x.ckpt", StateDict(state), template)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.ckpt"]


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_template_that_asks_for_code_is_refused_and_not_run(tmp_path: Path) -> None:
    state = {"a.x": torch.ones(2)}
    evil = Evil(tmp_path / "trace")
    template = lightning_file(tmp_path / "base.ckpt", state, hyper_parameters=evil)
    with pytest.raises(InputError, match=r"so that opening it runs no code; got (posix|nt)\.mkdir"):
        write_lightning_checkpoint(tmp_path / "x.ckpt", StateDict(state), template)
    assert not (tmp_path / "trace").exists()


def test_an_existing_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    state = {"a.x": torch.ones(2)}
    write_lightning_checkpoint(tmp_path / "x.ckpt", StateDict(state))
    with pytest.raises(InputError, match="must not exist yet"):
        write_lightning_checkpoint(tmp_path / "x.ckpt", StateDict(state))
    write_lightning_checkpoint(
        tmp_path / "x.ckpt", StateDict({"a.x": torch.zeros(2)}), replace=True
    )
    assert torch.equal(open_checkpoint(tmp_path / "x.ckpt").tensor("a.x"), torch.zeros(2))


STATE = {
    "large": torch.randn(600, 1000, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(60.0).reshape(3, 4, 5).bfloat16(),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "flag": torch.tensor([True, False, True]),
    "turned": torch.arange(12.0).reshape(3, 4).T,
}


def test_the_file_is_what_torch_would_have_written(tmp_path: Path) -> None:
    names = {name: name for name in STATE}
    content = {"hyper_parameters": {"width": 3}, "note": "ä"}
    save_streamed(tmp_path / "x.pt", content, "state", StateDict(STATE), names=names)
    torch.save({"state": STATE, **content}, tmp_path / "y.pt")
    found, wanted = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in "xy")
    assert list(found) == list(wanted)
    assert {**found, "state": None} == {**wanted, "state": None}
    for mapped in (torch.load(tmp_path / "x.pt", mmap=True, weights_only=True), found):
        for name, value in wanted["state"].items():
            assert mapped["state"][name].dtype == value.dtype
            assert torch.equal(mapped["state"][name], value)
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None  # every checksum holds


class Counting(Checkpoint):
    """A large model that is computed when it is read."""

    def __init__(self, infos: Any) -> None:
        self.path, self.source, self.metadata, self.infos = Path("x"), "memory", {}, infos

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        torch.arange(start, start + out.numel(), out=out)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    small = StateDict({"a": torch.ones(3)})
    save_streamed(tmp_path / "a.pt", {}, "state", small, names={"a": "a"})
    info = type(small.infos["a"])((16, 2**20), torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save_streamed(
        tmp_path / "b.pt", {}, "state", Counting({f"{i}": info for i in range(4)}),
        names={f"{i}": f"{i}" for i in range(4)},
    )  # fmt: skip
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert (tmp_path / "b.pt").stat().st_size > 4 * 2**26
    assert grown < 40  # MiB, of 256
    state = torch.load(tmp_path / "b.pt", mmap=True, weights_only=True)["state"]
    assert state["3"].view(-1)[-5:].tolist() == list(range(2**24 - 5, 2**24))


def test_a_disk_without_room_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 999, 999))
    state = StateDict({"a.x": torch.ones(250)})
    for write in (write_lightning_checkpoint, write_distributed):
        with pytest.raises(InputError, match="must have 1,000 bytes free on its disk; got 999"):
            write(tmp_path / "x", state)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 1000))
    write_lightning_checkpoint(tmp_path / "x", state)
