from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lit_merge.checkpoint.tensor_source import (
    RenamedCheckpoint,
    TensorInfo,
    open_state_dict,
    plain_names,
    unwrapped,
)
from lit_merge.errors import InputError


class TokenTensor(torch.Tensor):
    """Stands for a DTensor or a quantized tensor: a subclass with a meaning of its own."""


def test_an_info_knows_its_sizes() -> None:
    info = TensorInfo((3, 4), torch.bfloat16)
    assert (info.numel, info.nbytes) == (12, 24)
    assert TensorInfo((), torch.int64).numel == 1
    assert TensorInfo((0, 4), torch.int64).nbytes == 0


def test_a_state_dict_in_memory_is_read_like_a_file() -> None:
    table = torch.arange(12.0).reshape(3, 4)
    with open_state_dict({"a": table, "turned": table.T, "n": torch.tensor(3)}) as opened:
        assert list(opened) == ["a", "turned", "n"]
        assert len(opened) == 3
        assert "a" in opened
        assert "b" not in opened
        assert opened.infos["turned"] == TensorInfo((4, 3), torch.float32)
        assert opened.file_of("a") == Path("<memory>")
        assert opened.read("turned", 1, 5).tolist() == [4.0, 8.0, 1.0, 5.0]
        assert opened.tensor("turned").tolist() == table.T.tolist()
        assert opened.tensor("n").item() == 3
        buffer = torch.empty(3)
        opened.read_into("a", 2, buffer)
        assert buffer.tolist() == [2.0, 3.0, 4.0]
        with pytest.raises(IndexError, match="a: no elements 5:13 in 12"):
            opened.read("a", 5, 13)


def test_tensors_in_memory_are_not_copied_and_carry_no_gradient() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    opened = open_state_dict({"a": parameter})
    assert opened.read("a", 0, 4).data_ptr() == parameter.data_ptr()
    assert not opened.tensor("a").requires_grad


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "experts: must hold tensors; got an empty state dict"),
        ({"a": 1.0}, "experts: entry 'a' must be a dense tensor; got float"),
        (
            {"a": torch.zeros(2).as_subclass(TokenTensor)},
            r"got a TokenTensor \(sharded or quantize",
        ),
        ({"a": torch.zeros(2, device="meta")}, "on the meta device"),
    ],
)
def test_what_is_no_plain_tensor_is_refused(state: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_state_dict(state, path="experts")


def test_names_lose_what_wrappers_put_into_them() -> None:
    assert plain_names(["_orig_mod.a.w", "m._orig_mod.b", "net._fsdp_wrapped_module.c"]) == {
        "_orig_mod.a.w": "a.w",
        "m._orig_mod.b": "m.b",
        "net._fsdp_wrapped_module.c": "net.c",
    }
    assert unwrapped("_forward_module._orig_mod.x._checkpoint_wrapped_module.y") == "x.y"
    assert unwrapped("_orig_mod._orig_mod.x") == "x"
    assert unwrapped("not_orig_mod.x") == "not_orig_mod.x"
    assert unwrapped("module.x") == "module.x"


def test_a_renamed_checkpoint_reads_from_the_other_one() -> None:
    inner = open_state_dict({"model.a": torch.arange(4.0), "b": torch.ones(2)})
    with RenamedCheckpoint(inner, {"model.a": "a"}) as opened:
        assert list(opened) == ["a", "b"]
        assert opened.infos["a"] == inner.infos["model.a"]
        assert opened.read("a", 1, 3).tolist() == [1.0, 2.0]
        assert opened.tensor("a").tolist() == [0.0, 1.0, 2.0, 3.0]
        assert opened.file_of("a") == inner.path
        buffer = torch.empty(2)
        opened.read_into("a", 2, buffer)
        assert buffer.tolist() == [2.0, 3.0]
    with pytest.raises(KeyError):
        inner.read("b", 0, 1)


def test_two_tensors_never_get_one_name() -> None:
    inner = open_state_dict({"model.a": torch.zeros(1), "a": torch.zeros(1)}, path="x.pt")
    with pytest.raises(
        InputError, match=r"x\.pt: must hold one tensor of a name; got 'a' and 'mod"
    ):
        RenamedCheckpoint(inner, {"model.a": "a"})
