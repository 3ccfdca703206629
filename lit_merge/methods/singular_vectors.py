r"""Singular vectors of a matrix that can be told from rounding, and its polar factor.

A matrix M [m, n] of rank r is :math:`U \mathrm{diag}(s) V^T` with orthonormal columns in U [m, r]
and V [n, r]. Directions whose singular value is zero have no singular vectors of their own (a
library gives whichever come out of its rounding), so none are returned for them. All in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TOO_SMALL = 1e-10
"""The square of the ratio of singular values under which the Gram matrix is not exact enough.

Its eigenvectors err by about 1e-16 over this: 1e-6 of a direction that is itself 1e-5 of the
largest. What float32 weights keep of a task vector is no better.
"""


def leading_singular_vectors(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular vectors of the largest singular values.

    Args:
        matrix: Of shape [m, n], finite, in float64.
        count: How many at most, 1 to min(m, n).

    Returns:
        Left vectors [m, k], singular values [k] in descending order and right vectors [k, n], where
        k is ``count`` or the numerical rank, whichever is less; 0 for a matrix of zeros.

    Note:
        From the eigenvectors of the smaller Gram matrix, which takes less than half the time of a
        singular value decomposition, where that is exact enough for these vectors; otherwise from
        the decomposition.
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    gram = matrix.mT @ matrix if tall else matrix @ matrix.mT
    squares, vectors = torch.linalg.eigh(gram)
    if not squares[-count] > _TOO_SMALL * squares[-1]:
        return _decomposed(matrix, count)
    vectors = vectors[:, -count:].flip(1)
    images = matrix @ vectors if tall else matrix.mT @ vectors
    values = torch.linalg.vector_norm(images, dim=0)
    images /= values
    return (images, values, vectors.mT) if tall else (vectors, values, images.mT)


def _decomposed(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    zero = torch.finfo(matrix.dtype).eps * max(matrix.shape) * values[0]
    rank = min(count, int((values > zero).sum()))
    return left[:, :rank], values[:rank], right[:rank]


def polar_factor(matrix: Tensor) -> Tensor:
    r"""Return the nearest matrix whose non-zero singular values are one, :math:`U V^T`.

    It is the solution of the orthogonal Procrustes problem: of all matrices with orthonormal
    columns (or rows, of a wide matrix) the nearest to this one, if its rank is full. Directions
    without singular vectors stay zero.

    Args:
        matrix: Of shape [m, n], finite, in float64.
    """
    if matrix.numel() == 0:
        return matrix.clone()
    left, _, right = leading_singular_vectors(matrix, min(matrix.shape))
    return left @ right
