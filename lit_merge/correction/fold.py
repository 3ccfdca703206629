r"""A scale and shift of what a layer gives or takes, folded into the layer's own tensors.

For a layer whose output is :math:`z = f_θ(x)`, with one number per channel c, find :math:`θ'` of
the same shapes with

.. math:: f_{θ'}(x)_c = s_c f_θ(x)_c + b_c

Linear layers, convolutions (grouped and transposed too) and the affine part of norms scale the rows
of their weight, and their bias takes the shift; embeddings take both in every row, that of the
padding index too, as it is an output like any other. Where not the output but the input of a
linear layer or convolution is corrected, :math:`W (s ⊙ x + b)`, its columns take the scale and its
bias takes :math:`W b`. Sums are in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from lit_merge.correction.site import channel_layout, is_linear


class CannotFoldError(Exception):
    """A layer has no tensors for its scale and shift; the text says why."""


def fold_candidates(module: nn.Module, scale: Tensor, shift: Tensor) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of a layer with its scale and shift inside, as each known formula has them.

    A norm of another library may use its weight as it is or as ``1 + weight``: the caller runs the
    layer and takes the candidate that is right.

    Args:
        module: A layer with one number per channel in its output; unchanged.
        scale: Scale per channel, ``[C]``.
        shift: Shift per channel, ``[C]``.

    Yields:
        New values of some of the layer's own parameters by their names, in their types.

    Raises:
        CannotFoldError: The layer lacks a parameter for it, or its parameters are computed from
            others.

    >>> import torch
    >>> layer = nn.Linear(1, 2)
    >>> (found,) = fold_candidates(layer, torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))
    >>> bool((found["weight"] == layer.weight * torch.tensor([[2.0], [3.0]])).all())
    True
    """
    weight = _weight(module)
    s, b = scale.double(), shift.double()
    w = weight.detach().double()
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            raise CannotFoldError("its rows are held to max_norm")
        yield {"weight": (w * s + b).to(weight.dtype)}
        return
    made = {}
    bias = _parameter(module, "bias")
    if bias is not None:
        made["bias"] = (bias.detach().double() * s + b).to(bias.dtype)
    elif bool(b.any()):
        raise CannotFoldError("it has no bias for the shift")
    if isinstance(module, _ConvNd) and module.transposed:
        scaled = _scaled_transposed(w, s, groups=module.groups)
    elif isinstance(module, (nn.Linear, _ConvNd)):
        scaled = w * s.view(-1, *(1,) * (w.ndim - 1))
    else:  # a norm's [C], or [in, out] of transformers' Conv1D
        scaled = w * s
    yield {**made, "weight": scaled.to(weight.dtype)}
    if w.ndim == 1 and not _is_of_torch(module):
        yield {**made, "weight": ((1 + w) * s - 1).to(weight.dtype)}


def fold_input_candidates(
    module: nn.Module, scale: Tensor, shift: Tensor
) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of a layer with the scale and shift of its input inside.

    Where a convolution pads, its borders see no shift: the caller runs the layer.

    Args:
        module: A layer that is linear in its input; unchanged.
        scale: Scale per input channel, ``[C]``.
        shift: Shift per input channel, ``[C]``.

    Yields:
        New values of some of the layer's own parameters by their names, in their types.

    Raises:
        CannotFoldError: The layer is not linear, or has no bias for the shift.
    """
    convolution = isinstance(module, _ConvNd) and not module.transposed
    if not (is_linear(module) or convolution):
        raise CannotFoldError(f"a {type(module).__name__} is not linear in its input")
    weight = _weight(module)
    bias = _parameter(module, "bias")
    s, b = scale.double(), shift.double()
    # As [groups, out / groups, in / groups, ...].
    groups = module.groups if isinstance(module, _ConvNd) else 1
    w = weight.detach().double()
    w = w if isinstance(module, (nn.Linear, _ConvNd)) else w.T
    grouped = w.reshape(groups, len(w) // groups, *w.shape[1:])
    channels = (groups, 1, -1, *(1,) * (w.ndim - 2))
    made = {}
    if bias is not None:
        moved = (grouped * b.view(channels)).flatten(2).sum(-1).flatten()
        made["bias"] = (bias.detach().double() + moved).to(bias.dtype)
    elif bool(b.any()):
        raise CannotFoldError("it has no bias for the shift")
    scaled = (grouped * s.view(channels)).view_as(w)
    scaled = scaled if isinstance(module, (nn.Linear, _ConvNd)) else scaled.T
    yield {**made, "weight": scaled.to(weight.dtype)}


def fold_shift_into_mean(norm: nn.Module, shift: Tensor) -> dict[str, Tensor]:
    """Return the running mean with which a BatchNorm sees its input shifted.

    Args:
        norm: A BatchNorm in evaluation mode; unchanged.
        shift: What would be added to its input, ``[C]``.

    Raises:
        CannotFoldError: It has no running mean.
    """
    mean = norm._buffers.get("running_mean")
    if mean is None:
        raise CannotFoldError("the BatchNorm behind it has no running mean for the shift")
    return {"running_mean": (mean.double() - shift.double()).to(mean.dtype)}


def _scaled_transposed(weight: Tensor, scale: Tensor, *, groups: int) -> Tensor:
    """Scale the output channels of ``[in, out / groups, ...]``."""
    inputs, per_group, *kernel = weight.shape
    grouped = weight.view(groups, inputs // groups, per_group, *kernel)
    factors = scale.view(groups, 1, per_group, *(1,) * len(kernel))
    return (grouped * factors).view_as(weight)


def _weight(module: nn.Module) -> Tensor:
    found = _parameter(module, "weight")
    if found is None:
        raise CannotFoldError("it has no weight for the scale")
    return found


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter of the layer's own; None where it has none."""
    found = module._parameters.get(name)
    if found is None and isinstance(getattr(module, name, None), Tensor):
        raise CannotFoldError(f"its {name} is computed from other parameters")
    return found


def _is_of_torch(module: nn.Module) -> bool:
    known = (nn.Linear, nn.LayerNorm, nn.GroupNorm, _ConvNd, _BatchNorm, _InstanceNorm)
    return isinstance(module, known) and channel_layout(module) is not None
