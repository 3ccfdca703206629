"""MagMax against a choice by hand for every entry."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.methods import MagMax, ParameterSlice


@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
def test_the_largest_magnitude_wins_and_plus_where_even(scale: float) -> None:
    columns = list(itertools.product([0.0, 1.0, -1.0, 3.5, -3.0, 1e-30], repeat=3))
    experts = tuple(torch.tensor(columns).T.contiguous().unbind())
    p = ParameterSlice("w", ("a", "b", "c"), experts, base=torch.zeros(len(columns)))
    expected = [scale * max(column, key=lambda x: (abs(x), x)) for column in columns]
    assert MagMax(scale)(p).tolist() == pytest.approx(expected)


def test_the_winner_is_added_to_the_base() -> None:
    p = ParameterSlice(
        "w",
        ("a", "b"),
        (torch.tensor([2.0, 5.0]), torch.tensor([-3.0, 4.0])),
        base=torch.tensor([1.0, 4.5]),
    )
    assert MagMax()(p).tolist() == [-3.0, 5.0]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InputError, match=r"^MagMax\.scale: must be a finite number"):
        MagMax(math.inf)
