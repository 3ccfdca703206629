from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_merge.checkpoint import open_checkpoint
from lit_merge.checkpoint.state_dict import (
    aligned,
    alignment,
    common_prefix,
    fingerprint,
    load_into,
)
from lit_merge.checkpoint.tensor_source import open_state_dict
from lit_merge.errors import InputError
from tests.references import reference_fingerprint

NAMES = ["blocks.0.w", "blocks.1.w", "norm.w", "head.w"]


class Wrapped(nn.Module):
    """A LightningModule's shape: the model in an attribute."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Positions(nn.Module):
    """A buffer that is not saved, as the position_ids of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("position_ids", torch.arange(4), persistent=False)


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("names", "reference", "prefix"),
    [
        (NAMES, NAMES, ""),
        ([f"model.{n}" for n in NAMES], NAMES, "model."),
        ([f"net.backbone.{n}" for n in NAMES], NAMES, "net.backbone."),
        ([f"model.{n}" for n in NAMES] + ["loss.w", "classifier.w"], NAMES, "model."),
        ([f"model.{n}" for n in NAMES[:3]], NAMES, "model."),
        ([f"model.{n}" for n in NAMES], [*NAMES[:2], "other.w"], "model."),
        (["x", "y"], NAMES, ""),
        ([], NAMES, ""),
        (NAMES, [], ""),
        ([f"a.{n}" for n in NAMES] + [f"b.b.{n}" for n in NAMES], NAMES, "a."),
        (["a.b.w", "b.w"], ["w", "b.w"], ""),
        ([f"my_model.{n}" for n in NAMES], [f"model.{n}" for n in NAMES], ""),
    ],
)
def test_the_prefix_is_the_one_that_brings_most_names_together(
    names: list[str], reference: list[str], prefix: str
) -> None:
    assert common_prefix(names, reference) == prefix


def test_alignment_removes_a_prefix_or_adds_one_and_leaves_the_rest() -> None:
    long = [f"model.{n}" for n in NAMES]
    assert alignment([*long, "loss.w"], NAMES) == {
        **dict(zip(long, NAMES, strict=True)),
        "loss.w": "loss.w",
    }
    assert alignment([*NAMES, "extra"], long) == {
        **dict(zip(NAMES, long, strict=True)),
        "extra": "extra",
    }
    assert alignment([*(f"net.{n}" for n in NAMES), "loss.w"], [*long, "loss.w"]) == {
        **{f"net.{n}": f"model.{n}" for n in NAMES},
        "loss.w": "loss.w",
    }
    assert alignment(["conv.weight", "conv.bias"], ["fc.weight", "fc.bias"]) == {
        "conv.weight": "conv.weight",
        "conv.bias": "conv.bias",
    }
    assert alignment(NAMES, ["x"]) == {n: n for n in NAMES}


def test_alignment_never_makes_two_names_one() -> None:
    names = ["model.a.w", "model.b.w", "a.w"]
    assert alignment(names, ["a.w", "b.w"]) == {
        "model.a.w": "model.a.w",
        "model.b.w": "b.w",
        "a.w": "a.w",
    }


def test_an_aligned_checkpoint_has_the_names_of_the_reference() -> None:
    state = prefixed(small().state_dict(), "model.") | {"loss.w": torch.ones(1)}
    opened = open_state_dict(state)
    view = aligned(opened, small().state_dict())
    assert list(view) == [*small().state_dict(), "loss.w"]
    assert torch.equal(view.tensor("0.weight"), state["model.0.weight"])
    assert aligned(view, small().state_dict()) is view


@pytest.mark.parametrize("stored", ["", "model.", "net.inner."])
@pytest.mark.parametrize("wrap", [False, True])
def test_loading_aligns_the_prefix_in_both_directions(stored: str, wrap: bool) -> None:
    source, target = small(0), small(1)
    load_into(Wrapped(target) if wrap else target, prefixed(source.state_dict(), stored))
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)


def test_loading_keeps_the_types_of_the_module() -> None:
    source, target = small(0), small(1).double()
    load_into(target, source.state_dict())
    assert target[0].weight.dtype == torch.float64
    assert torch.equal(target[0].weight, source[0].weight.double())


def test_loading_into_a_compiled_module_finds_its_parameters() -> None:
    source, target = small(0), small(1)
    load_into(torch.compile(target), source.state_dict())
    assert torch.equal(target[0].weight, source[0].weight)


def test_tied_weights_may_be_stored_once() -> None:
    def tied(seed: int) -> nn.ModuleDict:
        torch.manual_seed(seed)
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
        model["out"].weight = model["embed"].weight
        return model

    source, target = tied(0), tied(1)
    load_into(target, {"embed.weight": source["embed"].weight})
    assert torch.equal(target["out"].weight, source["embed"].weight)
    load_into(tied(2), source.state_dict())
    different = {"embed.weight": torch.zeros(5, 3), "out.weight": torch.ones(5, 3)}
    with pytest.raises(
        InputError, match=r"'embed.weight' and 'out.weight' must be equal, since Mod"
    ):
        load_into(target, different)
    assert torch.equal(target["out"].weight, source["embed"].weight)


