"""MaTS: the experts' mean under matrices of curvature, in blocks of one weight each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lit_merge.methods.average import average
from lit_merge.methods.method import MergeMethod, ParameterSlice
from lit_merge.methods.settings import (
    check_choice,
    check_count,
    check_number,
    check_numbers,
    check_total,
    per_task,
)
from lit_merge.methods.weight_curvature import (
    DiagonalCurvature,
    GramCurvature,
    KroneckerCurvature,
    WeightCurvature,
)
from lit_merge.methods.whole_weight import (
    as_matrix,
    gram_matrices,
    kronecker_factors,
    merge_weight,
)

NEEDS = {"diagonal": "hessian", "gram": "gram", "kronecker": "kronecker"}


@dataclass(frozen=True)
class MaTS(MergeMethod):
    r"""The solution of the experts' linear systems together: matching models in their subspaces.

    .. math:: \Big(\sum_t λ_t A_t\Big) θ = \sum_t λ_t A_t θ_t

    Args:
        blocks: What :math:`A_t` is for one weight: the diagonal of its Hessian (``"diagonal"``:
            Fisher averaging), the Gram matrix of its layer's inputs (``"gram"``: RegMean), or that
            of the inputs times that of the output gradients (``"kronecker"``). Tensors without a
            Gram or without factors, such as biases, are averaged.
        weights: :math:`λ_t ≥ 0`, by task name or in the experts' order; None for equal ones.
        off_diagonal: What the off-diagonal entries of Grams and factors are multiplied with: 0 to
            1. Nothing to the diagonal.
        ridge: How much of the identity is added to :math:`\sum_t λ_t A_t`, in units of its mean
            diagonal entry. It ties what the curvature says little about to the experts' mean.
        factor_damping: How much of the identity is added to each of two Kronecker factors first,
            in units of its own mean diagonal entry: what makes up for their rounding in float32.
        iterations: The most steps of conjugate gradients, for ``"kronecker"``. The other blocks
            are solved in closed form.
        tolerance: The residual at which they stop, as a share of the first. At 1e-3 the excess
            loss that the curvature tells is within some 1e-4 of its least; less costs more steps.

    Raises:
        InputError: A number is out of its range, a word unknown, the system singular, or the
            tolerance not reached.

    References:
        Tam, Bansal & Raffel (2024), arXiv:2312.04339.

    Note:
        The authors run a number of steps of conjugate gradients for every block, without a
        preconditioner, and take the result as it is, so that the number of steps and the start
        are settings to tune. Here they start at the mean and go on until the system is solved,
        which has one result. Solved in float64.
    """

    elementwise: ClassVar[bool] = False

    blocks: Literal["diagonal", "gram", "kronecker"] = "kronecker"
    weights: Mapping[str, float] | Sequence[float] | None = None
    off_diagonal: float = 1.0
    ridge: float = 1e-4
    factor_damping: float = 1e-5
    iterations: int = 200
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        check_choice("MaTS.blocks", self.blocks, tuple(NEEDS))
        check_number("MaTS.off_diagonal", self.off_diagonal, low=0, high=1)
        check_number("MaTS.ridge", self.ridge, low=0)
        check_number("MaTS.factor_damping", self.factor_damping, low=0)
        check_count("MaTS.iterations", self.iterations)
        check_number("MaTS.tolerance", self.tolerance, low=0)
        if self.weights is not None:
            check_numbers("MaTS.weights", self.weights, low=0)
            check_total("MaTS.weights", self.weights)

    @property
    def needs(self) -> frozenset[str]:
        """What the blocks are made of."""
        return frozenset({NEEDS[self.blocks]})

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there is one weight per task."""
        self._weights(tasks)

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one tensor.

        Raises:
            InputError: A block does not fit it, or the system cannot be solved.
        """
        weights = self._weights(p.tasks)
        curvature = self._curvature(p, weights)
        if curvature is None:
            return average(p.experts, weights)
        mean = average([expert.double() for expert in p.experts], weights)
        return merge_weight(p, mean, curvature, "MaTS")

    def _curvature(self, p: ParameterSlice, weights: tuple[float, ...]) -> WeightCurvature | None:
        if self.blocks == "diagonal":
            hessians = [as_matrix(hessian) for hessian in p.require_hessians()]
            return DiagonalCurvature(hessians, weights, self.ridge)
        if self.blocks == "gram":
            grams = gram_matrices(p, self.off_diagonal)
            return None if grams is None else GramCurvature(grams, weights, self.ridge)
        factors = kronecker_factors(p, off_diagonal=self.off_diagonal, damping=self.factor_damping)
        if factors is None:
            return None
        return KroneckerCurvature(*factors, weights, self.ridge, self.iterations, self.tolerance)

    def _weights(self, tasks: Sequence[str]) -> tuple[float, ...]:
        return per_task("MaTS.weights", 1.0 if self.weights is None else self.weights, tasks)
