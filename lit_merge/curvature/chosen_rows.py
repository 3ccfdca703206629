"""Whether the rows of a tensor are still those of the examples, one example after the other.

Everywhere else the k·B rows of a tensor are taken to belong to the B examples in order, k to each.
Where a model chooses rows by the data (the tokens that an expert gets, those that are no padding),
this can hold for the two examples of the probe by chance, and not for others. So it is looked at
every time, by choosing from the numbers of the examples in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_TAKING = frozenset(
    {"gather", "getitem", "index_select", "masked_select", "take", "take_along_dim"}
)
_COUNTING = frozenset({"argwhere", "nonzero", "unique", "unique_consecutive"})
_PUTTING = frozenset(
    {
        "index_add",
        "index_copy",
        "index_put",
        "index_reduce",
        "masked_scatter",
        "scatter",
        "scatter_add",
        "scatter_reduce",
        "setitem",
    }
)
"""Functions whose result has the rows of their first argument."""


def plain_name(func: Callable[..., Any]) -> str:
    """Return the name of a function however it is called.

    >>> [plain_name(f) for f in (torch.gather, Tensor.index_add_, Tensor.__getitem__)]
    ['gather', 'index_add', 'getitem']
    """
    return func.__name__.strip("_")


@lru_cache(maxsize=1 << 12)
def concerns_rows(func: Callable[..., Any]) -> bool:
    """Return whether a function may make rows of no one, or rows of the examples, of others."""
    return plain_name(func) in _TAKING | _PUTTING | _COUNTING | {"where", "matmul", "mm", "einsum"}


def takes_rows(func: Callable[..., Any]) -> bool:
    """Return whether a function takes entries of its first argument by an index or a mask."""
    return plain_name(func) in _TAKING


def puts_rows(func: Callable[..., Any]) -> bool:
    """Return whether a function puts entries into its first argument by an index or a mask."""
    return plain_name(func) in _PUTTING


def factors(
    func: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return from which factors of a product its rows come, and over the rows of which it sums."""
    if plain_name(func) in {"matmul", "mm"} and args[0].dim() == args[1].dim() == 2:
        return args[:1], args[1:2]
    if func is not torch.einsum or not isinstance(args[0], str) or "." in args[0]:
        return (), ()
    left, _, output = args[0].replace(" ", "").partition("->")
    terms = list(zip(left.split(","), args[1:], strict=False))
    kept = [t for term, t in terms if term[:1] == output[:1]]
    return kept, [t for term, t in terms if term[:1] not in output]


def counts_rows(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Return whether a function gives as many rows as the data have entries of some kind."""
    name = plain_name(func)
    return name in _COUNTING or (name == "where" and len(args) == 1)


@torch.no_grad()
def in_order(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int
) -> bool:
    """Return whether what a function takes are as many entries of every example, in their order.

    Args:
        func: One that takes rows.
        args: Its arguments, the first [k·B, …].
        kwargs: Its arguments by name.
        batch_size: B.
    """
    rows = args[0].shape[0] if args[0].dim() else 0
    if rows == 0 or rows % batch_size:
        return False
    numbers = torch.arange(batch_size, device=args[0].device)
    owners = numbers.repeat_interleave(rows // batch_size)
    owners = owners.view(-1, *[1] * (args[0].dim() - 1)).expand(args[0].shape)
    taken: Tensor = func(owners, *args[1:], **kwargs)
    if taken.dim() == 0 or len(taken) % batch_size:
        return False
    return taken.numel() == 0 or bool((taken.reshape(batch_size, -1) == numbers[:, None]).all())
