"""Calls of convolutions: the patches that the kernel sees, in one to three dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_merge.curvature.estimator import widen
from lit_merge.curvature.kernels import Contribution, Outer
from lit_merge.curvature.operation import Operation

_Sizes = tuple[int, ...]

_PATCHES = 1 << 19  # elements of unfolded inputs that are held at a time


class Convolution(Operation):
    """y = conv(x, W) + b with W [O, C/G, *kernel], of any stride, padding, dilation and groups."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        """Take the arguments of ``F.conv1d``, ``F.conv2d`` or ``F.conv3d``."""
        super().__init__(input, weight, bias)
        dims = weight.dim() - 2
        self.kernel = tuple(weight.shape[2:])
        self.stride = _each(stride, dims)
        self.dilation = _each(dilation, dims)
        self.groups = groups
        self.padding = _padding(padding, self.kernel, self.dilation)

    def fits(self, y: Tensor, batch_size: int) -> bool:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        assert self.weight is not None
        return self.x.dim() == self.weight.dim() and super().fits(y, batch_size)

    def weight_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        return self._outer(g, self.x, batch_size)

    def _outer(self, at_places: Tensor, seen: Tensor, batch_size: int) -> Outer:
        """Return the factors of [O, C/G, *kernel].

        Args:
            at_places: [k·B, O, *places], what is at the places that the kernel goes to.
            seen: [k·B, C, *sizes], where the kernel looks.
            batch_size: B.
        """
        k, places = len(seen) // batch_size, at_places.shape[2:]
        left = at_places.reshape(batch_size, k, self.groups, at_places.shape[1] // self.groups, -1)

        def patches(start: int, stop: int) -> Tensor:
            rows = self._patches(widen(seen[start * k : stop * k]), places)
            split = rows.reshape(stop - start, k * rows.shape[1], rows.shape[2], self.groups, -1)
            return split.permute(0, 3, 1, 2, 4).flatten(3)

        per_example = k * math.prod(places) * math.prod(self.kernel) * seen.shape[1]
        at_once = max(1, _PATCHES // per_example)
        return Outer(left.permute(0, 2, 1, 4, 3).flatten(2, 3), patches, at_once)

    def _patches(self, x: Tensor, places: torch.Size) -> Tensor:
        """Return what the kernel sees at each place, [n, L, K, C] for K places of the kernel."""
        if any(self.padding):
            x = F.pad(x, self.padding)
        ones = (1,) * len(self.kernel)
        if self.kernel == ones and self.stride == ones:
            return x.flatten(2).mT.unsqueeze(2)
        x = x.movedim(1, -1).contiguous()  # like F.unfold from here on, in far longer runs
        step = x.stride()[1:-1]
        strides = (
            x.stride(0),
            *(s * size for s, size in zip(self.stride, step, strict=True)),
            *(d * size for d, size in zip(self.dilation, step, strict=True)),
            1,
        )
        seen = x.as_strided((len(x), *places, *self.kernel, x.shape[-1]), strides)
        return seen.reshape(len(x), math.prod(places), math.prod(self.kernel), x.shape[-1])

    @classmethod
    def descriptions(cls) -> dict[Callable[..., Any], Callable[..., Operation]]:
        """Return what describes each function."""
        return {F.conv1d: cls, F.conv2d: cls, F.conv3d: cls}


class TransposedConvolution(Convolution):
    """y = conv_transpose(x, W) + b with W [C, O/G, *kernel]: x and y have changed places."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> None:
        """Take the arguments of ``F.conv_transpose1d``, ``…2d`` or ``…3d``."""
        super().__init__(input, weight, bias, stride, padding, dilation, groups)

    def weight_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        return self._outer(self.x, g, batch_size)

    @classmethod
    def descriptions(cls) -> dict[Callable[..., Any], Callable[..., Operation]]:
        """Return what describes each function."""
        return {F.conv_transpose1d: cls, F.conv_transpose2d: cls, F.conv_transpose3d: cls}


def _each(value: Any, dims: int) -> _Sizes:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * dims if len(values) == 1 else values


def _padding(padding: Any, kernel: _Sizes, dilation: _Sizes) -> list[int]:
    """Return (left, right) of every spatial dimension, the last one first, as F.pad wants it."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(size, size) for size in _each(padding, len(kernel))]
    return [size for pair in reversed(pairs) for size in pair]
