"""TIES: trim small changes, elect a sign per entry, average those that agree with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lit_merge.methods.election import Divide, Sign, Weigh, elected_task_vector
from lit_merge.methods.method import LookAtAll, MergeMethod, ParameterSlice, looking_at
from lit_merge.methods.order_statistics import (
    Scope,
    Thresholds,
    group_of,
    kth_magnitudes,
    trimmed,
)
from lit_merge.methods.settings import check_choice, check_number, check_numbers, per_task


def elect_and_merge(
    base: Tensor,
    experts: Sequence[Tensor],
    thresholds: Sequence[float],
    *,
    scale: float,
    weights: Sequence[float],
    sign: Sign = "total",
    weigh: Weigh = "values",
    divide: Divide = "count",
) -> Tensor:
    r"""Return the base plus the scaled mean of the trimmed task vectors of the elected sign.

    Args:
        base: :math:`θ_0`.
        experts: :math:`θ_t`, of the base's shape and dtype.
        thresholds: The least magnitude that is kept, per expert; smaller ones count as zero.
        scale: What the mean is multiplied with.
        weights: :math:`w_t`, one per expert.
        sign: See :func:`lit_merge.methods.election.elected_task_vector`.
        weigh: See there.
        divide: See there.

    Note:
        One expert of weight one is interpolated, so that it comes back bit for bit where scale is
        one and nothing is trimmed.
    """
    vectors = (
        trimmed(expert - base, threshold)
        for expert, threshold in zip(experts, thresholds, strict=True)
    )
    if len(experts) == 1 and (weights[0] == 1 or (divide == "weights" and weights[0] > 0)):
        return torch.lerp(base, experts[0], next(vectors).sgn().abs_().mul_(scale))
    merged = elected_task_vector(vectors, weights, sign=sign, weigh=weigh, divide=divide)
    return torch.add(base, merged, alpha=scale)


@dataclass(frozen=True)
class TIES(MergeMethod):
    r"""Trim, elect sign, and merge.

    .. math:: θ = θ_0 + λ \frac{\sum_{t ∈ A} w_t \hat τ_t}{|A|}, \quad
        A = \{t : \operatorname{sgn} \hat τ_t = \operatorname{sgn} \sum_s \hat τ_s ≠ 0\}

    entry by entry, with :math:`\hat τ_t` the task vector without its small entries.

    Args:
        density: The share of each task vector's entries to keep, the largest in magnitude: 0 to 1.
        scale: :math:`λ`, what the merged task vector is multiplied with.
        scope: Whether that share is of the whole task vector over all merged tensors
            (``"global"``, as in the paper) or of every tensor on its own (``"tensor"``).
        sign: Whether entries elect their sign by their sum (``"total"``, as in the paper) or by
            one vote each (``"frequency"``). Where both signs are even, plus is elected.
        weights: :math:`w_t`, by task name or in the experts' order; None for ones.
        weigh: Whether the weights come after the election (``"values"``) or before it
            (``"votes"``).
        divide: What the sum of the elected is divided by: their number (``"count"``, as in the
            paper), the sum of their weights (``"weights"``), or nothing (``"none"``).
        keep: How many of n entries that share is: ⌊density·n⌋ (``"floor"``) or one more
            (``"floor+1"``, as in the authors' code).

    Raises:
        InputError: A number is out of its range or a word unknown.

    References:
        Yadav et al. (2023), arXiv:2306.01708.

    Note:
        Entries that equal the smallest kept one are all kept, so that the result does not depend
        on any order. Which that is is a fact of whole tensors, found by a survey before the merge,
        so that chunks and shards can be merged in either scope. A slice merged without a survey
        counts as the whole task vector. Magnitudes are compared in float32. The authors' code
        elects for entries whose sum is exactly zero what most entries of the model elect; here it
        is plus.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    carries_nan: ClassVar[bool] = True
    linear_in_scale: ClassVar[bool] = True

    density: float = 0.2
    scale: float = 1.0
    scope: Scope = "global"
    sign: Sign = "total"
    weights: Mapping[str, float] | Sequence[float] | None = None
    weigh: Weigh = "values"
    divide: Divide = "count"
    keep: Literal["floor", "floor+1"] = "floor"

    def __post_init__(self) -> None:
        check_number("TIES.density", self.density, low=0, high=1)
        check_number("TIES.scale", self.scale)
        check_choice("TIES.scope", self.scope, ("global", "tensor"))
        check_choice("TIES.sign", self.sign, ("total", "frequency"))
        if self.weights is not None:
            check_numbers("TIES.weights", self.weights)
        check_choice("TIES.weigh", self.weigh, ("values", "votes"))
        check_choice("TIES.divide", self.divide, ("count", "weights", "none"))
        check_choice("TIES.keep", self.keep, ("floor", "floor+1"))

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there is a weight for every task."""
        self._weights(tasks)

    def survey(self, look_at_all: LookAtAll) -> Thresholds:
        """Find every expert's threshold: a sample, and a pass or two."""
        more = 1 if self.keep == "floor+1" else 0

        def rank(size: int) -> tuple[int]:
            return (min(int(self.density * size) + more, size),)

        return kth_magnitudes(look_at_all, rank, self.scope)

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice."""
        base = p.require_base()
        fact: Thresholds = self.survey(looking_at([p])) if p.fact is None else p.fact
        thresholds = fact[group_of(p.name, self.scope)]
        return elect_and_merge(
            base,
            p.experts,
            [threshold for (threshold,) in thresholds],
            scale=self.scale,
            weights=self._weights(p.tasks),
            sign=self.sign,
            weigh=self.weigh,
            divide=self.divide,
        )

    def _weights(self, tasks: Sequence[str]) -> tuple[float, ...]:
        return per_task("TIES.weights", 1.0 if self.weights is None else self.weights, tasks)
