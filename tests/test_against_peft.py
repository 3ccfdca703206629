"""The sparse methods against those of PEFT, an independent implementation."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from lit_merge.counter import kept, key_of
from lit_merge.methods import (
    DARE,
    TIES,
    MagnitudePrune,
    MergeMethod,
    ParameterSlice,
    TaskArithmetic,
)

merge_utils = pytest.importorskip("peft.utils.merge_utils")

TASKS = ("a", "b", "c", "d")
WEIGHTS = {"a": 1.0, "b": 0.25, "c": 2.0, "d": 0.5}
COEFFICIENTS = torch.tensor(list(WEIGHTS.values()))
SHAPE = (40, 13)
Sign = Literal["total", "frequency"]


@pytest.fixture
def p() -> ParameterSlice:
    generator = torch.Generator().manual_seed(3)
    experts = tuple(torch.randn(SHAPE, generator=generator) * 3**i for i in range(4))
    return ParameterSlice("w", TASKS, experts, base=torch.randn(SHAPE, generator=generator))


def vectors(p: ParameterSlice) -> list[Tensor]:
    return [expert - p.require_base() for expert in p.experts]


def check(method: MergeMethod, p: ParameterSlice, expected: Tensor) -> None:
    torch.testing.assert_close(method(p) - p.require_base(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.1, 0.35, 0.8])
def test_ties(p: ParameterSlice, density: float, sign: Sign) -> None:
    ours = TIES(density, scope="tensor", sign=sign, weights=WEIGHTS)
    check(ours, p, merge_utils.ties(vectors(p), COEFFICIENTS, density, sign))


@pytest.mark.parametrize("density", [0.1, 0.8])
def test_magnitude_prune(p: ParameterSlice, density: float) -> None:
    ours = MagnitudePrune(density, WEIGHTS, scope="tensor")
    check(ours, p, merge_utils.magnitude_prune(vectors(p), COEFFICIENTS, density))


def test_task_arithmetic(p: ParameterSlice) -> None:
    check(TaskArithmetic(WEIGHTS), p, merge_utils.task_arithmetic(vectors(p), COEFFICIENTS))


@pytest.mark.parametrize("density", [0.2, 0.7])
@pytest.mark.parametrize("sign", [None, "total", "frequency"])
def test_dare_with_our_random_numbers_in_its_place(
    p: ParameterSlice, density: float, sign: Sign | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = iter(TASKS)

    def bernoulli(tensor: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:
        like = tensor if input is None else input
        assert like is not None
        key = key_of(5, next(tasks), "w")
        return kept(key, 0, like.numel(), float(like.flatten()[0]), like.device).view(SHAPE).float()

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    if sign is None:
        expected = merge_utils.dare_linear(vectors(p), COEFFICIENTS, density)
        check(DARE(density, WEIGHTS, seed=5), p, expected)
    else:
        expected = merge_utils.dare_ties(vectors(p), COEFFICIENTS, density, sign)
        check(DARE(density, WEIGHTS, seed=5, combine="ties", sign=sign), p, expected)
