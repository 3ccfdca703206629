"""Isotropic merging: a task vector that is as strong in every one of its directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_merge.methods.matrix_method import MatrixMethod, sum_of_task_vectors, task_vector
from lit_merge.methods.settings import check_number
from lit_merge.methods.singular_vectors import leading_singular_vectors, polar_factor


def flatten_spectrum(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    r"""Return the sum of the task vectors with every singular value replaced by their mean.

    .. math:: \bar σ\, U V^T \quad\text{of}\quad \sum_t τ_t = U \mathrm{diag}(σ) V^T

    Args:
        base: :math:`θ_0` of shape [m, n].
        experts: :math:`θ_t`, of the same shape.

    Returns:
        Of shape [m, n], in float64.
    """
    total = sum_of_task_vectors(base, experts)
    left, values, right = leading_singular_vectors(total, min(total.shape))
    return (left @ right).mul_(_mean(values))


def flatten_common_and_specific(
    base: Tensor, experts: Sequence[Tensor], common_fraction: float
) -> Tensor:
    r"""Return an isotropic task vector over directions of all tasks and of each on its own.

    The common directions are the leading ones of :math:`\sum_t τ_t`, singular vectors
    :math:`U_0, V_0`. Each task adds the leading ones of :math:`τ_t - U_0 U_0^T τ_t`, as many as
    share out the rest of the space evenly. With all left vectors side by side in U, all right ones
    in V, the mean :math:`\bar σ` of all their singular values and the polar factor P it is
    :math:`\bar σ\, P(U) P(V)^T`.

    Args:
        base: :math:`θ_0` of shape [m, n].
        experts: :math:`θ_t`, of the same shape.
        common_fraction: The share of min(m, n) for common directions, 0 to 1; what does not divide
            by T goes to the common ones or is taken from them, whichever is nearer.

    Returns:
        Of shape [m, n], in float64.
    """
    rank, number = min(base.shape), len(experts)
    wanted = rank - int(rank * common_fraction)
    specific = min(round(wanted / number), rank // number)
    common = rank - specific * number
    parts = []
    if common:
        parts.append(leading_singular_vectors(sum_of_task_vectors(base, experts), common))
    if specific:
        for expert in experts:
            own = task_vector(base, expert)
            if common:
                shared = parts[0][0]
                own -= shared @ (shared.mT @ own)
            parts.append(leading_singular_vectors(own, specific))
    left, values, right = zip(*parts, strict=True)
    merged = polar_factor(torch.cat(left, dim=1)) @ polar_factor(torch.cat(right))
    return merged.mul_(_mean(torch.cat(values)))


def _mean(values: Tensor) -> Tensor | float:
    return values.mean() if len(values) else 0.0


@dataclass(frozen=True)
class IsoC(MatrixMethod):
    """Isotropic merging in the common subspace.

    The sum of the task vectors, as strong in each of its directions as in the mean of them.

    Args:
        scale: What the merged task vector is multiplied with before it is added to the base.
        others: What becomes of tensors that are no matrices: the mean of their task vectors (as
            the authors do), the sum, or nothing (``"base"``).
        convolutions: Whether tensors of more than two dimensions count as matrices of shape
            [outputs, everything else] (``"matrix"``) or are among the others (as the authors do).

    Raises:
        InputError: The scale is not finite or a word unknown.

    References:
        Marczak et al. (2025), arXiv:2502.04959.

    Note:
        One expert alone does not come back: its task vector is made isotropic too. Singular values
        of zero are left out, of the mean as well; the authors' code counts them in and fills up
        with whichever directions come out.
    """

    def merge_matrices(self, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """Return the merged task vector of one weight, unscaled."""
        return flatten_spectrum(base, experts)


@dataclass(frozen=True)
class IsoCTS(MatrixMethod):
    """Isotropic merging in the common and task-specific subspaces.

    Args:
        scale: What the merged task vector is multiplied with before it is added to the base.
        others: What becomes of tensors that are no matrices: the mean of their task vectors (as
            the authors do), the sum, or nothing (``"base"``).
        convolutions: Whether tensors of more than two dimensions count as matrices of shape
            [outputs, everything else] (``"matrix"``) or are among the others (as the authors do).
        common_fraction: The share of the directions that are taken from the sum of the task
            vectors; the rest is shared out among the tasks' own. 1 is :class:`IsoC`.

    Raises:
        InputError: A number is out of its range or a word unknown.

    References:
        Marczak et al. (2025), arXiv:2502.04959.

    Note:
        As :class:`IsoC` on singular values of zero and on one expert alone, for which it is the
        same as that at any fraction.
    """

    common_fraction: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("IsoCTS.common_fraction", self.common_fraction, low=0, high=1)

    def merge_matrices(self, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """Return the merged task vector of one weight, unscaled."""
        return flatten_common_and_specific(base, experts, self.common_fraction)
