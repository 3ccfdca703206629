"""Low-rank updates of weights: ΔW = left·right, in any flat range, and back by truncation.

Notation: a weight of any shape is the matrix of its first axis by the rest, [rows, width];
left [rows, r], right [r, width].

References:
    Hu et al. (2021), arXiv:2106.09685: ΔW = scaling · B·A.
    Halko et al. (2009), arXiv:0909.4061: the randomised range finder with power iterations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 16
"""Elements that are multiplied out at a time. The blocks lie where they lie whatever range is
wanted, so that an entry has the same bits in each: the rounding of a product of matrices depends on
how many rows it has."""

_EXACT = 1024  # rows or columns up to which the eigenvectors of ΔWΔWᵀ are cheap
_OVERSAMPLING = 16
_ITERATIONS = 6


def add_low_rank(out: Tensor, left: Tensor, right: Tensor, start: int) -> None:
    """Add the flat range of left·right that begins at ``start`` to a buffer, in place.

    Args:
        out: [n], of the factors' type; holds the elements ``start:start + n`` of the weight.
        left: [rows, r].
        right: [r, width].
        start: The first flat element, row-major.
    """
    width = right.shape[1]
    stop = start + out.numel()
    height = max(1, BLOCK // width)
    first = start // width // height * height
    for row in range(first, -(-stop // width), height):
        block = (left[row : row + height] @ right).view(-1)
        origin = row * width
        low, high = max(start, origin), min(stop, origin + block.numel())
        out[low - start : high - start] += block[low - origin : high - origin]


@dataclass(frozen=True)
class LowRank:
    """A matrix of low rank near another one.

    Attributes:
        left: [rows, r], float32.
        right: [r, width], float32.
        norm: ‖ΔW‖ (Frobenius) of the matrix that it is near to.
        distance: ‖ΔW − left·right‖.
    """

    left: Tensor
    right: Tensor
    norm: float
    distance: float

    @property
    def relative_error(self) -> float:
        """‖ΔW − left·right‖ / ‖ΔW‖; 0 for ΔW = 0."""
        return self.distance / self.norm if self.norm else 0.0


def truncated(delta: Tensor, rank: int) -> LowRank:
    r"""Return the nearest matrix of a rank, by Eckart and Young.

    .. math:: ΔW ≈ (U\sqrt{S})(\sqrt{S}V^⊤)

    Args:
        delta: [rows, width], finite.
        rank: At least 1; singular values that the matrix does not have are zeros.

    Returns:
        U√S and √S·Vᵀ, and how far their product is away: measured on these factors, not taken
        from the singular values.

    Note:
        Where both sides are longer than 1024, the leading singular vectors come from a randomised
        range of 2·rank + 16 columns after six power iterations, always from the same seed: exact up
        to rounding when ΔW has that rank at most, as a sum of a few adapters does.
    """
    wide = delta.to(torch.float64 if min(delta.shape) <= _EXACT else torch.float32)
    left, right = _leading(wide, min(rank, *delta.shape))
    missing = rank - left.shape[1]
    if missing:
        left = torch.nn.functional.pad(left, (0, missing))
        right = torch.nn.functional.pad(right, (0, 0, 0, missing))
    left, right = left.float(), right.float()
    norm = float(torch.linalg.vector_norm(wide, dtype=torch.float64))
    product = left.to(wide.dtype) @ right.to(wide.dtype)
    rest = torch.linalg.vector_norm(wide - product, dtype=torch.float64)
    return LowRank(left, right, norm, float(rest))


def _leading(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U√S and √S·Vᵀ of the leading singular values."""
    if delta.shape[0] > delta.shape[1]:
        right, left = _leading(delta.T, rank)
        return left.T, right.T
    if delta.shape[0] <= _EXACT:
        basis = torch.linalg.eigh(delta @ delta.T).eigenvectors.flip(-1)[:, :rank]
    else:
        basis = _range(delta, min(delta.shape[0], 2 * rank + _OVERSAMPLING))
    # The basis holds the leading left singular vectors; what it makes of ΔW is small and exact.
    inner, values, right = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    roots = values[:rank].sqrt()
    return (basis @ inner[:, :rank]) * roots, roots[:, None] * right[:rank]


def _range(delta: Tensor, columns: int) -> Tensor:
    """Return an orthonormal basis of nearly the range of the leading singular vectors."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(delta.shape[1], columns, generator=generator).to(delta)
    basis: Tensor = torch.linalg.qr(delta @ sample).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ basis).Q).Q
    return basis
