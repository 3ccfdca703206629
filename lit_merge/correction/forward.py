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
from torch.utils.hooks import RemovableHandle

from lit_merge.correction.site import Site
from lit_merge.correction.wrappers import bare_module_at
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


def first_tensor(value: Any) -> Tensor | None:
    """Return what a module was given or has returned: a tensor, or the first of several.

    Blocks of some transformers return a tuple, hidden states first.
    """
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def with_first_tensor(value: Any, tensor: Tensor) -> Any:
    """Return a module's output or arguments with another tensor for :func:`first_tensor`'s."""
    if isinstance(value, tuple):
        return (tensor, *value[1:])
    return [tensor, *value[1:]] if isinstance(value, list) else tensor


def channels_last(output: Any, site: Site) -> Tensor:
    """Return the activation at a site as ``[B, ..., C]``.

    Args:
        output: What the site's module has returned, or its arguments for a site before it; of
            several values the first counts.
        site: The site.

    Raises:
        InputError: It is no tensor, or has not the site's channels where they should be.
    """
    what = "input" if site.before else "output"
    found = first_tensor(output)
    if found is not None and found.is_nested:
        raise InputError(
            f"site {site.name!r}: its {what} must be padded, not nested; got a nested tensor. "
            "Build the TransformerEncoder with enable_nested_tensor=False."
        )
    if found is None or found.ndim < 2:
        got = f"shape {tuple(found.shape)}" if found is not None else type(output)
        raise InputError(
            f"site {site.name!r}: its {what} must be a batch of tensors; got {got}. Leave this "
            "module out of the sites."
        )
    if found.shape[site.channel_dim] != site.num_features:
        raise InputError(
            f"site {site.name!r}: its {what} must have {site.num_features} channels on axis "
            f"{site.channel_dim}; got shape {tuple(found.shape)}. Find the sites on this model."
        )
    return found.movedim(site.channel_dim, -1)


def watch_site(
    model: nn.Module, site: Site, see: Callable[[Tensor], None], *, prepend: bool = False
) -> RemovableHandle:
    """Show every activation at a site to a function while the model runs.

    Args:
        model: The network, wrapped or not.
        site: Where to look.
        see: Called with ``[B, ..., C]``.
        prepend: Whether to look before hooks that are there already (corrections), not after them.

    Returns:
        What takes the hook away again.
    """
    module = module_at(model, site.module)
    if site.before:

        def look_before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(channels_last(args or tuple(kwargs.values()), site))

        return module.register_forward_pre_hook(look_before, prepend=prepend, with_kwargs=True)

    def look_after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        see(channels_last(output, site))

    return module.register_forward_hook(look_after, prepend=prepend)


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
    """Return the module of that qualified name, which is the one in the bare model.

    Raises:
        InputError: The model has no such module.
    """
    try:
        return bare_module_at(model, name)
    except AttributeError:
        raise InputError(
            f"{parameter}: must name modules of {type(model).__name__}; got {name!r}, which it "
            "does not have. Check that the model is the one that the names were taken from."
        ) from None
