"""Calls of norms: y = x̂ ∘ w + b, of which only x̂ differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_merge.curvature.estimator import widen
from lit_merge.curvature.kernels import Contribution, PerExample
from lit_merge.curvature.operation import Operation, sum_but_channels


class LastNorm(Operation):
    """A norm over the last dimensions (LayerNorm, RMSNorm): y = x̂ ∘ w + b."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        shape: Sequence[int],
        normalise: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(x, weight, bias)
        self.shape = tuple(shape)
        self.normalise = normalise

    def fits(self, y: Tensor, batch_size: int) -> bool:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        return self.x.dim() > len(self.shape) and super().fits(y, batch_size)

    def weight_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        return self._summed(self.normalise(widen(self.x)).mul_(widen(g)), batch_size)

    def bias_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        return self._summed(widen(g), batch_size)

    def _summed(self, values: Tensor, batch_size: int) -> PerExample:
        return PerExample(values.reshape(batch_size, -1, *self.shape).sum(1))


class ChannelNorm(Operation):
    """A norm with one scale per channel in dimension 1 (group and instance norms)."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        normalise: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(x, weight, bias)
        self.normalise = normalise

    def weight_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        products = self.normalise(widen(self.x)).mul_(widen(g))
        return PerExample(sum_but_channels(products, batch_size))


class BatchNorm(Operation):
    """Batch norm by running statistics [C]: y = (x − mean) / deviation ∘ w + b."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        mean: Tensor,
        deviation: Tensor,
    ) -> None:
        super().__init__(x, weight, bias)
        self.mean = mean
        self.deviation = deviation

    def weight_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        wide = widen(g)
        mean = self.mean.to(wide.dtype).view(-1, *(1,) * (g.dim() - 2))
        products = (widen(self.x) - mean).mul_(wide)
        return PerExample(sum_but_channels(products, batch_size) / self.deviation.to(wide.dtype))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Operation:
    return LastNorm(
        input,
        weight,
        bias,
        shape=normalized_shape,
        normalise=lambda x: F.layer_norm(x, list(normalized_shape), eps=eps),
    )


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Operation:
    return LastNorm(
        input,
        weight,
        None,
        shape=normalized_shape,
        normalise=lambda x: F.rms_norm(x, list(normalized_shape), eps=eps),
    )


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Operation:
    return ChannelNorm(
        input, weight, bias, normalise=lambda x: F.group_norm(x, num_groups, eps=eps)
    )


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Operation | None:
    if training or running_mean is None or running_var is None:
        return None
    deviation = (running_var.detach() + eps).sqrt()
    return BatchNorm(input, weight, bias, mean=running_mean.detach(), deviation=deviation)


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Operation | None:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Operation | None:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return ChannelNorm(
        input, weight, bias, normalise=lambda x: F.instance_norm(x, eps=eps).contiguous()
    )


NORMS: dict[Callable[..., Any], Callable[..., Operation | None]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.instance_norm: _instance_norm,
}
"""By torch function, what describes a call of it; None if it cannot."""
