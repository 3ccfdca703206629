"""The elastic penalty, against a loop, and where it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, write_expert
from lit_merge.merged.elastic import ElasticPenalty, read_merged_gaussian
from tests.tiny_merge import base_net


def test_the_penalty_is_the_weighted_square_in_units_of_the_average_precision() -> None:
    means = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.0])}
    precisions = {"a": torch.tensor([2.0, 4.0]), "b": torch.tensor([6.0])}
    penalty = ElasticPenalty(means, precisions, strength=3.0)
    weights = {"a": torch.tensor([2.0, 2.5]), "b": torch.tensor([-1.0]), "c": torch.ones(3)}
    average = (2 + 4 + 6) / 3
    expected = 1.5 * (2 * 1.0 + 4 * 0.25 + 6 * 1.0) / average
    assert float(penalty(weights)) == pytest.approx(expected)
    assert float(penalty(means)) == 0
    scaled = ElasticPenalty(means, {n: 100 * p for n, p in precisions.items()}, strength=3.0)
    assert float(scaled(weights)) == pytest.approx(expected)


def test_equal_precisions_make_it_weight_decay_toward_the_mean() -> None:
    mean = torch.randn(5)
    penalty = ElasticPenalty({"a": mean}, {"a": torch.full((5,), 7.0)}, strength=0.2)
    weight = torch.randn(5, requires_grad=True)
    penalty({"a": weight}).backward()
    torch.testing.assert_close(weight.grad, 0.2 * (weight.detach() - mean))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_precisions_that_say_nothing_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="elastic: must find a finite precision above 0"):
        ElasticPenalty({"a": torch.ones(2)}, {"a": torch.full((2,), value)}, strength=1.0)


def test_mean_and_precision_are_those_of_the_folder(tmp_path: Path) -> None:
    weights = base_net().state_dict()
    hessian = {name: value.abs() + 1 for name, value in weights.items()}
    write_expert(tmp_path / "full", weights=weights, info=ExpertInfo(), hessian=hessian)
    means, precisions = read_merged_gaussian(tmp_path / "full", ["body.0.weight"])
    assert torch.equal(means["body.0.weight"], weights["body.0.weight"])
    assert torch.equal(precisions["body.0.weight"], hessian["body.0.weight"])
    with pytest.raises(InputError, match=r"must hold every weight, for elastic; .*'other'"):
        read_merged_gaussian(tmp_path / "full", ["body.0.weight", "other"])


def test_a_folder_without_a_hessian_is_named(tmp_path: Path) -> None:
    write_expert(tmp_path / "bare", weights=base_net().state_dict(), info=ExpertInfo())
    with pytest.raises(InputError, match=r"bare: must hold hessian.safetensors for elastic"):
        read_merged_gaussian(tmp_path / "bare", ["body.0.weight"])
