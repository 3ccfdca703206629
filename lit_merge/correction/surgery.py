"""Representation surgery: take out of a feature what merging has put into it, in few dimensions.

A merged model's final features are biased against each expert's in a few directions. A bottleneck
of rank r per task learns that bias and subtracts it: 2·r·C numbers a task.

References:
    Yang et al. (2024), arXiv:2402.02705.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lit_merge.errors import InputError


class RepresentationSurgery(nn.Module):
    r"""Subtract from every feature the bias that its own task's bottleneck finds in it.

    .. math:: \tilde z = z - W^{up}_t \, relu(W^{down}_t z)

    It is the identity at the start (``up`` zero), bit for bit. ``down`` starts from random numbers
    of a seed of its own, the same in every process.

    Attributes:
        down: :math:`W^{down}` per task, ``[T, r, C]``.
        up: :math:`W^{up}` per task, ``[T, C, r]``.
    """

    def __init__(self, num_tasks: int, num_features: int, rank: int) -> None:
        super().__init__()
        if not 1 <= rank <= num_features:
            raise InputError(
                f"surgery_rank: must be in [1, {num_features}], the width of the final feature; "
                f"got {rank}. 16 is usual."
            )
        generator = torch.Generator().manual_seed(0)
        down = torch.randn(num_tasks, rank, num_features, generator=generator)
        self.down = nn.Parameter(down / math.sqrt(num_features))
        self.up = nn.Parameter(torch.zeros(num_tasks, num_features, rank))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        """Return the corrected features, in the dtype of ``x``.

        Args:
            x: Features, ``[B, ..., C]``.
            task: Task of each example, int64 ``[B]``.
        """
        rows = x.reshape(len(x), -1, x.shape[-1])
        hidden = torch.bmm(rows, self.down[task].to(x.dtype).mT).relu()
        return x - torch.bmm(hidden, self.up[task].to(x.dtype).mT).reshape(x.shape).to(x.dtype)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        num_tasks, rank, num_features = self.down.shape
        return f"num_tasks={num_tasks}, num_features={num_features}, rank={rank}"
