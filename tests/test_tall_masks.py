"""TALL masks and consensus against loops over entries on Python numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.methods import Consensus, ParameterSlice, TALLMasks

TASKS = ("a", "b", "c")
THRESHOLDS = {"a": 0.2, "b": 0.6, "c": 1.0}


@pytest.fixture
def p() -> ParameterSlice:
    generator = torch.Generator().manual_seed(2)

    def normal() -> torch.Tensor:
        return torch.randn(20, 15, generator=generator, dtype=torch.float64)

    return ParameterSlice("w", TASKS, (normal(), normal(), normal()), base=normal())


def columns_of(p: ParameterSlice) -> list[tuple[float, ...]]:
    vectors = ((e - p.require_base()).flatten().tolist() for e in p.experts)
    return list(zip(*vectors, strict=True))


def uses(column: tuple[float, ...], scale: float) -> list[bool]:
    total = scale * math.fsum(column)
    return [
        abs(x) > threshold * abs(total - x)
        for x, threshold in zip(column, THRESHOLDS.values(), strict=True)
    ]


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_task_uses_what_the_merge_changes_little(p: ParameterSlice, scale: float) -> None:
    masks = TALLMasks(THRESHOLDS, scale=scale).task_masks(p)
    expected = [uses(column, scale) for column in columns_of(p)]
    assert list(zip(*(m.flatten().tolist() for m in masks), strict=True)) == [
        tuple(bits) for bits in expected
    ]
    assert 0 < sum(map(sum, expected)) < 3 * len(expected)


def test_the_shared_vector_is_the_scaled_sum(p: ParameterSlice) -> None:
    base = p.require_base()
    expected = [
        b + 0.3 * math.fsum(column)
        for b, column in zip(base.flatten().tolist(), columns_of(p), strict=True)
    ]
    assert TALLMasks(scale=0.3)(p).flatten().tolist() == pytest.approx(expected)


def test_a_threshold_of_zero_lets_every_task_use_what_it_changed(p: ParameterSlice) -> None:
    assert all(bool(mask.all()) for mask in TALLMasks(0.0).task_masks(p))
    experts = (p.require_base().clone(), *p.experts[1:])
    unchanged = ParameterSlice("w", TASKS, experts, base=p.base)
    assert not TALLMasks(0.0).task_masks(unchanged)[0].any()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_consensus_keeps_what_k_tasks_use(p: ParameterSlice, k: int) -> None:
    result = Consensus(k, THRESHOLDS, scale=0.7)(p).flatten().tolist()
    base = p.require_base().flatten().tolist()
    for b, column, got in zip(base, columns_of(p), result, strict=True):
        kept = sum(uses(column, 1.0)) >= k
        assert got == pytest.approx(b + (0.7 * math.fsum(column) if kept else 0.0))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (TALLMasks, {"threshold": -0.1}, r"^TALLMasks\.threshold: must be .* at least 0"),
        (TALLMasks, {"threshold": {"a": -1}}, r"^TALLMasks\.threshold\['a'\]: must be"),
        (TALLMasks, {"scale": math.nan}, r"^TALLMasks\.scale: must be a finite number"),
        (Consensus, {"threshold": -0.1}, r"^Consensus\.threshold: must be .* at least 0"),
        (Consensus, {"scale": math.nan}, r"^Consensus\.scale: must be a finite number"),
        (Consensus, {"k": 0}, r"^Consensus\.k: must be a whole number of at least 1; got 0"),
        (Consensus, {"k": 1.5}, r"^Consensus\.k: must be a whole number of at least 1; got 1\.5"),
    ],
)
def test_wrong_settings_are_refused(method: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        method(**settings)


def test_settings_that_do_not_fit_the_tasks_are_refused() -> None:
    with pytest.raises(InputError, match=r"^Consensus\.k: must be at most .* experts, 2; got 3"):
        Consensus(3).check_tasks(("a", "b"))
    for method in (TALLMasks({"a": 1.0}), Consensus(1, {"a": 1.0})):
        with pytest.raises(InputError, match=r"\.threshold: must have a number for every task"):
            method.check_tasks(("a", "b"))
