"""What the weight and bias of each supported module type get from one call of the module.

A layer object wraps a module and turns the input x and the gradient g of the output y of one call
into contributions to the per-example gradients of the parameters called ``weight`` and ``bias``.

Shapes: dimension 0 of x, y and g is k·B with the examples outermost (windows of an image, flattened
tokens). "Channels last" modules have the channels in the last dimension, the others in dimension 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_merge.curvature.estimator import widen
from lit_merge.curvature.kernels import Contribution, Outer, PerExample, Rows


class Layer(ABC):
    """One supported module.

    Attributes:
        kind: Contributions to one parameter can be added up across layers of the same kind, and of
            the kinds "matrix" and "rows".
    """

    kind: str = "values"

    @abstractmethod
    def fits(self, x: Tensor, y: Tensor) -> bool:
        """Whether a call with this input and output is the one that the layer describes."""

    @abstractmethod
    def weight(self, x: Tensor, g: Tensor, batch_size: int) -> Contribution:
        """Return what a call contributes to the weight."""

    @abstractmethod
    def bias(self, g: Tensor, batch_size: int) -> Contribution:
        """Return what a call contributes to the bias."""


class _ChannelsLast(Layer):
    def bias(self, g: Tensor, batch_size: int) -> Contribution:
        return PerExample(widen(g).reshape(batch_size, -1, g.shape[-1]).sum(1))


class _ChannelsSecond(Layer):
    def bias(self, g: Tensor, batch_size: int) -> Contribution:
        return PerExample(_sum_but_channels(widen(g), batch_size))


class _LinearLayer(_ChannelsLast):
    """nn.Linear: y = x Wᵀ + b."""

    kind = "matrix"

    def __init__(self, module: nn.Linear) -> None:
        self.sizes = module.in_features, module.out_features

    def fits(self, x: Tensor, y: Tensor) -> bool:
        return (
            x.dim() >= 2
            and (x.shape[-1], y.shape[-1]) == self.sizes
            and x.shape[:-1] == y.shape[:-1]
        )

    def weight(self, x: Tensor, g: Tensor, batch_size: int) -> Contribution:
        inputs = x.reshape(batch_size, 1, -1, x.shape[-1])
        outputs = g.reshape(batch_size, 1, -1, g.shape[-1])
        return self._outer(inputs, outputs)

    def _outer(self, inputs: Tensor, outputs: Tensor) -> Outer:
        return Outer(outputs, lambda start, stop: inputs[start:stop])


class _TransposedLinearLayer(_LinearLayer):
    """The ``Conv1D`` of transformers (GPT-2): y = x W + b."""

    kind = "transposed matrix"

    def __init__(self, module: nn.Module) -> None:
        inputs, outputs = cast(Tensor, module.weight).shape
        self.sizes = inputs, outputs

    def _outer(self, inputs: Tensor, outputs: Tensor) -> Outer:
        return Outer(inputs, lambda start, stop: outputs[start:stop])


class _ConvLayer(_ChannelsSecond):
    """nn.Conv1d and nn.Conv2d, with stride, dilation, groups and every padding."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d) -> None:
        self.kind = f"convolution in {module.groups} groups"
        self.module = module
        self.flat = isinstance(module, nn.Conv1d)  # one spatial dimension: add a second of size 1
        self.kernel, self.stride, self.dilation = (
            cast("tuple[int, int]", (1,) * self.flat + tuple(value))
            for value in (module.kernel_size, module.stride, module.dilation)
        )
        self.padding = _padding(module)
        self.mode = "constant" if module.padding_mode == "zeros" else module.padding_mode

    def fits(self, x: Tensor, y: Tensor) -> bool:
        spatial = 1 if self.flat else 2
        if x.dim() != 2 + spatial or x.shape[1] != self.module.in_channels:
            return False
        left_right = reversed(list(zip(self.padding[::2], self.padding[1::2], strict=True)))
        reach = [
            d * (k - 1) + 1
            for d, k in zip(self.dilation[-spatial:], self.kernel[-spatial:], strict=True)
        ]
        places = [
            (size + sum(pads) - extent) // stride + 1
            for size, pads, extent, stride in zip(
                x.shape[2:], left_right, reach, self.stride[-spatial:], strict=True
            )
        ]
        return tuple(y.shape) == (len(x), self.module.out_channels, *places)

    def weight(self, x: Tensor, g: Tensor, batch_size: int) -> Contribution:
        groups, k = self.module.groups, len(x) // batch_size
        left = g.reshape(batch_size, k, groups, g.shape[1] // groups, -1)

        def patches(start: int, stop: int) -> Tensor:
            rows = self._patches(
                widen(x[start * k : stop * k])
            )  # [n·k, L, places of the kernel, C]
            split = rows.reshape(stop - start, k * rows.shape[1], rows.shape[2], groups, -1)
            return split.permute(0, 3, 1, 2, 4).flatten(3)

        return Outer(left.permute(0, 2, 1, 4, 3).flatten(2, 3), patches)

    def _patches(self, x: Tensor) -> Tensor:
        """Return what the kernel sees at each place, [n, L, kh·kw, C]."""
        if any(self.padding):
            x = F.pad(x, self.padding, mode=self.mode)
        if self.flat:
            x = x.unsqueeze(2)
        if self.kernel == (1, 1) and self.stride == (1, 1):
            return x.flatten(2).mT.unsqueeze(2)
        x = x.permute(0, 2, 3, 1).contiguous()  # like F.unfold from here on, in far longer runs
        n, height, width, channels = x.shape
        (kh, kw), (dh, dw), (sh, sw) = self.kernel, self.dilation, self.stride
        places = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
        row = width * channels
        strides = (height * row, sh * row, sw * channels, dh * row, dw * channels, 1)
        seen = x.as_strided((n, *places, kh, kw, channels), strides)
        return seen.reshape(n, math.prod(places), kh * kw, channels)


class _EmbeddingLayer(Layer):
    """nn.Embedding; x holds the indices."""

    kind = "rows"

    def __init__(self, module: nn.Embedding) -> None:
        self.padding_idx = module.padding_idx
        self.dim = module.embedding_dim

    def fits(self, x: Tensor, y: Tensor) -> bool:
        return x.dim() >= 1 and tuple(y.shape) == (*x.shape, self.dim)

    def weight(self, x: Tensor, g: Tensor, batch_size: int) -> Contribution:
        indices = x.flatten()
        examples = torch.arange(batch_size, device=x.device)
        examples = examples.repeat_interleave(len(indices) // batch_size)
        values = g.reshape(len(indices), self.dim)
        if self.padding_idx is not None:  # torch gives this row no gradient
            kept = indices != self.padding_idx
            examples, indices, values = examples[kept], indices[kept], values[kept]
        return Rows(examples, indices.long(), values)

    def bias(self, g: Tensor, batch_size: int) -> Contribution:
        raise AssertionError("an embedding has no bias")


class _ScaleLayer(Layer):
    """A norm over the last dimensions (LayerNorm, RMSNorm): y = x̂ ∘ w + b.

    Args:
        shape: The normalised shape.
        normalise: Gives x̂.
        channels_second: Whether the channels are in dimension 1 (the ``LayerNorm2d`` of timm and
            torchvision).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        normalise: Callable[[Tensor], Tensor],
        *,
        channels_second: bool = False,
    ) -> None:
        self.shape = shape
        self.normalise = normalise
        self.channels_second = channels_second

    def fits(self, x: Tensor, y: Tensor) -> bool:
        return (
            x.shape == y.shape
            and x.dim() > len(self.shape)
            and tuple(self._last(x).shape[-len(self.shape) :]) == self.shape
        )

    def weight(self, x: Tensor, g: Tensor, batch_size: int) -> Contribution:
        products = self.normalise(widen(self._last(x))) * widen(self._last(g))
        return PerExample(products.reshape(batch_size, -1, *self.shape).sum(1))

    def bias(self, g: Tensor, batch_size: int) -> Contribution:
        return PerExample(widen(self._last(g)).reshape(batch_size, -1, *self.shape).sum(1))

    def _last(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1) if self.channels_second else x


class _ChannelScaleLayer(_ChannelsSecond):
    """A norm with one scale per channel in dimension 1 (GroupNorm, BatchNorm in eval mode).

    Args:
        channels: How many channels.
        normalise: Gives x̂.
    """

    def __init__(self, channels: int, normalise: Callable[[Tensor], Tensor]) -> None:
        self.channels = channels
        self.normalise = normalise

    def fits(self, x: Tensor, y: Tensor) -> bool:
        return x.dim() >= 2 and x.shape == y.shape and x.shape[1] == self.channels

    def weight(self, x: Tensor, g: Tensor, batch_size: int) -> Contribution:
        products = self.normalise(widen(x)) * widen(g)
        return PerExample(_sum_but_channels(products, batch_size))


def layer_of(module: nn.Module) -> Layer | None:
    """Return the description of a module's weight and bias, None for an unsupported module."""
    if isinstance(module, nn.Linear):
        return _LinearLayer(module)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return _ConvLayer(module)
    if isinstance(module, nn.Embedding):
        # max_norm changes the weight during the forward, scale_grad_by_freq mixes the examples
        own = module.max_norm is None and not module.scale_grad_by_freq
        return _EmbeddingLayer(module) if own else None
    if isinstance(module, nn.LayerNorm):
        return _layer_norm(module)
    if isinstance(module, nn.RMSNorm):
        return _rms_norm(module, module.eps)
    if isinstance(module, nn.GroupNorm):
        groups, group_eps = module.num_groups, module.eps
        return _ChannelScaleLayer(
            module.num_channels, lambda x: F.group_norm(x, groups, eps=group_eps)
        )
    if isinstance(module, _BatchNorm):
        return None if module.running_mean is None else _batch_norm(module)
    # Not to import timm and transformers for two classes, these are known by name.
    name = type(module).__name__
    if name == "RmsNorm" and hasattr(module, "normalized_shape"):
        return _rms_norm(module, cast(float, module.eps))
    if name == "Conv1D" and hasattr(module, "nf") and cast(Tensor, module.weight).dim() == 2:
        return _TransposedLinearLayer(module)
    return None


def _layer_norm(module: nn.LayerNorm) -> Layer:
    shape, eps = tuple(module.normalized_shape), module.eps
    return _ScaleLayer(
        shape,
        lambda x: F.layer_norm(x, shape, eps=eps),
        channels_second=type(module).__name__ == "LayerNorm2d",
    )


def _rms_norm(module: nn.Module, eps: float | None) -> Layer:
    shape = tuple(cast("tuple[int, ...]", module.normalized_shape))
    return _ScaleLayer(shape, lambda x: F.rms_norm(x, shape, eps=eps))


def _batch_norm(module: _BatchNorm) -> Layer:
    def normalise(x: Tensor) -> Tensor:
        assert module.running_mean is not None
        assert module.running_var is not None
        shape = (-1,) + (1,) * (x.dim() - 2)
        scale = (module.running_var.to(x.dtype) + module.eps).rsqrt()
        return (x - module.running_mean.to(x.dtype).view(shape)).mul_(scale.view(shape))

    return _ChannelScaleLayer(module.num_features, normalise)


def _sum_but_channels(values: Tensor, batch_size: int) -> Tensor:
    """Sum [k·B, C, …] to [B, C]."""
    places = math.prod(values.shape[2:])
    return values.reshape(batch_size, -1, values.shape[1], places).sum((1, 3))


def _padding(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Return (left, right) of every spatial dimension, the last one first, as F.pad wants it."""
    pads = []
    for i in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[i] * (module.kernel_size[i] - 1)
            pads += [total // 2, total - total // 2]
        elif module.padding == "valid":
            pads += [0, 0]
        else:
            pads += [cast(int, module.padding[i])] * 2
    return pads
