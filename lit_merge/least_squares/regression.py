r"""The scale and shift per channel that bring activations nearest to wanted ones, row by row.

.. math:: (s, c) = \arg\min \sum_n v_n (s\,y_n + c - z_n)^2
            \quad⇒\quad s = \operatorname{cov}_v(y, z) / \operatorname{var}_v(y),
            \quad c = \bar z - s\,\bar y

TACT (:mod:`lit_merge.correction.tact`) meets the mean and variance of z instead. Where y follows z
badly, that blows up what is wrong in y; the regression shrinks it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PairedMoments:
    """Weighted sums over pairs of rows of one channel each, float64 ``[C]``.

    Attributes:
        total: Sum of the weights, 0-d.
        y: Sum of v·y.
        z: Sum of v·z.
        yy: Sum of v·y².
        yz: Sum of v·y·z.
        zz: Sum of v·z².
    """

    total: Tensor
    y: Tensor
    z: Tensor
    yy: Tensor
    yz: Tensor
    zz: Tensor

    @classmethod
    def of(cls, y: Tensor, z: Tensor, weights: Tensor | None = None) -> PairedMoments:
        """Return those of rows.

        Args:
            y: Rows, ``[n, C]``.
            z: What they should be, ``[n, C]``.
            weights: Weight of each row, ``[n]``; None for ones.
        """
        y, z = y.double(), z.double()
        v = torch.ones_like(y[:, :1]) if weights is None else weights.double()[:, None]
        vy, vz = v * y, v * z
        return cls(v.sum(), vy.sum(0), vz.sum(0), (vy * y).sum(0), (vy * z).sum(0), (vz * z).sum(0))

    def __add__(self, other: PairedMoments) -> PairedMoments:
        """Return the sums over the rows of both."""
        return PairedMoments(
            *(mine + theirs for mine, theirs in zip(self.tensors(), other.tensors(), strict=True))
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the sums in the order of the attributes."""
        return self.total, self.y, self.z, self.yy, self.yz, self.zz


def regress(moments: PairedMoments, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Return the best scale and shift, float64 ``[C]`` each.

    Args:
        moments: The sums.
        eps: A channel with at most this share of the average variance of y is constant: its scale
            is 1.

    >>> y = torch.tensor([[0.0], [1.0], [2.0]])
    >>> [round(value.item(), 6) for value in regress(PairedMoments.of(y, 3 * y + 1))]
    [3.0, 1.0]
    """
    mean_y, mean_z = moments.y / moments.total, moments.z / moments.total
    variance = (moments.yy / moments.total - mean_y.square()).clamp_min(0)
    covariance = moments.yz / moments.total - mean_y * mean_z
    rounding = torch.finfo(torch.float32).eps * mean_y.square()
    constant = variance <= torch.maximum(eps * variance.mean(), rounding)
    safe = torch.where(constant, torch.ones_like(variance), variance)
    scale = torch.where(constant, torch.ones_like(variance), covariance / safe)
    return scale, mean_z - scale * mean_y
