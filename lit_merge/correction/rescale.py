"""One scale and one shift per task and channel: the smallest correction that repairs a merge.

Merging averages away part of the variance of the activations; each task's own affine map of every
channel puts it back. In closed form that is TACT (:mod:`lit_merge.correction.tact`), learned from
there it recovers most of what a merge has lost, with 2·T·C numbers per site.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_merge.errors import InputError


class RescaleShift(nn.Module):
    r"""Multiply and shift every channel by numbers of the example's own task.

    .. math:: \tilde z_b = w_{t(b)} ⊙ z_b + c_{t(b)}

    It is the identity at the start (``weight`` one, ``bias`` zero), bit for bit.

    Attributes:
        weight: Scale per task and channel, ``[T, C]``.
        bias: Shift per task and channel, ``[T, C]``.
    """

    def __init__(self, num_tasks: int, num_features: int) -> None:
        super().__init__()
        for name, value in (("num_tasks", num_tasks), ("num_features", num_features)):
            if value < 1:
                raise InputError(f"{name}: must be at least 1; got {value}. Give a positive count.")
        self.weight = nn.Parameter(torch.ones(num_tasks, num_features))
        self.bias = nn.Parameter(torch.zeros(num_tasks, num_features))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        """Return the corrected activations, in the dtype of ``x``.

        Args:
            x: Activations, ``[B, ..., C]``.
            task: Task of each example, int64 ``[B]``.
        """
        shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
        # Under autocast x is half precision and the parameters are not: without the casts every
        # corrected activation would silently become float32.
        scale = self.weight[task].to(x.dtype).view(shape)
        shift = self.bias[task].to(x.dtype).view(shape)
        return x * scale + shift

    @torch.no_grad()
    def set_(self, task: int, scale: Tensor, shift: Tensor) -> None:
        """Overwrite one task's scale and shift.

        Args:
            task: Index of the task.
            scale: New scale, ``[C]``.
            shift: New shift, ``[C]``.
        """
        self.weight[task] = scale.to(self.weight)
        self.bias[task] = shift.to(self.bias)

    def extra_repr(self) -> str:
        """Return what ``repr`` shows."""
        num_tasks, num_features = self.weight.shape
        return f"num_tasks={num_tasks}, num_features={num_features}"
