"""What all estimators share."""

from __future__ import annotations

import pytest
import torch

from lit_merge.curvature import CurvatureEstimator, PerExampleFisher, SquaredBatchGradient
from lit_merge.curvature.estimator import widen, zeros_for


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_squares_are_summed_in_single_precision_at_least(
    dtype: torch.dtype, wide: torch.dtype
) -> None:
    assert widen(torch.ones(2, dtype=dtype)).dtype == wide
    assert zeros_for(torch.ones(2, dtype=dtype)).dtype == wide


def test_sums_of_a_convolution_are_stored_channels_last() -> None:
    zeros = zeros_for(torch.ones(8, 4, 3, 2))
    assert zeros.shape == (8, 4, 3, 2)
    assert zeros.permute(0, 2, 3, 1).is_contiguous()
    assert zeros_for(torch.ones(())).shape == ()


def test_sums_made_in_inference_mode_can_be_added_to_outside() -> None:
    with torch.inference_mode():
        zeros = zeros_for(torch.ones(2))
    assert not zeros.is_inference()


@pytest.mark.parametrize("estimator", [PerExampleFisher, SquaredBatchGradient])
def test_an_estimator_says_what_it_is(estimator: type[CurvatureEstimator]) -> None:
    assert issubclass(estimator, CurvatureEstimator)
    assert estimator.exact != estimator.sharded  # so far, one or the other
    assert estimator.name == estimator.name.lower()
