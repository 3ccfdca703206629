from __future__ import annotations

import torch

from lit_merge.methods import Average, ParameterSlice, WeightedAverage

EXPERTS = (torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0]), torch.tensor([8.0, 0.0]))
SLICE = ParameterSlice("w", ("a", "b", "c"), EXPERTS)


def test_average_is_the_mean() -> None:
    torch.testing.assert_close(Average()(SLICE), torch.tensor([4.0, 0.0]))


def test_weights_are_divided_by_their_sum() -> None:
    expected = torch.tensor([(1 + 2 * 3 + 8) / 4, (2 - 2 * 2) / 4])
    torch.testing.assert_close(WeightedAverage([1, 2, 1])(SLICE), expected)
    torch.testing.assert_close(WeightedAverage([0.5, 1.0, 0.5])(SLICE), expected)


def test_weights_by_name_go_to_their_task() -> None:
    by_name = WeightedAverage({"c": 3.0, "a": 1.0, "b": 2.0})
    assert torch.equal(by_name(SLICE), WeightedAverage([1.0, 2.0, 3.0])(SLICE))


def test_negative_weights_extrapolate() -> None:
    pair = ParameterSlice("w", ("a", "b"), EXPERTS[:2])
    expected = 2 * EXPERTS[0] - EXPERTS[1]
    torch.testing.assert_close(WeightedAverage([2.0, -1.0])(pair), expected)
