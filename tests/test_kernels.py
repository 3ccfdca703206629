"""Σ_n (Σ_t l rᵀ)² by every route against forming every per-example gradient."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from lit_merge.curvature.estimator import zeros_for
from lit_merge.curvature.kernels import (
    Contribution,
    Outer,
    OwnRows,
    PerExample,
    Rows,
    add_squares,
    example_gradient,
)


def factors(shape: tuple[int, int, int, int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random [B, G, T, O] and [B, G, T, I] for (B, G, T, O, I)."""
    batch, groups, places, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, groups, places, rows, generator=generator, dtype=torch.float64),
        torch.randn(batch, groups, places, columns, generator=generator, dtype=torch.float64),
    )


def outer(left: Tensor, right: Tensor) -> Outer:
    return Outer(left, lambda start, stop: right[start:stop])


@pytest.mark.parametrize("places", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", [(4, 5), (256, 160)], ids=["several at once", "one at a time"])
def test_outer_products_are_summed_over_places_and_then_squared(
    places: int, groups: int, size: tuple[int, int]
) -> None:
    left, right = factors((7, groups, places, *size))
    total = zeros_for(torch.empty(groups * size[0], size[1], dtype=torch.float64))
    add_squares(total, [outer(left, right)], 7)
    expected = torch.einsum("bgto,bgti->bgoi", left, right).square().sum(0).flatten(0, 1)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def test_two_uses_are_summed_before_squaring() -> None:
    first, second = factors((3, 1, 2, 4, 5)), factors((3, 1, 6, 4, 5), seed=1)
    total = torch.zeros(4, 5, dtype=torch.float64)
    add_squares(total, [outer(*first), outer(*second)], 3)
    gradient = sum(torch.einsum("bgto,bgti->boi", *pair) for pair in (first, second))
    torch.testing.assert_close(total, gradient.square().sum(0))


def test_squares_are_added_to_what_is_there() -> None:
    left, right = factors((3, 1, 1, 4, 5))
    total = torch.full((4, 5), 7.0, dtype=torch.float64)
    add_squares(total, [outer(left, right)], 3)
    expected = 7 + torch.einsum("bgto,bgti->boi", left, right).square().sum(0)
    torch.testing.assert_close(total, expected)


def test_rounding_makes_no_square_negative() -> None:
    left = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1)  # cancels to zero
    right = torch.full((1, 1, 2, 1), 1 / 3)
    total = torch.zeros(1, 1)
    add_squares(total, [outer(left * 1.1, right * 1e10)], 1)
    assert total.item() >= 0


def test_half_precision_factors_are_squared_in_single_precision() -> None:
    left = torch.full((1, 1, 1, 1), 1e-5, dtype=torch.bfloat16)
    right = torch.full((1, 1, 1, 1), 1e-8, dtype=torch.float16)
    total = torch.zeros(1, 1)
    add_squares(total, [outer(left, right + 1e-4)], 1)
    assert total.item() == pytest.approx((left.item() * (right + 1e-4).item()) ** 2, rel=1e-5)


def test_repeated_rows_of_one_example_are_summed_before_squaring() -> None:
    examples = torch.tensor([0, 0, 0, 1, 1])
    indices = torch.tensor([2, 2, 0, 2, 1])
    values = torch.arange(10.0, dtype=torch.float64).view(5, 2)
    total = torch.zeros(3, 2, dtype=torch.float64)
    add_squares(total, [Rows(examples, indices, values)], 2)
    gradient = torch.zeros(2, 3, 2, dtype=torch.float64)
    gradient.index_put_((examples, indices), values, accumulate=True)
    torch.testing.assert_close(total, gradient.square().sum(0))


def test_rows_and_outer_products_of_a_tied_weight_are_summed_before_squaring() -> None:
    left, right = factors((2, 1, 3, 4, 5))
    rows = Rows(
        torch.tensor([1, 0, 1]), torch.tensor([3, 3, 3]), factors((3, 1, 1, 1, 5))[1][:, 0, 0]
    )
    total = torch.zeros(4, 5, dtype=torch.float64)
    add_squares(total, [rows, outer(left, right)], 2)
    gradient = torch.einsum("bgto,bgti->boi", left, right)
    gradient.index_put_((rows.examples, rows.indices), rows.values, accumulate=True)
    torch.testing.assert_close(total, gradient.square().sum(0))


