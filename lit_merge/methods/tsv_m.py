"""TSV-M: the task vectors' leading singular vectors, made orthogonal across the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_merge.methods.matrix_method import MatrixMethod, task_vector
from lit_merge.methods.settings import check_number
from lit_merge.methods.singular_vectors import leading_singular_vectors, polar_factor


def merge_singular_vectors(
    base: Tensor, experts: Sequence[Tensor], share: float | None = None
) -> Tensor:
    r"""Return the sum of the tasks' leading singular components after making them orthogonal.

    With :math:`τ_t ≈ U_t \mathrm{diag}(s_t) V_t^T` of rank k, side by side
    :math:`U = [U_1 … U_T]` and :math:`V = [V_1 … V_T]`, and :math:`P` the polar factor, it is

    .. math:: P(U)\, \mathrm{diag}(s_1, …, s_T)\, P(V)^T

    Args:
        base: :math:`θ_0` of shape [m, n].
        experts: :math:`θ_t`, of the same shape.
        share: :math:`k / \min(m, n)`, rounded down to at least one vector; None for 1/T.

    Returns:
        Of shape [m, n], in float64.
    """
    rank = min(base.shape)
    count = max(1, rank // len(experts) if share is None else int(share * rank))
    left, values, right = zip(
        *(leading_singular_vectors(task_vector(base, expert), count) for expert in experts),
        strict=True,
    )
    return (polar_factor(torch.cat(left, dim=1)) * torch.cat(values)) @ polar_factor(
        torch.cat(right)
    )


@dataclass(frozen=True)
class TSVM(MatrixMethod):
    """Task singular vectors merged without interference.

    Of every weight matrix each task keeps as many singular vectors of its task vector as fit beside
    those of the others; then all of them are made orthogonal, as little changed as possible, and
    the components are summed.

    Args:
        scale: What the merged task vector is multiplied with before it is added to the base.
        share: The share of its singular vectors that each task keeps, 0 to 1; None for 1/T. With 1
            nothing is cut off; the authors call it lossless.
        others: What becomes of tensors that are no matrices: the mean of their task vectors (as
            the authors do), the sum, or nothing (``"base"``).
        convolutions: Whether tensors of more than two dimensions count as matrices of shape
            [outputs, everything else] (``"matrix"``) or are among the others (as the authors do).

    Raises:
        InputError: A number is out of its range or a word unknown.

    References:
        Gargiulo et al. (2025), arXiv:2412.00081.

    Note:
        One expert alone comes back, but for rounding. A task keeps at least one vector, also where
        T exceeds the matrix's rank; the authors' code keeps none there. Singular values of zero
        bring no vectors: the authors' code fills up with whichever come out, also where two experts
        are equal.
    """

    share: float | None = None
    others: Literal["mean", "sum", "base"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None:
            check_number("TSVM.share", self.share, low=0, high=1)

    def merge_matrices(self, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """Return the merged task vector of one weight, unscaled."""
        return merge_singular_vectors(base, experts, self.share)
