"""A site: one place in a model with a number per channel, measured and corrected.

It is the output of a module or, where the name ends in ``:input``, what a module is given. Its
channel axis is the last one for linear layers, embeddings and layer norms, ``[B, ..., C]``, and
axis 1 for convolutions and the norms that follow them, ``[B, C, ...]``. Everything else in this
package moves that axis last.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

_INPUT = ":input"

KINDS = (
    "Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, transformers' Conv1D, Embedding, BatchNorm, "
    "InstanceNorm, GroupNorm, LayerNorm and RMSNorm (also their channels-first 2d forms)"
)


@dataclass(frozen=True)
class Site:
    """A place in a model where activations are measured and corrected.

    Attributes:
        name: Qualified name of the module whose output it is, or that name and ``:input`` for what
            the module is given.
        num_features: Number of channels C.
        channel_dim: Axis of the channels: -1 for ``[B, ..., C]``, 1 for ``[B, C, ...]``.

    >>> site = Site("blocks.0.attn.proj:input", 64, -1)
    >>> site.module, site.before
    ('blocks.0.attn.proj', True)
    """

    name: str
    num_features: int
    channel_dim: int

    @property
    def module(self) -> str:
        """Qualified name of the module that the site is at."""
        return self.name.removesuffix(_INPUT)

    @property
    def before(self) -> bool:
        """Whether it is what the module is given, not what it returns."""
        return self.name.endswith(_INPUT)


def input_of(module: str) -> str:
    """Return the name of the site before a module."""
    return module + _INPUT


def channel_layout(module: nn.Module) -> tuple[int, int] | None:
    """Return the number of channels of a module's output and their axis, None if unknown.

    Layers of transformers and timm are recognised by their shape, so neither is imported.

    >>> channel_layout(nn.Linear(3, 5)), channel_layout(nn.Conv2d(3, 8, 1))
    ((5, -1), (8, 1))
    """
    if isinstance(module, nn.Linear):
        return module.out_features, -1
    if isinstance(module, _ConvNd):
        return module.out_channels, 1
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, -1
    if isinstance(module, (_BatchNorm, _InstanceNorm)):
        return module.num_features, 1
    if isinstance(module, nn.GroupNorm):
        return module.num_channels, 1
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, nn.Parameter) else ()
    kind = type(module).__name__
    if kind == "Conv1D" and len(shape) == 2:  # transformers: a Linear stored as [in, out]
        return shape[1], -1
    if isinstance(module, nn.LayerNorm):
        shape = tuple(module.normalized_shape)  # also without an affine part
    if len(shape) == 1 and (isinstance(module, nn.LayerNorm) or _is_layer_norm(kind)):
        # The name is all that tells timm's LayerNorm2d, a subclass of LayerNorm, from its parent.
        first = "2d" in kind or getattr(module, "data_format", None) == "channels_first"
        return shape[0], 1 if first else -1
    return None


def input_layout(module: nn.Module) -> tuple[int, int] | None:
    """Return the number of channels of what a module is given and their axis, None if unknown.

    >>> input_layout(nn.Linear(3, 5)), input_layout(nn.Conv2d(3, 8, 1)), input_layout(nn.GELU())
    ((3, -1), (3, 1), None)
    """
    if isinstance(module, nn.Linear):
        return module.in_features, -1
    if isinstance(module, _ConvNd):
        return module.in_channels, 1
    if is_linear(module):  # transformers' Conv1D
        return len(module.get_parameter("weight")), -1
    return channel_layout(module) if is_norm(module) else None


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a Linear, or transformers' transposed one."""
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D" and channel_layout(module) is not None
    )


def is_convolution(module: nn.Module) -> bool:
    """Return whether a module is a convolution in one to three dimensions."""
    return isinstance(module, _ConvNd)


def is_channel_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm with channels on axis 1: batch, instance or group norm."""
    return isinstance(module, (_BatchNorm, _InstanceNorm, nn.GroupNorm))


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm of any kind."""
    named = isinstance(module, nn.LayerNorm) or _is_layer_norm(type(module).__name__)
    return is_channel_norm(module) or (named and channel_layout(module) is not None)


def _is_layer_norm(kind: str) -> bool:
    return any(word in kind.lower() for word in ("rmsnorm", "layernorm", "simplenorm"))