def test_per_example_gradients_of_two_uses_are_summed_before_squaring() -> None:
    a, b = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    total = torch.zeros(3, 4, dtype=torch.float64)
    add_squares(total, [PerExample(a), PerExample(b)], 6)
    torch.testing.assert_close(total, (a + b).square().sum(0))


def mixture() -> tuple[dict[str, Contribution], dict[str, Tensor]]:
    """Return a contribution of every kind to a parameter [4, 5], and the gradients [2, 4, 5]."""
    left, right = factors((2, 1, 3, 4, 5))
    values = factors((2, 1, 1, 4, 5), seed=1)[0][:, 0, 0, :, None] * right[:, 0, :1]
    hit = Rows(torch.tensor([1, 0, 1]), torch.tensor([3, 2, 3]), right[0, 0])
    own = factors((1, 1, 1, 4, 5), seed=2)[0][0, 0, 0, :, None] * right[0, 0, :1]
    rows, own_rows = torch.zeros(2, 4, 5).double(), torch.zeros(2, 4, 5).double()
    rows.index_put_((hit.examples, hit.indices), hit.values, accumulate=True)
    own_rows[0, :2], own_rows[1, 2:] = own[:2], own[2:]
    contributions = {
        "outer": outer(left, right),
        "rows": hit,
        "per example": PerExample(values),
        "own rows": OwnRows(own, 2),
    }
    return contributions, {
        "outer": torch.einsum("bgto,bgti->boi", left, right),
        "rows": rows,
        "per example": values,
        "own rows": own_rows,
    }


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_mixture_is_summed_before_squaring(size: int) -> None:
    contributions, gradients = mixture()
    for kinds in combinations(contributions, size):
        chosen = [contributions[kind] for kind in kinds]
        expected = sum(gradients[kind] for kind in kinds)
        like = torch.zeros(4, 5, dtype=torch.float64)
        for n in range(2):
            torch.testing.assert_close(example_gradient(chosen, n, like), expected[n])
        total = torch.ones(4, 5, dtype=torch.float64)
        add_squares(total, chosen, 2, factor=3.0)
        torch.testing.assert_close(total, 1 + 9 * expected.square().sum(0))


@pytest.mark.parametrize("places", [1, 3, 9])
@pytest.mark.parametrize("size", [(4, 5), (256, 160)], ids=["several at once", "one at a time"])
def test_the_factor_is_squared(places: int, size: tuple[int, int]) -> None:
    left, right = factors((3, 2, places, *size))
    total = zeros_for(torch.empty(2 * size[0], size[1], dtype=torch.float64))
    add_squares(total, [outer(left, right)], 3, factor=0.5)
    expected = torch.einsum("bgto,bgti->bgoi", left, right).square().sum(0).flatten(0, 1)
    torch.testing.assert_close(total, expected / 4, rtol=1e-12, atol=1e-12)


def test_uses_with_other_groups_are_summed_before_squaring() -> None:
    one, three = factors((2, 1, 2, 6, 5)), factors((2, 3, 2, 2, 5), seed=1)
    total = zeros_for(torch.empty(6, 5, dtype=torch.float64))
    add_squares(total, [outer(*one), outer(*three)], 2)
    gradient = torch.einsum("bgto,bgti->bgoi", *one).flatten(1, 2)
    gradient += torch.einsum("bgto,bgti->bgoi", *three).flatten(1, 2)
    torch.testing.assert_close(total, gradient.square().sum(0))


def test_a_factor_given_a_few_examples_at_a_time() -> None:
    left, right = factors((7, 1, 9, 256, 160))
    asked: list[int] = []

    def some(start: int, stop: int) -> Tensor:
        asked.append(stop - start)
        return right[start:stop]

    total = torch.zeros(256, 160, dtype=torch.float64)
    add_squares(total, [Outer(left, some, at_once=3)], 7)
    expected = torch.einsum("bgto,bgti->boi", left, right).square().sum(0)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    assert max(asked) <= 3
