"""What all estimators that make a pass can do: show entries of their sums, and be gone on with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lit_merge.curvature import PerExampleFisher
from lit_merge.curvature.hutchinson import HessianDiagonal
from lit_merge.curvature.pass_estimator import PassEstimator


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    return nn.Sequential(*layers)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(4, 2, 3, 3, generator=generator),
        torch.randn(4, 2, generator=generator),
    )


def loss(module: nn.Module, examples: tuple[Tensor, Tensor]) -> Tensor:
    return mse_loss(module(examples[0]), examples[1])


def exact() -> PassEstimator:
    return PerExampleFisher(model(), loss, labels="observed")


def hutchinson() -> PassEstimator:
    return HessianDiagonal(model(), loss, negative="keep")


@pytest.mark.parametrize("make", [exact, hutchinson])
def test_sizes_and_entries_are_those_of_the_sums(make: Any) -> None:
    estimator = make()
    positions = {"0.weight": torch.tensor([0, 5, 23]), "3.bias": torch.tensor([1])}
    assert estimator.entries(positions).tolist() == [0.0] * 4
    estimator.update(batch(0))
    sums = estimator.sums()
    assert estimator.sizes == {name: value.numel() for name, value in sums.items()}
    expected = [sums["0.weight"].flatten()[i].item() for i in (0, 5, 23)]
    found = estimator.entries(positions)
    assert found.tolist() == [*expected, sums["3.bias"][1].item()]
    assert found.dtype == torch.float64
    assert found.any()
    assert estimator.entries({}).shape == (0,)


@pytest.mark.parametrize("make", [exact, hutchinson])
def test_going_on_with_sums_gives_those_of_one_pass_bit_by_bit(make: Any) -> None:
    whole, first, rest = make(), make(), make()
    for part in range(2):
        whole.update(batch(part), indices=range(4 * part, 4 * part + 4))
    first.update(batch(0), indices=range(4))
    rest.resume(first.sums(), num_examples=first.num_examples)
    rest.update(batch(1), indices=range(4, 8))
    assert rest.num_examples == whole.num_examples == 8
    assert all(torch.equal(value, rest.sums()[name]) for name, value in whole.sums().items())
