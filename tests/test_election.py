"""The elected mean against a loop over entries on Python numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from lit_merge.methods.election import Divide, Sign, Weigh, elected_task_vector


def by_entries(
    columns: Sequence[Sequence[float]],
    weights: Sequence[float],
    sign: Sign,
    weigh: Weigh,
    divide: Divide,
) -> list[float]:
    merged = []
    for column in columns:
        weighted = [w * x for w, x in zip(weights, column, strict=True)]
        cast = weighted if weigh == "votes" else list(column)
        votes = [float((x > 0) - (x < 0)) for x in cast] if sign == "frequency" else cast
        plus = math.fsum(votes) >= 0
        elected = [t for t, x in enumerate(cast) if (x > 0 if plus else x < 0)]
        total = math.fsum(weighted[t] for t in elected)
        divisor = {
            "count": float(len(elected)),
            "weights": math.fsum(weights[t] for t in elected),
            "none": 1.0,
        }[divide]
        merged.append(total / divisor if divisor else total)
    return merged


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("weigh", ["values", "votes"])
@pytest.mark.parametrize(
    ("divide", "weights"),
    [
        *itertools.product(["count", "weights", "none"], [(1.0, 1.0, 1.0), (0.5, 2.0, 0.25)]),
        ("count", (1.0, -0.5, 0.0)),
        ("none", (1.0, -0.5, 0.0)),
    ],
)
def test_every_pattern_of_signs_is_merged_as_by_hand(
    divide: Divide, weights: tuple[float, ...], weigh: Weigh, sign: Sign
) -> None:
    columns = list(itertools.product([0.0, 1.0, -1.0, 0.375, -2.5], repeat=3))
    vectors = torch.tensor(columns).T.contiguous()
    expected = by_entries(columns, weights, sign, weigh, divide)
    result = elected_task_vector(vectors, weights, sign=sign, weigh=weigh, divide=divide)
    torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_float32_rounds_as_little_as_a_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(5, 2000, generator=generator) * 10 ** torch.randn(
        5, 2000, generator=generator
    )
    expected = by_entries(vectors.T.tolist(), [1.0] * 5, "total", "values", "count")
    result = elected_task_vector(vectors, [1.0] * 5).double()
    error = (result - torch.tensor(expected, dtype=torch.float64)).abs()
    assert bool((error <= 4e-7 * torch.tensor(expected).abs()).all())


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("divide", ["count", "weights", "none"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(bad: float, divide: Divide, sign: Sign) -> None:
    for column in itertools.product([bad, 0.0, 1.0, -1.0], repeat=3):
        if bad in column or any(map(math.isnan, column)):
            vectors = torch.tensor(column)[:, None]
            result = elected_task_vector(vectors, [1.0, 0.0, 2.0], sign=sign, divide=divide)
            assert not result.isfinite()


def test_vectors_are_left_as_they_were() -> None:
    vectors = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    before = vectors.clone()
    elected_task_vector(vectors, [1.0, 1.0, 1.0])
    assert torch.equal(vectors, before)
