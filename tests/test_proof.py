from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_merge.alignment.proof import prove
from lit_merge.alignment.symmetries import find_symmetries, search_symmetries
from lit_merge.alignment.symmetry import PermutedAxis, Symmetry
from lit_merge.errors import InputError
from tests.tiny_models import images, tiny_conv_net, tiny_vit


def mlp(hidden: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 2)
    )


def axes(size: int, *places: tuple[str, int]) -> tuple[PermutedAxis, ...]:
    positions = torch.arange(size)[:, None]
    return tuple(PermutedAxis(name, axis, positions) for name, axis in places)


INPUTS = torch.zeros(4, 3)


def test_a_symmetry_that_lacks_one_axis_is_rejected_by_name() -> None:
    model = tiny_vit()
    found = find_symmetries(model, images(2))
    broken = found[3]
    for lacking in range(len(broken.axes)):
        rest = broken.axes[:lacking] + broken.axes[lacking + 1 :]
        wrong = [replace(s, axes=rest) if s is broken else s for s in found]
        proof = prove(model, images(2), wrong)
        assert set(proof.rejected) == {broken.name}, broken.axes[lacking]
        assert proof.rejected[broken.name] > 1e-6
        assert [s.name for s in proof.proved] == [s.name for s in found if s is not broken]
        assert proof.error < 1e-12


def test_strict_names_what_the_proof_rejects() -> None:
    wrong = Symmetry("wrong", 6, axes(6, ("0.weight", 0), ("0.bias", 0)))
    with pytest.raises(InputError, match="1 that the proof rejects, such as 'wrong'"):
        prove(mlp(), INPUTS, [wrong], strict=True)


def test_two_halves_of_one_symmetry_are_rejected_though_together_they_hold() -> None:
    first = Symmetry("first", 2, axes(2, ("0.weight", 0), ("0.bias", 0)))
    second = Symmetry("second", 2, axes(2, ("2.weight", 1)))  # two units: both are always swapped
    assert set(prove(mlp(2), INPUTS, [first, second]).rejected) == {"first", "second"}


def test_units_that_are_alike_in_the_model_cannot_hide_an_error() -> None:
    model = mlp()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    wrong = Symmetry("wrong", 6, axes(6, ("0.weight", 0)))
    assert "wrong" in prove(model, INPUTS, [wrong]).rejected


class NarrowNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True))).to(x.dtype)


def test_what_a_model_computes_in_float32_is_proved_in_float64() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64), NarrowNorm(), nn.Linear(64, 2))
    symmetry = Symmetry("s", 64, axes(64, ("0.weight", 0), ("0.bias", 0), ("2.weight", 1)))
    proof = prove(model, INPUTS, [symmetry])
    assert proof.error < 1e-13
    assert not proof.rejected


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_conv_net().train()
    before = copy.deepcopy(model.state_dict())
    search_symmetries(model, images(2, channels=1))
    assert model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_symmetries_are_proved_without_a_forward() -> None:
    assert prove(mlp(), INPUTS, []).forwards == 0


HIDDEN = Symmetry("h", 6, axes(6, ("0.weight", 0), ("0.bias", 0), ("2.weight", 1)))


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (lambda model, x: (model(x) * 0).log(), "finite outputs of Sequential"),
        (lambda model, x: x[:, :2] + 0 * model(x), "outputs that depend on the weights"),
        (lambda model, x: None, "forward: must return outputs of Sequential"),
        (lambda model, x: model(x).argmax(-1), "no tensor of floating numbers"),
    ],
)
def test_where_nothing_can_be_proved_is_an_error(forward: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        prove(mlp(), INPUTS, [HIDDEN], forward=forward)
