"""Averages of the experts' weights, which need neither a base nor curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lit_merge.methods.method import MergeMethod, ParameterSlice, weighted_sum
from lit_merge.methods.settings import check_numbers, check_total, per_task


def average(experts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    r"""Return the weighted mean of the experts.

    .. math:: θ = \sum_t w_t θ_t \Big/ \sum_t w_t

    Args:
        experts: :math:`θ_t`, of one shape and dtype.
        weights: :math:`w_t`, whose sum is not zero.
    """
    total = sum(weights)
    return weighted_sum(experts, [weight / total for weight in weights])


@dataclass(frozen=True)
class Average(MergeMethod):
    """The plain mean of the experts' weights.

    References:
        Wortsman et al. (2022), arXiv:2203.05482, "model soups".
    """

    carries_nan: ClassVar[bool] = True

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice."""
        return average(p.experts, [1.0] * len(p.experts))


@dataclass(frozen=True)
class WeightedAverage(MergeMethod):
    """The weighted mean of the experts' weights.

    Args:
        weights: One per expert, by task name or in the experts' order. They are divided by their
            sum, so that only their proportions count. Negative ones extrapolate.

    Raises:
        InputError: A weight is not finite, or they sum to zero.
    """

    carries_nan: ClassVar[bool] = True

    weights: Mapping[str, float] | Sequence[float]

    def __post_init__(self) -> None:
        check_numbers("WeightedAverage.weights", self.weights)
        check_total("WeightedAverage.weights", self.weights)

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there is one weight per task."""
        per_task("WeightedAverage.weights", self.weights, tasks)

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice."""
        return average(p.experts, per_task("WeightedAverage.weights", self.weights, p.tasks))
