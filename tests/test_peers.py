"""The published formula and the measures of benchmarks/peers.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lit_merge import GradientMatching, merge_state_dicts

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from peers_cases import differing_entries, largest_difference
from peers_gradient_matching import merge_as_published

State = dict[str, torch.Tensor]


def state(seed: int, *, positive: bool = False) -> State:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    return {"w": value.square() if positive else value}


def test_the_published_formula_is_ours_with_sums_of_its_means() -> None:
    base, experts = state(0), [state(1), state(2)]
    means, prior = [state(3, positive=True), state(4, positive=True)], state(5, positive=True)
    theirs = merge_as_published(
        base, experts, means, prior, [30.0, 7.0], 11.0, scale=0.5, damping=1e-3
    )
    sums = [{"w": count * mean["w"]} for count, mean in zip((30, 7), means, strict=True)]
    ours = merge_state_dicts(
        base,
        experts,
        GradientMatching(scale=0.5, damping=1e-3),
        hessians=sums,
        base_hessian={"w": 11 * prior["w"]},
    )
    torch.testing.assert_close(theirs["w"], ours["w"])


def test_the_published_formula_entry_by_entry() -> None:
    merged = merge_as_published(
        {"w": torch.tensor([1.0])},
        [{"w": torch.tensor([3.0])}, {"w": torch.tensor([0.0])}],
        [{"w": torch.tensor([2.0])}, {"w": torch.tensor([1.0])}],
        {"w": torch.tensor([0.5])},
        [1.0, 2.0],
        2.0,
    )
    # h = (2, 2), h0 = 1: 1 + [(2 + 1)·2 + (2 + 1)·(−1)] / (2 + 2 + 1)
    torch.testing.assert_close(merged["w"], torch.tensor([1.6]))


def test_the_published_formula_has_no_guard_and_keeps_position_ids() -> None:
    zero = {"w": torch.zeros(1), "position_ids": torch.zeros(1)}
    one = {"w": torch.ones(1), "position_ids": torch.ones(1)}
    merged = merge_as_published(zero, [one], [zero], zero, [1.0], 1.0)
    assert merged["w"].isnan().all()
    assert merged["position_ids"] == 0
    merged = merge_as_published(zero, [one], [zero], zero, [1.0], 1.0, damping=1e-12)
    assert merged["w"] == 1


def test_differences_count_nan_as_infinite() -> None:
    one = {"w": torch.tensor([1.0, 2.0, torch.nan])}
    other = {"w": torch.tensor([1.0, 2.5, 3.0])}
    assert largest_difference(one, other) == float("inf")
    assert differing_entries(one, other) == 2
    assert largest_difference({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 0.75])}) == 0.25


def test_differences_want_the_same_tensors() -> None:
    with pytest.raises(ValueError, match=r"differing tensors: \['b'\]"):
        largest_difference({"w": torch.ones(1)}, {"w": torch.ones(1), "b": torch.ones(1)})
