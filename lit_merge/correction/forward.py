"""Running a model and reading its activations: what all measurements here have in common.

Notation: B examples, T tokens, C channels. An activation is ``[B, ..., C]`` after its channel axis
has been moved last; its rows are the values over which statistics are pooled (batch × space, or
batch × tokens without padding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lit_merge.correction.sites import Site
from lit_merge.errors import InputError

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
MaskOf: TypeAlias = Callable[[Any], "Tensor | None"]


def run_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model on its inputs: a mapping as keyword arguments, anything else as one argument."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def attention_mask_of(inputs: Any) -> Tensor | None:
    """Return the ``[B, T]`` mask (nonzero = a real token) that comes with the inputs, if any.

    It is looked for under ``"attention_mask"`` in a mapping, or in the first element of a tuple or
    list, so that ``(inputs, labels)`` works as well.

    Raises:
        InputError: The mask has not two dimensions.
    """
    if isinstance(inputs, (tuple, list)) and inputs:
        return attention_mask_of(inputs[0])
    if not isinstance(inputs, Mapping):
        return None
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim != 2:
        raise InputError(
            f"attention_mask: must be [batch, tokens]; got {tuple(mask.shape)}. Pass the mask of "
            "the tokens that count through `mask=`."
        )
    return mask


def channels_last(output: Any, site: Site) -> Tensor:
    """Return a site's output as ``[B, ..., C]``.

    Raises:
        InputError: The output is no tensor, or has not the site's channels where they should be.
    """
    if isinstance(output, Tensor) and output.is_nested:
        raise InputError(
            f"site {site.name!r}: its output must be padded, not nested; got a nested tensor. "
            "Build the TransformerEncoder with enable_nested_tensor=False."
        )
    if not isinstance(output, Tensor) or output.ndim < 2:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output)
        raise InputError(
            f"site {site.name!r}: its output must be a batch of tensors; got {got}. Leave this "
            "module out of the sites."
        )
    if output.shape[site.channel_dim] != site.num_features:
        raise InputError(
            f"site {site.name!r}: its output must have {site.num_features} channels on axis "
            f"{site.channel_dim}; got shape {tuple(output.shape)}. Find the sites on this model."
        )
    return output.movedim(site.channel_dim, -1)


def rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows that count of an activation.

    A mask ``[B, T]`` applies to activations ``[B, T, ...]`` and to flattened ``[B·T, C]``; others
    (pooled ``[B, C]``, say) have no padding and count whole.

    Args:
        values: Activation, ``[B, ..., C]``.
        mask: Nonzero where a token counts, ``[B, T]``; None counts everything.

    Returns:
        The rows, ``[n, C]``.
    """
    width = values.shape[-1]
    if mask is not None:
        keep = mask.to(device=values.device, dtype=torch.bool)
        if values.ndim >= 3 and values.shape[:2] == keep.shape:
            return values[keep].reshape(-1, width)
        if values.ndim == 2 and values.shape[0] == keep.numel() and keep.shape[1] > 1:
            return values[keep.flatten()]
    return values.reshape(-1, width)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def module_at(model: nn.Module, name: str, *, parameter: str = "sites") -> nn.Module:
    """Return the module of that qualified name.

    Raises:
        InputError: The model has no such module.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise InputError(
            f"{parameter}: must name modules of {type(model).__name__}; got {name!r}, which it "
            "does not have. Check that the model is the one that the names were taken from."
        ) from None
