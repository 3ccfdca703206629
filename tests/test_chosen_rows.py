"""Whether rows are in the examples' order, for rows that are written down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_merge.curvature.chosen_rows import counts_rows, factors, in_order, puts_rows, takes_rows

X = torch.arange(24.0).view(4, 3, 2)  # two rows for each of two examples
FLAT = X.view(12, 2)
MASK = torch.zeros(4, 3, dtype=torch.bool)


def mask(*places: tuple[int, int]) -> Tensor:
    chosen = MASK.clone()
    for row, place in places:
        chosen[row, place] = True
    return chosen


@pytest.mark.parametrize(
    ("func", "args", "expected"),
    [
        (Tensor.__getitem__, (X, torch.tensor([0, 1, 2, 3])), True),
        (Tensor.__getitem__, (X, torch.tensor([1, 0, 3, 2])), True),  # among one's own
        (Tensor.__getitem__, (X, torch.tensor([0, 2])), True),
        (Tensor.__getitem__, (X, torch.tensor([0, 1])), False),
        (Tensor.__getitem__, (X, torch.tensor([2, 0])), False),
        (Tensor.__getitem__, (X, torch.tensor([0, 1, 2])), False),
        (Tensor.__getitem__, (X, torch.tensor([], dtype=torch.long)), True),
        (Tensor.__getitem__, (X, (torch.arange(4), torch.tensor([2, 0, 1, 1]))), True),
        (Tensor.__getitem__, (X, (None, torch.tensor([0, 3]))), False),
        (Tensor.__getitem__, (X, mask((0, 1), (3, 2))), True),
        (Tensor.__getitem__, (X, mask((0, 1), (0, 2), (1, 0), (3, 2))), False),
        (Tensor.__getitem__, (X, mask((0, 1), (1, 2), (2, 0), (2, 2))), True),
        (torch.index_select, (FLAT, 0, torch.tensor([0, 5, 6, 11])), True),
        (torch.index_select, (FLAT, 0, torch.tensor([0, 6, 5, 11])), False),
        (torch.index_select, (X, 1, torch.tensor([2, 0])), True),
        (torch.gather, (FLAT, 0, torch.tensor([[0, 5], [6, 11]])), True),
        (torch.gather, (FLAT, 0, torch.tensor([[0, 6], [6, 11]])), False),
        (torch.masked_select, (X, mask((0, 1), (3, 2))[..., None]), True),
        (torch.masked_select, (X, mask((0, 1), (1, 2))[..., None]), False),
        (torch.take, (X, torch.tensor([0, 11, 12, 23])), True),
        (Tensor.__getitem__, (X[:3], torch.tensor([0, 1])), False),  # rows of no one
    ],
)
def test_rows_in_order(func: Any, args: tuple[Any, ...], expected: bool) -> None:
    assert takes_rows(func)
    assert in_order(func, args, {}, 2) is expected


def test_kinds_of_functions() -> None:
    assert puts_rows(Tensor.index_add_)
    assert puts_rows(Tensor.__setitem__)
    assert not puts_rows(Tensor.__getitem__)
    assert counts_rows(torch.nonzero, (X,))
    assert counts_rows(torch.where, (X > 3,))
    assert not counts_rows(torch.where, (X > 3, X, X))
    assert not takes_rows(torch.add)


@pytest.mark.parametrize(
    ("func", "args", "kept", "summed"),
    [
        (torch.matmul, (FLAT, FLAT.mT), [0], [1]),
        (torch.matmul, (X, X.mT), [], []),
        (torch.einsum, ("td,tc->cd", FLAT, FLAT), [], [1, 2]),
        (torch.einsum, ("cd,tc->td", FLAT, FLAT), [2], [1]),
        (torch.einsum, ("bqd,bkd->bqk", X, X), [1, 2], []),
        (torch.einsum, ("b...,b...->b", X, X), [], []),
        (torch.add, (X, X), [], []),
    ],
)
def test_factors_of_products(func: Any, args: tuple[Any, ...], kept: list, summed: list) -> None:
    found = factors(func, args)
    for tensors, places in zip(found, (kept, summed), strict=True):
        assert len(tensors) == len(places)
        assert all(t is args[place] for t, place in zip(tensors, places, strict=True))
