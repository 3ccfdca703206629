from __future__ import annotations

import itertools

import pytest
import torch

from lit_merge.alignment.assignment import assign


@pytest.mark.parametrize("seed", range(5))
def test_the_profit_is_the_largest_of_all_permutations(seed: int) -> None:
    profit = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed))
    permutation, earned = assign(profit)
    values = [
        sum(float(profit[u, v]) for u, v in enumerate(order))
        for order in itertools.permutations(range(5))
    ]
    assert earned == pytest.approx(max(values), abs=1e-6)
    assert earned == pytest.approx(
        sum(float(profit[u, int(v)]) for u, v in enumerate(permutation)), abs=1e-6
    )
    assert permutation.dtype == torch.int64


def test_units_that_are_all_alike_stay() -> None:
    permutation, earned = assign(torch.ones(6, 6))
    assert torch.equal(permutation, torch.arange(6))
    assert earned == 6.0
