r"""Layers as linear maps: what a closed form needs to know of Linear, convolutions and norms.

Every such layer computes :math:`y = x M + b` for each row of its inputs, in G independent groups:

=====================  ============  ============================  ==========================
layer                  groups G      a row of x                    a row of y
=====================  ============  ============================  ==========================
Linear, HF's Conv1D    1             a token                       a token
Conv1d/2d/3d           the layer's   what the kernel sees of the   the group's channels there
                                     group's channels at a place
norm with affine part  the channels  the normalised channel        the channel
=====================  ============  ============================  ==========================

Shapes: rows of x ``[G, n, d]``, rows of y ``[G, n, o]``, matrix M ``[G, d, o]``, offset b
``[G, o]``.
Whether a module really computes this is not assumed but tried (:meth:`LinearLayer.explains`): a
subclass may pad, standardise its weights, or use them elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lit_merge.correction.forward import rows as rows_that_count
from lit_merge.correction.sites import channel_layout


class LinearLayer(ABC):
    """A module that maps the rows of its input linearly.

    Args:
        name: Its qualified name.
        module: The module.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module: Any = module

    @abstractmethod
    def inputs(self, x: Tensor, mask: Tensor | None, chosen: Tensor | None = None) -> Tensor:
        """Return the rows of an input that count, ``[G, n, d]``.

        Args:
            x: What the module is given.
            mask: The tokens that count; None for all.
            chosen: Indices of those of these rows that are wanted, int64; None for all.
        """

    @abstractmethod
    def outputs(self, y: Tensor, mask: Tensor | None) -> Tensor:
        """Return the rows of an output that count, ``[G, n, o]``."""

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as M, ``[G, d, o]``."""

    @abstractmethod
    def weight(self, matrix: Tensor) -> Tensor:
        """Return M as a tensor of the weight's shape: the inverse of :meth:`matrix`."""

    def offset(self, bias: Tensor) -> Tensor:
        """Return a bias as b, ``[G, o]``."""
        return bias.reshape(self.groups, -1)

    @property
    def groups(self) -> int:
        """Number of groups G."""
        return 1

    @property
    def has_bias(self) -> bool:
        """Whether the module adds an offset of its own."""
        return getattr(self.module, "bias", None) is not None

    @torch.no_grad()
    def explains(self, x: Any, y: Any) -> bool:
        """Return whether an output is what this reading of the module gives for an input."""
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or not x.is_floating_point():
            return False
        try:
            seen, wanted = self.inputs(x, None), self.outputs(y, None)
            made = seen @ self.matrix(self.module.weight).to(seen.dtype)
        except (RuntimeError, IndexError):
            return False
        if self.has_bias:
            made = made + self.offset(self.module.bias).to(made.dtype)[:, None]
        if made.shape != wanted.shape:
            return False
        scale = wanted.float().abs().max() + 1e-12
        coarse = torch.finfo(y.dtype).eps > 1e-5
        return bool((made - wanted).float().abs().max() <= (5e-2 if coarse else 1e-4) * scale)

    @torch.no_grad()
    def set_(self, matrix: Tensor, offset: Tensor | None) -> None:
        """Overwrite the module's weight, and its bias where an offset is given."""
        self.module.weight.copy_(self.weight(matrix))
        if offset is not None:
            self.module.bias.copy_(offset.reshape(self.module.bias.shape))


class TokenLinear(LinearLayer):
    """A Linear over the last axis, or transformers' Conv1D, whose weight is transposed."""

    def inputs(self, x: Tensor, mask: Tensor | None, chosen: Tensor | None = None) -> Tensor:
        """See :class:`LinearLayer`."""
        rows = rows_that_count(x, mask)
        return rows[None] if chosen is None else rows[chosen][None]

    def outputs(self, y: Tensor, mask: Tensor | None) -> Tensor:
        """See :class:`LinearLayer`."""
        return rows_that_count(y, mask)[None]

    def matrix(self, weight: Tensor) -> Tensor:
        """See :class:`LinearLayer`."""
        return weight[None] if self._is_conv_1d else weight.mT[None]

    def weight(self, matrix: Tensor) -> Tensor:
        """See :class:`LinearLayer`."""
        return matrix[0] if self._is_conv_1d else matrix[0].mT

    @property
    def _is_conv_1d(self) -> bool:
        return not isinstance(self.module, nn.Linear)


