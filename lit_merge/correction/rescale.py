"""One scale and one shift per task and channel: the smallest correction that repairs a merge.

Merging averages away part of the variance of the activations; each task's own affine map of every
channel puts it back. In closed form that is TACT (:mod:`lit_merge.correction.tact`), learned from
there it recovers most of what a merge has lost, with 2·T·C numbers per site.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.errors import InputError


class _Affine(torch.autograd.Function):
    """``x * scale + shift`` with scale and shift per example and channel, ``[B, 1, ..., C]``.

    Autograd's own would pass over the activation once more forward, and once more memory backward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.addcmul(shift, x, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, scale = ctx.saved_tensors
        inner = tuple(range(1, gradient.ndim - 1))
        of_x = gradient * scale if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_x, None, None
        of_scale, of_shift = gradient * x, gradient
        if inner:
            of_scale, of_shift = of_scale.sum(inner, True), of_shift.sum(inner, True)
        return of_x, of_scale, of_shift


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
        corrected: Tensor = _Affine.apply(x, *self._rows(x, task))
        return corrected

    def overwrite(self, x: Tensor, task: Tensor | int) -> None:
        """Correct activations where they are, without gradients: no second pass over memory.

        Args:
            x: Activations, ``[B, ..., C]``; changed.
            task: Task of each example, int64 ``[B]``; one int for all.
        """
        scale, shift = self._rows(x, task)
        torch.addcmul(shift, x, scale, out=x)

    def _rows(self, x: Tensor, task: Tensor | int) -> tuple[Tensor, Tensor]:
        """Return scale and shift in a shape that broadcasts to the activations."""
        scale, shift = self.weight[task], self.bias[task]
        if not isinstance(task, int):
            shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
            scale, shift = scale.view(shape), shift.view(shape)
        # Under autocast x is half precision and the parameters are not: without the casts every
        # corrected activation would silently become float32.
        return scale.to(x.dtype), shift.to(x.dtype)

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
