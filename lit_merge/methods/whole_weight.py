"""From a slice that is a whole weight to matrices in float64, and back to the merged weight."""

from __future__ import annotations

import math

from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods.method import ParameterSlice
from lit_merge.methods.weight_curvature import (
    NotConverged,
    NotPositiveDefinite,
    WeightCurvature,
    merge_by_curvature,
)


def merge_weight(
    p: ParameterSlice, start: Tensor, curvature: WeightCurvature, method: str
) -> Tensor:
    """Merge a whole weight by its experts' curvature, in float64.

    Args:
        p: The whole weight, [m, ...]; more dimensions than two are flattened to [m, n].
        start: Where the merge starts from, of the weight's shape.
        curvature: In float64, of the flattened weight.
        method: Whose settings the message names.

    Returns:
        The merged weight, of the experts' shape and dtype.

    Raises:
        InputError: The equation has no stable solution, or it was not found.
    """
    try:
        merged = merge_by_curvature(
            as_matrix(start), [as_matrix(expert) for expert in p.experts], curvature
        )
    except NotPositiveDefinite as error:
        raise InputError(
            f"{method}.ridge: the merged curvature of '{p.name}' must be positive in every "
            f"direction; {error}. Raise the ridge, or take negative scales nearer to 0."
        ) from error
    except NotConverged as error:
        raise InputError(
            f"{method}.iterations: conjugate gradients must reach the tolerance; got a residual "
            f"of {error} in '{p.name}'. Raise iterations, ridge or tolerance."
        ) from error
    return merged.reshape(start.shape).to(p.experts[0].dtype)


def as_matrix(weight: Tensor) -> Tensor:
    """Return a weight [m, ...] as a matrix [m, n] in float64; a vector has one column."""
    return weight.double().flatten(1) if weight.ndim > 1 else weight.double().reshape(-1, 1)


def gram_matrices(p: ParameterSlice, off_diagonal: float) -> list[Tensor] | None:
    """Return the experts' Grams in float64, their off-diagonal entries scaled; None without.

    Raises:
        InputError: One does not fit the weight.
    """
    if p.grams is None:
        return None
    columns = math.prod(p.experts[0].shape[1:])
    return [_factor(p, gram, columns, "Gram matrix", off_diagonal, 0.0) for gram in p.grams]


def kronecker_factors(
    p: ParameterSlice, *, off_diagonal: float, damping: float
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return the experts' factors of the inputs and of the outputs, in float64; None without.

    Args:
        p: The whole weight.
        off_diagonal: What their off-diagonal entries are multiplied with.
        damping: How much of the identity is added to each, in units of its mean diagonal entry. A
            factor of few examples that was stored in float32 has eigenvalues somewhat below zero
            (-6e-6 of the mean was seen), and the product with a large one of the other factor is
            no rounding any more.

    Raises:
        InputError: One does not fit the weight.
    """
    if p.kronecker is None:
        return None
    rows, columns = p.experts[0].shape[0], math.prod(p.experts[0].shape[1:])
    return (
        [
            _factor(p, a, columns, "Kronecker input factor", off_diagonal, damping)
            for a, _ in p.kronecker
        ],
        [
            _factor(p, b, rows, "Kronecker output factor", off_diagonal, damping)
            for _, b in p.kronecker
        ],
    )


def _factor(
    p: ParameterSlice, factor: Tensor, size: int, what: str, off_diagonal: float, damping: float
) -> Tensor:
    if factor.shape != (size, size):
        raise InputError(
            f"{what} of '{p.name}': must be {[size, size]} for a weight of shape "
            f"{list(p.experts[0].shape)}; got {list(factor.shape)}. Gather it from the model that "
            f"these weights belong to."
        )
    scaled = factor.double() * off_diagonal
    diagonal = factor.diagonal().double()
    scaled.diagonal().copy_(diagonal + damping * diagonal.mean())
    return scaled
