"""RegMean: every linear layer merged so that its outputs stay near to those of the experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lit_merge.methods.average import average
from lit_merge.methods.method import MergeMethod, ParameterSlice
from lit_merge.methods.settings import check_number, check_numbers, check_total, per_task
from lit_merge.methods.weight_curvature import GramCurvature
from lit_merge.methods.whole_weight import gram_matrices, merge_weight


@dataclass(frozen=True)
class RegMean(MergeMethod):
    r"""The weights whose outputs fit those of all experts best, each on its own inputs.

    .. math:: W = \Big(\sum_t λ_t W_t \tilde G_t\Big) \Big(\sum_t λ_t \tilde G_t\Big)^{-1}

    with :math:`\tilde G_t` the Gram matrix of the layer's inputs, its off-diagonal entries scaled
    down. Without that scaling it is the least-squares fit over the experts' training inputs.
    Tensors without a Gram, such as biases, are averaged.

    Args:
        off_diagonal: What the off-diagonal entries are multiplied with: 0 to 1.
        ridge: How much of the identity is added to the sum of the Grams, in units of its mean
            diagonal entry. It ties what the inputs say little about to the experts' mean. Grams
            that were stored in float32 are nothing but rounding below some 1e-5 of it.
        weights: :math:`λ_t ≥ 0`, by task name or in the experts' order; None for equal ones.

    Raises:
        InputError: A number is out of its range, or the sum of the Grams is singular.

    References:
        Jin et al. (2023), arXiv:2212.09849.

    Note:
        The paper scales by 0.9, and by 0.1 for T5; the authors' code does not unless told to, and
        its configurations have 0.9 or 0.1. There is no ridge in either. The authors' Grams are
        means over an expert's tokens, those here are sums: an expert with more of them counts for
        more. Weights of one over the number of tokens undo that. Solved in float64.
    """

    elementwise: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    off_diagonal: float = 0.9
    ridge: float = 1e-4
    weights: Mapping[str, float] | Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_number("RegMean.off_diagonal", self.off_diagonal, low=0, high=1)
        check_number("RegMean.ridge", self.ridge, low=0)
        if self.weights is not None:
            check_numbers("RegMean.weights", self.weights, low=0)
            check_total("RegMean.weights", self.weights)

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there is one weight per task."""
        self._weights(tasks)

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one tensor.

        Raises:
            InputError: A Gram does not fit it, or their sum is singular.
        """
        weights = self._weights(p.tasks)
        grams = gram_matrices(p, self.off_diagonal)
        if grams is None:
            return average(p.experts, weights)
        mean = average([expert.double() for expert in p.experts], weights)
        return merge_weight(p, mean, GramCurvature(grams, weights, self.ridge), "RegMean")

    def _weights(self, tasks: Sequence[str]) -> tuple[float, ...]:
        return per_task("RegMean.weights", 1.0 if self.weights is None else self.weights, tasks)
