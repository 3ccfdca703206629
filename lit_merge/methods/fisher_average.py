"""Fisher averaging: the mean of the experts, every weight weighed by how sure its expert is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_merge.methods.method import MergeMethod, ParameterSlice, weighted_sum
from lit_merge.methods.settings import check_number, check_numbers, check_total, per_task


def fisher_average(
    experts: Sequence[Tensor],
    hessians: Sequence[Tensor],
    weights: Sequence[float],
    *,
    floor: float,
) -> Tensor:
    r"""Return the maximum of the product of the experts' diagonal Gaussians.

    .. math:: θ = \sum_t λ_t \max(h_t, ε) θ_t \Big/ \sum_t λ_t \max(h_t, ε)

    Args:
        experts: :math:`θ_t`, of one shape and dtype.
        hessians: :math:`h_t ≥ 0`, of that shape and dtype.
        weights: :math:`λ_t ≥ 0`, not all zero.
        floor: :math:`ε ≥ 0`. With 0, an entry that no weighed expert has seen is averaged by
            the weights alone.
    """
    masses = [
        hessian.clamp(min=floor) * weight for hessian, weight in zip(hessians, weights, strict=True)
    ]
    total = torch.stack(masses).sum(dim=0)
    unseen = total == 0
    share = sum(weights)
    return weighted_sum(
        experts,
        [
            torch.where(unseen, weight / share, mass / total)
            for mass, weight in zip(masses, weights, strict=True)
        ],
    )


@dataclass(frozen=True)
class FisherAverage(MergeMethod):
    """The mean of the experts, weighed entry by entry with their Hessians.

    Args:
        weights: :math:`λ_t ≥ 0`, by task name or in the experts' order; None for equal ones.
        floor: The least Hessian entry that counts, in units of the sum over examples.

    Raises:
        InputError: A weight is negative or not finite, all are zero, or the floor is negative.

    References:
        Matena & Raffel (2022), arXiv:2111.09832.

    Note:
        The authors weigh with the mean over examples, Hessians here are sums: an expert with more
        training examples counts for more. Weights of one over the number of examples undo that.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    weights: Mapping[str, float] | Sequence[float] | None = None
    floor: float = 1e-6

    def __post_init__(self) -> None:
        check_number("FisherAverage.floor", self.floor, low=0)
        if self.weights is not None:
            check_numbers("FisherAverage.weights", self.weights, low=0)
            check_total("FisherAverage.weights", self.weights)

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there is one weight per task."""
        per_task("FisherAverage.weights", 1.0 if self.weights is None else self.weights, tasks)

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice."""
        weights = 1.0 if self.weights is None else self.weights
        return fisher_average(
            p.experts,
            p.require_hessians(),
            per_task("FisherAverage.weights", weights, p.tasks),
            floor=self.floor,
        )
