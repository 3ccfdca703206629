"""Bare parameters (class tokens, position embeddings, layer scales) with a copy for every example.

Some parameters belong to no supported module; the model adds or multiplies them to activations.
For one forward they are replaced by B equal copies along the examples' dimension, [B, …]; the
gradient of the copies is the per-example gradient. Where that dimension must be inserted is not
known beforehand: a layout is a guess, which the probe confirms or rejects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

LEADING = -1
"""The layout that widens a leading dimension of size 1 to B."""

_LARGEST = 1 << 18  # elements; B copies of a large weight would take too much memory


def layouts(parameter: Tensor) -> tuple[int, ...]:
    """Return the layouts worth trying: LEADING, or how many dimensions of size 1 to put after B.

    >>> import torch
    >>> layouts(torch.zeros(1, 17, 8))  # position embedding, added to [B, 17, 8]
    (-1, 0)
    >>> layouts(torch.zeros(8))  # layer scale, multiplied to [B, T, 8], [B, 8] or [B, H, W, 8]
    (1, 0, 2)
    """
    leading = (LEADING,) if parameter.dim() > 1 and parameter.shape[0] == 1 else ()
    if parameter.numel() > _LARGEST:
        return leading
    if leading or parameter.dim() > 1:
        return (*leading, 0)
    return (1, 0, 2)


@contextmanager
def copied_per_example(
    parameters: Mapping[str, nn.Parameter],
    owners: Mapping[str, Sequence[tuple[nn.Module, str]]],
    chosen: Mapping[str, int],
    batch_size: int,
) -> Iterator[dict[str, Tensor]]:
    """Replace parameters by copies, one per example, and put them back at the end.

    The copies go to the modules' ``__dict__``, which Python looks at before the parameters.

    Args:
        parameters: By name.
        owners: All modules that hold a parameter, and the attribute's name.
        chosen: The layout of each parameter to replace.
        batch_size: B.

    Yields:
        The copies by parameter name, leaves that require a gradient.
    """
    copies: dict[str, Tensor] = {}
    replaced: list[tuple[nn.Module, str]] = []
    try:
        for name, layout in chosen.items():
            value = parameters[name].detach()
            shape = value.shape[1:] if layout == LEADING else (1,) * layout + value.shape
            copies[name] = value.reshape(1, *shape).repeat(batch_size, *(1,) * len(shape))
            copies[name].requires_grad_(True)
            for module, attribute in owners[name]:
                module.__dict__[attribute] = copies[name]
                replaced.append((module, attribute))
        yield copies
    finally:
        for module, attribute in replaced:
            del module.__dict__[attribute]