class ConvolutionLayer(LinearLayer):
    """A convolution in one to three dimensions, of any stride, padding, dilation and groups."""

    @property
    def groups(self) -> int:
        """Number of groups G."""
        return int(self.module.groups)

    def inputs(self, x: Tensor, mask: Tensor | None, chosen: Tensor | None = None) -> Tensor:
        """See :class:`LinearLayer`."""
        conv = self.module
        padding = conv._reversed_padding_repeated_twice
        if isinstance(conv.padding, tuple):
            padding = [size for size in reversed(conv.padding) for _ in range(2)]
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, padding, mode=mode) if any(padding) else x
        for axis, (kernel, stride, dilation) in enumerate(
            zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), 2
        ):
            seen = x.unfold(axis, dilation * (kernel - 1) + 1, stride)
            x = seen[..., ::dilation]
        dims = len(conv.kernel_size)  # [B, C, *places, *kernel], and nothing copied yet
        if chosen is not None:
            example, *place = torch.unravel_index(chosen, (len(x), *x.shape[2 : 2 + dims]))
            where: Any = (example, slice(None), *place)
            return x[where].reshape(len(chosen), self.groups, -1).movedim(1, 0)
        x = x.reshape(len(x), self.groups, -1, *x.shape[2:]).movedim(1, 0)
        x = x.movedim(2, 2 + dims)  # [G, B, *places, C/G, *kernel]
        return x.flatten(2 + dims).flatten(1, 1 + dims)

    def outputs(self, y: Tensor, mask: Tensor | None) -> Tensor:
        """See :class:`LinearLayer`."""
        split = y.reshape(len(y), self.groups, -1, *y.shape[2:])
        return split.movedim(1, 0).movedim(2, -1).flatten(1, -2)

    def matrix(self, weight: Tensor) -> Tensor:
        """See :class:`LinearLayer`."""
        return weight.reshape(self.groups, len(weight) // self.groups, -1).mT

    def weight(self, matrix: Tensor) -> Tensor:
        """See :class:`LinearLayer`."""
        return matrix.mT.reshape(self.module.weight.shape)


class AffineLayer(LinearLayer):
    """The affine part of a norm: every channel's normalised value to its output."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        layout = channel_layout(module)
        assert layout is not None
        self._channels, self._axis = layout

    @property
    def groups(self) -> int:
        """Number of groups G: the channels."""
        return self._channels

    def inputs(self, x: Tensor, mask: Tensor | None, chosen: Tensor | None = None) -> Tensor:
        """See :class:`LinearLayer`."""
        with _identity_affine(self.module):
            # Not by calling it: hooks would run.
            normalised = self.module.forward(x)
        rows = self.outputs(normalised, mask)
        return rows if chosen is None else rows[:, chosen]

    def outputs(self, y: Tensor, mask: Tensor | None) -> Tensor:
        """See :class:`LinearLayer`."""
        return rows_that_count(y.movedim(self._axis, -1), mask).mT[..., None]

    def matrix(self, weight: Tensor) -> Tensor:
        """See :class:`LinearLayer`."""
        return weight.reshape(-1, 1, 1)

    def weight(self, matrix: Tensor) -> Tensor:
        """See :class:`LinearLayer`."""
        return matrix.reshape(self.module.weight.shape)


@contextmanager
def _identity_affine(module: Any) -> Iterator[None]:
    """Let a norm leave out its affine part inside the block."""
    weight, bias = module.weight.data, getattr(module, "bias", None)
    shift = None if bias is None else bias.data
    module.weight.data = torch.ones_like(weight)
    if bias is not None:
        bias.data = torch.zeros_like(bias)
    try:
        yield
    finally:
        module.weight.data = weight
        if bias is not None:
            bias.data = shift


def linear_layer(name: str, module: nn.Module) -> LinearLayer | None:
    """Return how a module reads as a linear map; None for one that does not.

    >>> linear_layer("fc", nn.Linear(3, 5)).matrix(torch.zeros(5, 3)).shape
    torch.Size([1, 3, 5])
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None
    if isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and weight.ndim == 2):
        return TokenLinear(name, module)
    if isinstance(module, _ConvNd) and not module.transposed:
        return ConvolutionLayer(name, module)
    affine = weight.ndim == 1 and channel_layout(module) is not None
    return AffineLayer(name, module) if affine else None


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch norm with statistics and an affine part."""
    return isinstance(module, _BatchNorm) and module.affine and module.track_running_stats


def effective_affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a BatchNorm in evaluation mode, ``[C]`` each."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale
