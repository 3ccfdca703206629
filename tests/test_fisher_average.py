from __future__ import annotations

import torch

from lit_merge.methods import Average, FisherAverage, ParameterSlice, WeightedAverage

EXPERTS = (
    torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
    torch.tensor([5.0, 6.0, 7.0], dtype=torch.float64),
)
HESSIANS = (
    torch.tensor([1.0, 0.0, 1e-19], dtype=torch.float64),
    torch.tensor([3.0, 2.0, 3e-19], dtype=torch.float64),
)
SLICE = ParameterSlice("w", ("a", "b"), EXPERTS, hessians=HESSIANS)


def test_experts_are_weighed_by_their_hessians() -> None:
    merged = FisherAverage(floor=0.0)(SLICE)
    expected = torch.tensor([(1 + 15) / 4, 6.0, (3 + 21) / 4], dtype=torch.float64)
    torch.testing.assert_close(merged, expected)


def test_entries_below_the_floor_count_as_the_floor() -> None:
    merged = FisherAverage(floor=1.0)(SLICE)
    expected = torch.tensor([(1 + 15) / 4, (2 + 12) / 3, 5.0], dtype=torch.float64)
    torch.testing.assert_close(merged, expected)


def test_weights_multiply_the_hessians() -> None:
    merged = FisherAverage({"b": 1.0, "a": 3.0}, floor=0.0)(SLICE)
    expected = torch.tensor([3.0, 6.0, (9 + 21) / 6], dtype=torch.float64)
    torch.testing.assert_close(merged, expected)


def test_equal_hessians_give_the_average() -> None:
    same = ParameterSlice("w", ("a", "b"), EXPERTS, hessians=(HESSIANS[1],) * 2)
    torch.testing.assert_close(FisherAverage()(same), Average()(same))


def test_without_floor_entries_that_nobody_has_seen_are_averaged_by_weight() -> None:
    zeros = (torch.zeros(3, dtype=torch.float64),) * 2
    unseen = ParameterSlice("w", ("a", "b"), EXPERTS, hessians=zeros)
    merged = FisherAverage([1.0, 3.0], floor=0.0)(unseen)
    torch.testing.assert_close(merged, WeightedAverage([1.0, 3.0])(unseen))


def test_an_expert_of_weight_zero_does_not_count() -> None:
    assert torch.equal(FisherAverage([0.0, 1.0])(SLICE), EXPERTS[1])


def test_entries_near_the_smallest_floats_keep_their_proportions() -> None:
    tiny = (torch.tensor([1e-19]), torch.tensor([3e-19]))
    p = ParameterSlice("w", ("a", "b"), (torch.zeros(1), torch.ones(1)), hessians=tiny)
    torch.testing.assert_close(FisherAverage(floor=0.0)(p), torch.tensor([0.75]))