def test_a_buffer_that_the_module_does_not_save_may_be_stored() -> None:
    source, target = Positions(), Positions()
    load_into(target, {"position_ids": torch.arange(9), **source.state_dict()})
    load_into(Wrapped(target), {"position_ids": torch.arange(9), **source.state_dict()})
    assert torch.equal(target.fc.weight, source.fc.weight)
    assert target.position_ids.numel() == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight": None}, r"must hold every tensor of Sequential; got none for '0\.weight'\. "),
        (
            {"0.weight": None, "0.bias": None, "1.weight": None, "1.bias": None},
            "got none for '0.weight', '0.bias', '1.weight' and 1 more",
        ),
        ({"head.weight": torch.ones(1)}, "must hold only tensors of Sequential; got 'head.weight'"),
        (
            {"2.weight": torch.ones(3, 4)},
            r"tensor '2.weight' must have the shape \[2, 4\] of Sequential; got \[3, 4\]",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_and_nothing_loaded(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    changed = {**small(0).state_dict(), **change}
    save_file({n: v for n, v in changed.items() if v is not None}, str(tmp_path / "x.safetensors"))
    target = small(1)
    with open_checkpoint(tmp_path / "x.safetensors") as opened:
        with pytest.raises(InputError, match=message) as caught:
            load_into(target, opened)
        assert str(caught.value).startswith(str(tmp_path / "x.safetensors"))
        for name, value in small(1).state_dict().items():
            assert torch.equal(target.state_dict()[name], value)
        load_into(target, opened, ignore=[*change])


def test_what_is_ignored_stays_whatever_the_checkpoint_holds() -> None:
    source = prefixed(small(0).state_dict(), "model.") | {"model.head.bias": torch.ones(1)}
    target = small(1)
    load_into(target, source, ignore=["2.*", "head.*"])
    assert torch.equal(target[0].weight, small(0)[0].weight)
    assert torch.equal(target[2].weight, small(1)[2].weight)


def test_a_module_without_memory_is_refused() -> None:
    with torch.device("meta"):
        target = nn.Linear(2, 2)
    with pytest.raises(
        InputError, match="Linear: must have memory for 'weight'; got a parameter on"
    ):
        load_into(target, nn.Linear(2, 2).state_dict())


STATE = {
    "blocks.0.w": torch.randn(70, 50, generator=torch.Generator().manual_seed(0)),
    "blocks.0.b": torch.randn(1024, generator=torch.Generator().manual_seed(1)),
    "norm.w": torch.randn(1025, generator=torch.Generator().manual_seed(2)).bfloat16(),
    "count": torch.tensor(3),
    "flags": torch.tensor([True, False]),
    "empty": torch.zeros(0),
}


def test_the_fingerprint_is_that_of_the_slow_reference() -> None:
    assert fingerprint(STATE) == reference_fingerprint(STATE)
    assert len(fingerprint(STATE)) == 64


def test_the_fingerprint_does_not_depend_on_container_order_or_shared_prefix(
    tmp_path: Path,
) -> None:
    expected = fingerprint(STATE)
    save_file(STATE, str(tmp_path / "x.safetensors"))
    torch.save({"pytorch-lightning_version": "2", "state_dict": STATE}, tmp_path / "x.ckpt")
    for file in ("x.safetensors", "x.ckpt"):
        with open_checkpoint(tmp_path / file) as opened:
            assert fingerprint(opened) == expected
    assert fingerprint(dict(reversed(STATE.items()))) == expected
    assert fingerprint(prefixed(STATE, "net.model.")) == expected
    turned = STATE["blocks.0.w"].T.contiguous().T
    assert fingerprint({**STATE, "blocks.0.w": turned}) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"blocks.0.w": STATE["blocks.0.w"] + 1e-6},
        {"blocks.0.w": STATE["blocks.0.w"].reshape(50, 70)},
        {"blocks.0.w": STATE["blocks.0.w"].double()},
        {"blocks.1.w": STATE["blocks.0.w"]},
        {"count": torch.tensor(4)},
        {"flags": torch.tensor([True, True])},
        {"empty": torch.zeros(0, 1)},
        {"norm.w": STATE["norm.w"].index_fill(0, torch.tensor([1024]), 9.0)},
    ],
)
def test_other_weights_have_another_fingerprint(change: dict[str, Tensor]) -> None:
    assert fingerprint({**STATE, **change}) != fingerprint(STATE)
