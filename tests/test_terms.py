from __future__ import annotations

import pytest
import torch

from lit_merge.alignment.terms import (
    Term,
    TermAxis,
    joined,
    moved,
    objective,
    profit,
    scaled,
    similarity,
)


def stack(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


UNITS = torch.tensor([[0, 4], [1, 5], [2, 3]])
AXIS = TermAxis("s", 1, UNITS)


def test_a_unit_moves_with_all_its_positions() -> None:
    values = stack(0, 2, 3, 7)
    out = moved(values, AXIS, torch.tensor([1, 2, 0]))
    assert torch.equal(out[..., [0, 4]], values[..., [1, 5]])
    assert torch.equal(out[..., [1, 5]], values[..., [2, 3]])
    assert torch.equal(out[..., [2, 3]], values[..., [0, 4]])
    assert torch.equal(out[..., 6], values[..., 6])


def test_profit_is_the_inner_product_of_every_unit_with_every_place() -> None:
    left, right = stack(0, 2, 3, 7), stack(1, 2, 3, 7)
    found = profit(left, right, 1, UNITS)
    for place in range(3):
        for unit in range(3):
            expected = sum(
                float((left[:, :, UNITS[place, k]] * right[:, :, UNITS[unit, k]]).sum())
                for k in range(2)
            )
            assert float(found[place, unit]) == pytest.approx(expected)


def test_profit_of_no_positions_is_zero() -> None:
    left = stack(0, 1, 3, 7)
    assert torch.equal(profit(left, left, 1, UNITS[:, :0]), torch.zeros(3, 3, dtype=left.dtype))


def test_moving_one_model_is_moving_the_other_back() -> None:
    term = Term(stack(0, 1, 3, 7), stack(1, 1, 3, 7), (AXIS,), 1.0)
    permutation = torch.tensor([1, 2, 0])
    back = torch.argsort(permutation)
    assert term.product({"s": permutation}) == pytest.approx(term.swapped().product({"s": back}))


def test_joined_terms_earn_the_sum() -> None:
    one = {"w": Term(stack(0, 1, 3, 7), stack(1, 1, 3, 7), (AXIS,), 1.0)}
    other = {"w": Term(stack(2, 2, 3, 7), stack(3, 2, 3, 7), (AXIS,), 1.0)}
    permutations = {"s": torch.tensor([2, 0, 1])}
    whole = objective(joined([one, other]), permutations)
    assert whole == pytest.approx(objective(one, permutations) + objective(other, permutations))


def test_scaled_terms_earn_more_and_are_as_alike() -> None:
    left = stack(0, 1, 3, 7)
    term = {"w": Term(left, left, (AXIS,), float(left.square().sum()))}
    assert objective(scaled(term, 3.0), {}) == pytest.approx(3 * objective(term, {}))
    assert similarity(scaled(term, 3.0), {}, "s") == pytest.approx(1.0)


def test_similarity_of_what_is_not_compared_is_unknown() -> None:
    assert similarity({}, {}, "s") is None
