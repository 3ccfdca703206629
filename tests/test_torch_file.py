from __future__ import annotations

import argparse
import os
import random
import types
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_merge.checkpoint.torch_file import open_torch_file
from lit_merge.errors import InputError

STATE = {
    "fc.weight": torch.randn(6, 5, generator=torch.Generator().manual_seed(0)),
    "fc.bias": torch.arange(6.0),
    "turned": torch.arange(12.0).reshape(3, 4).T,
    "count": torch.tensor(7),
}


def saved(path: Path, content: Any, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "around",
    [
        lambda state: state,
        OrderedDict,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"state": {}}, "args": None},
        lambda state: {"model_state_dict": state, "loss": 0.5},
    ],
)
def test_a_state_dict_is_found_where_people_put_it(
    tmp_path: Path, around: Any, legacy: bool
) -> None:
    opened = open_torch_file(saved(tmp_path / "x.pt", around(STATE), legacy=legacy))
    assert opened.source == "torch"
    assert list(opened) == list(STATE)
    for name, value in STATE.items():
        assert torch.equal(opened.tensor(name), value)
        assert opened.infos[name].shape == value.shape
        half = value.numel() // 2
        assert torch.equal(opened.read(name, 0, half), value.reshape(-1)[:half])
        assert torch.equal(opened.read(name, half, value.numel()), value.reshape(-1)[half:])


def test_the_prefix_of_ddp_is_removed_only_where_every_name_has_it(tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in STATE.items()}
    assert list(open_torch_file(saved(tmp_path / "x.pt", state))) == list(STATE)
    state["other"] = torch.zeros(1)
    assert list(open_torch_file(saved(tmp_path / "y.pt", state))) == list(state)


def test_a_lightning_checkpoint_gives_its_state_dict(tmp_path: Path) -> None:
    content = {
        "pytorch-lightning_version": "2.6.6",
        "epoch": 2,
        "global_step": 40,
        "state_dict": STATE,
        "optimizer_states": [],
    }
    opened = open_torch_file(saved(tmp_path / "x.ckpt", content), weights="raw")
    assert opened.source == "lightning"
    assert opened.metadata == {
        "pytorch-lightning_version": "2.6.6",
        "epoch": "2",
        "global_step": "40",
    }
    assert torch.equal(opened.tensor("fc.bias"), STATE["fc.bias"])


def test_of_averaged_and_raw_weights_the_averaged_are_taken_unless_told(tmp_path: Path) -> None:
    content = {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": STATE,
        "current_model_state": {name: value + 1 for name, value in STATE.items()},
        "averaging_state": {"n_averaged": torch.tensor(3)},
    }
    path = saved(tmp_path / "x.ckpt", content)
    averaged, raw = open_torch_file(path), open_torch_file(path, weights="raw")
    assert averaged.metadata["weights"] == "averaged"
    assert raw.metadata["weights"] == "raw"
    assert torch.equal(averaged.tensor("fc.bias"), STATE["fc.bias"])
    assert torch.equal(raw.tensor("fc.bias"), STATE["fc.bias"] + 1)


