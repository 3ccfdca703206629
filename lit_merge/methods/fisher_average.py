"""Fisher averaging: the mean of the experts, every weight weighed by how sure its expert is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods.method import (
    LookAtAll,
    MergeMethod,
    ParameterSlice,
    looking_at,
    weighted_sum,
)
from lit_merge.methods.settings import (
    check_choice,
    check_number,
    check_numbers,
    check_total,
    per_task,
)


def fisher_masses(
    hessians: Sequence[Tensor],
    weights: Sequence[float],
    *,
    floor: float,
    floor_mode: Literal["clamped", "added"] = "clamped",
) -> list[Tensor]:
    r"""Return how much each expert's entries count, of the Hessians' shape.

    That is :math:`λ_t \max(h_t, ε)`, or :math:`λ_t (h_t + ε)` where the floor is added.

    Args:
        hessians: :math:`h_t ≥ 0`.
        weights: :math:`λ_t ≥ 0`.
        floor: :math:`ε ≥ 0`.
        floor_mode: Which of the two.
    """
    floored = (
        hessian.clamp(min=floor) if floor_mode == "clamped" else hessian + floor
        for hessian in hessians
    )
    return [hessian.mul_(weight) for hessian, weight in zip(floored, weights, strict=True)]


def fisher_average(
    experts: Sequence[Tensor], masses: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    r"""Return the maximum of the product of the experts' diagonal Gaussians.

    .. math:: θ = \sum_t m_t θ_t \Big/ \sum_t m_t

    Args:
        experts: :math:`θ_t`, of one shape and dtype.
        masses: :math:`m_t ≥ 0`, of that shape and dtype.
        weights: :math:`λ_t ≥ 0`, not all zero: where all masses are zero, because no expert has
            seen an entry and there is no floor, these average it alone.
    """
    total = weighted_sum(masses, [1.0] * len(masses))
    shares: list[Tensor] = [mass / total for mass in masses]
    unseen = total == 0
    if unseen.any():
        alone = [weight / sum(weights) for weight in weights]
        shares = [torch.where(unseen, a, s) for a, s in zip(alone, shares, strict=True)]
    return weighted_sum(experts, shares)


def squared_norms(p: ParameterSlice) -> Tensor:
    """Return the sums of the Hessians' squared entries in this slice, ``[T]`` in float64."""
    return torch.stack([h.double().square().sum() for h in p.require_hessians()]).cpu()


@dataclass(frozen=True)
class FisherAverage(MergeMethod):
    r"""The mean of the experts, weighed entry by entry with their Hessians.

    .. math:: θ = \sum_t λ_t \max(h_t, ε) θ_t \Big/ \sum_t λ_t \max(h_t, ε)

    Args:
        weights: :math:`λ_t ≥ 0`, by task name or in the experts' order; None for equal ones.
        floor: The least Hessian entry that counts, in units of the sum over examples. With 0, an
            entry that no weighed expert has seen is averaged by the weights alone.
        floor_mode: Whether the floor is the least value of an entry (``"clamped"``, the authors')
            or added to all of them (``"added"``), and to the norms that they are divided by.
        normalize: ``"norm"`` divides every expert's Hessian, after the floor, by the Hessian's L2
            norm over all merged tensors, so that experts count the same on the whole.

    Raises:
        InputError: A weight is negative or not finite, all are zero, the floor is negative, a
            word unknown, or a norm to divide by is zero.

    References:
        Matena & Raffel (2022), arXiv:2111.09832.

    Note:
        The authors weigh with the mean over examples, Hessians here are sums: an expert with more
        training examples counts for more. Weights of one over the number of examples undo that,
        as does ``normalize="norm"``, their code's default; a floor of theirs is then to be
        multiplied by that number. Their code gives a floor to the first model only unless told
        otherwise; here all have one.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    weights: Mapping[str, float] | Sequence[float] | None = None
    floor: float = 1e-6
    floor_mode: Literal["clamped", "added"] = "clamped"
    normalize: Literal["none", "norm"] = "none"

    def __post_init__(self) -> None:
        check_number("FisherAverage.floor", self.floor, low=0)
        check_choice("FisherAverage.floor_mode", self.floor_mode, ("clamped", "added"))
        check_choice("FisherAverage.normalize", self.normalize, ("none", "norm"))
        if self.weights is not None:
            check_numbers("FisherAverage.weights", self.weights, low=0)
            check_total("FisherAverage.weights", self.weights)

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there is one weight per task."""
        self._weights(tasks)

    def survey(self, look_at_all: LookAtAll) -> tuple[float, ...] | None:
        """Find the norms of the experts' Hessians, where they are to be divided by them.

        Raises:
            InputError: One is zero.
        """
        if self.normalize == "none":
            return None
        squares = sum(part for _, part in look_at_all(squared_norms))
        added = self.floor if self.floor_mode == "added" else 0.0
        norms = tuple(math.sqrt(square) + added for square in torch.as_tensor(squares).tolist())
        if 0.0 in norms:
            raise InputError(
                f"FisherAverage.normalize: 'norm' divides by the Hessians' norms, which must be "
                f"positive; got 0 for expert {norms.index(0.0) + 1} of {len(norms)}, whose Hessian "
                f"is zero in all merged tensors. Compute its curvature, or set normalize='none'."
            )
        return norms

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice; without a survey it counts as all there is."""
        masses, weights = self._masses(p)
        return fisher_average(p.experts, masses, weights)

    def hessian(self, p: ParameterSlice) -> Tensor:
        r"""Return the sum of what the experts' entries counted, :math:`\sum_t λ_t \max(h_t, ε)`.

        With it, averaging this result with a further expert gives what averaging all of them at
        once does. With ``normalize="norm"`` it is in units of the norms.
        """
        masses, _ = self._masses(p)
        return weighted_sum(masses, [1.0] * len(masses))

    def _weights(self, tasks: Sequence[str]) -> tuple[float, ...]:
        weights = 1.0 if self.weights is None else self.weights
        return per_task("FisherAverage.weights", weights, tasks)

    def _masses(self, p: ParameterSlice) -> tuple[list[Tensor], tuple[float, ...]]:
        """Return what each expert's entries count, and the factors of their Hessians in it."""
        weights = self._weights(p.tasks)
        norms = self.survey(looking_at([p])) if p.fact is None else p.fact
        if norms is not None:
            weights = tuple(weight / norm for weight, norm in zip(weights, norms, strict=True))
        masses = fisher_masses(
            p.require_hessians(), weights, floor=self.floor, floor_mode=self.floor_mode
        )
        return masses, weights