@pytest.mark.parametrize("state", [None, [1, 2]])
def test_a_lightning_checkpoint_without_weights_is_refused(tmp_path: Path, state: object) -> None:
    content = {"pytorch-lightning_version": "2.6.6", "state_dict": state}
    with pytest.raises(InputError, match="must hold the weights under 'state_dict'; got"):
        open_torch_file(saved(tmp_path / "x.ckpt", content))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_by_name_and_not_run(tmp_path: Path, legacy: bool) -> None:
    trace = tmp_path / "trace"
    path = saved(tmp_path / "x.pt", {"a": torch.ones(2), "b": Evil(trace)}, legacy=legacy)
    with pytest.raises(InputError, match=r"so that opening it runs no code; got posix\.mkdir"):
        open_torch_file(path)
    assert not trace.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("value", "asked"),
    [
        (types.SimpleNamespace(lr=1), r"types\.SimpleNamespace"),
        (Path("x"), r"pathlib.*\.PosixPath"),
        (nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_objects_beside_the_weights_are_refused_with_the_fix(
    tmp_path: Path, value: object, asked: str, legacy: bool
) -> None:
    path = saved(
        tmp_path / "x.ckpt", {"state_dict": STATE, "hyper_parameters": value}, legacy=legacy
    )
    with pytest.raises(InputError, match=f"got {asked}. Save hyper-parameters as primitives"):
        open_torch_file(path)


def test_a_program_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out, its files are not
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))
    with pytest.raises(InputError, match="must hold a state dict; got a TorchScript program"):
        open_torch_file(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a state dict; got a list"),
        (torch.ones(3), "must hold a state dict; got a Tensor"),
        ({}, "must hold tensors; got an empty state dict"),
        ({"state_dict": {}}, "must hold tensors; got an empty state dict"),
        ({"a": torch.ones(2), "b": 3}, "entry 'b' must be a dense tensor; got int"),
        ({"a": torch.ones(2), "b": None}, "entry 'b' must be a dense tensor; got NoneType"),
        ({"a": {"b": torch.ones(2)}}, "entry 'a' must be a dense tensor; got dict"),
        ({3: torch.ones(2)}, "must hold tensors by name; got the key 3"),
        ({"a": torch.eye(3).to_sparse()}, r"got a tensor of layout torch\.sparse_coo"),
        ({"a": torch.ones(2, device="meta")}, "got a tensor on the meta device, without data"),
    ],
)
def test_what_is_no_state_dict_of_dense_tensors_is_refused(
    tmp_path: Path, content: object, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_torch_file(saved(tmp_path / "x.pt", content))
    assert str(caught.value).startswith(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_is_refused(tmp_path: Path, legacy: bool) -> None:
    path = saved(tmp_path / "x.pt", STATE, legacy=legacy)
    whole = path.read_bytes()
    for size in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="must be a whole checkpoint; got one that torch"):
            open_torch_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.pt: must be a file that can be read; got No such"):
        open_torch_file(tmp_path / "x.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_no_bytes_bring_out_another_error(tmp_path: Path, legacy: bool) -> None:
    chance = random.Random(0)
    path = saved(tmp_path / "x.pt", {"state_dict": STATE, "epoch": 1}, legacy=legacy)
    whole = path.read_bytes()
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 6)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            opened = open_torch_file(path)
            values: list[Tensor] = [opened.tensor(name) for name in opened]
            assert values
        except InputError:
            refused += 1
    assert refused > 20


def test_settings_in_a_namespace_are_let_through(tmp_path: Path) -> None:
    content = {"state_dict": STATE, "args": argparse.Namespace(lr=0.1, model="vit")}
    opened = open_torch_file(saved(tmp_path / "x.pth.tar", content))
    assert torch.equal(opened.tensor("fc.weight"), STATE["fc.weight"])


def test_a_namespace_does_not_let_code_through(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    content = {"state_dict": STATE, "args": argparse.Namespace(evil=Evil(trace))}
    with pytest.raises(InputError, match=r"got (posix|nt)\.mkdir"):
        open_torch_file(saved(tmp_path / "x.pth", content))
    assert not trace.exists()


AVERAGE = {name: value.float() / 3 for name, value in STATE.items()}


@pytest.mark.parametrize(
    ("raw", "average"), [("state_dict", "state_dict_ema"), ("model", "model_ema")]
)
def test_an_average_beside_the_weights_is_taken_unless_they_are_asked_for(
    tmp_path: Path, raw: str, average: str
) -> None:
    path = saved(tmp_path / "x.pth", {"epoch": 3, raw: STATE, average: AVERAGE})
    opened = open_torch_file(path)
    assert opened.metadata == {"key": average, "weights": "averaged"}
    assert torch.equal(opened.tensor("fc.weight"), AVERAGE["fc.weight"])
    opened = open_torch_file(path, weights="raw")
    assert opened.metadata == {"key": raw, "weights": "raw"}
    assert torch.equal(opened.tensor("fc.weight"), STATE["fc.weight"])


def test_the_only_weights_are_taken_whatever_was_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"epoch": 3, "model_ema": AVERAGE})
    opened = open_torch_file(path, weights="raw")
    assert opened.metadata == {"key": "model_ema"}
    assert torch.equal(opened.tensor("fc.weight"), AVERAGE["fc.weight"])


def test_several_state_dicts_are_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"model": STATE, "state_dict": AVERAGE})
    with pytest.raises(
        InputError, match="must hold one state dict; got some under 'state_dict' and"
    ):
        open_torch_file(path)


def test_a_dict_of_settings_is_no_state_dict(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"model": {"width": 3}, "module": STATE})
    assert open_torch_file(path).metadata == {"key": "module"}
