"""Arithmetic between parameters and examples: every example gets a copy of the parameter.

Where a function broadcasts, a parameter p can be replaced by [B, …, *p], the same for every example
and without using memory; the gradient of the copies is the per-example gradient. It is no larger
than the function's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_merge.curvature.following import in_place, tensors_in
from lit_merge.curvature.kernels import Contribution, OwnRows, PerExample

_BROADCASTING = frozenset(
    {
        "add",
        "addcdiv",
        "addcmul",
        "baddbmm",
        "div",
        "eq",
        "ge",
        "gt",
        "le",
        "lerp",
        "lt",
        "matmul",
        "maximum",
        "minimum",
        "mul",
        "multiply",
        "ne",
        "pow",
        "scaled_dot_product_attention",
        "sub",
        "subtract",
        "true_divide",
        "truediv",
        "where",
    }
)
_PRODUCTS = frozenset({"matmul", "baddbmm"})
_WITH_ROWS = frozenset({"bmm", "cat", "concat", "concatenate", "stack"})
_COPIED = 1 << 22  # elements that copies may have where they are larger than the function's output


@dataclass(frozen=True)
class Broadcast:
    """How the copies of one operand are laid out.

    Attributes:
        operand: A parameter, or what was computed from parameters alone.
        shape: Of the operand with dimensions of size 1 in front, so that it has as many as the
            output, or one more for the examples.
        repeats: k, where the examples have k rows each.
        own_rows: The operand has its rows for every example already; it is not copied.
    """

    operand: Tensor
    shape: tuple[int, ...]
    repeats: int = 1
    own_rows: bool = False

    def copies(self, anchor: Tensor, batch_size: int) -> Tensor:
        """Return the copies [B, *shape[1:]], which autograd follows."""
        target = self.shape if self.own_rows else (batch_size, *self.shape[1:])
        values = self.operand.reshape(self.shape)
        if values.requires_grad:
            return values.expand(target)
        copies: Tensor = _AnchoredCopies.apply(values, anchor, target)
        return copies

    def in_rows(self, copies: Tensor) -> Tensor:
        """Return the copies with one row for every row of the examples."""
        return copies if self.repeats == 1 else copies.repeat_interleave(self.repeats, 0)

    def contribution(self, g: Tensor, batch_size: int) -> Contribution:
        """Return the per-example gradients of the operand from that of the copies."""
        if self.own_rows:
            return OwnRows(g, len(g) // batch_size)
        return PerExample(g.reshape(batch_size, *self.operand.shape))


@dataclass(frozen=True)
class Changes:
    """What is changed in a call.

    Attributes:
        operands: The operands to replace.
        args: Other arguments than those given, None for the same.
    """

    operands: Sequence[Broadcast]
    args: tuple[Any, ...] | None = None


def broadcast(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    operands: Sequence[Tensor],
    is_of_examples: Callable[[Tensor], bool],
    batch_size: int,
) -> Changes | None:
    """Return how to replace operands of a function that broadcasts; None if it cannot be done.

    Args:
        func: The function.
        args: Its arguments.
        kwargs: Its arguments by name.
        operands: The parameters and tensors computed from them among these.
        is_of_examples: Tells tensors of the examples.
        batch_size: B.
    """
    name = _plain_name(func)
    if name not in _BROADCASTING | _WITH_ROWS:
        return None
    if in_place(func) and any(operand is args[0] for operand in operands):
        return None
    tensors = tensors_in(args, kwargs)
    dims = max(tensor.dim() for tensor in tensors)
    examples = [tensor for tensor in tensors if is_of_examples(tensor)]
    sizes = {len(t) for t in examples if t.dim() == dims and dims > 0}
    rows = max(sizes, default=0)
    if rows == 0 or rows % batch_size or not sizes <= {rows}:
        return None
    room = max(_COPIED, *(tensor.numel() for tensor in examples))
    changes = []
    for operand in operands:
        if operand.dim() == dims and len(operand) == rows:
            changes.append(Broadcast(operand, tuple(operand.shape), own_rows=True))
            continue
        free = operand.dim() < dims or len(operand) == 1
        if name in _WITH_ROWS or not free or (name in _PRODUCTS and operand.dim() < 2):
            return None
        if batch_size * operand.numel() > room and name in _PRODUCTS:
            return None
        shape = (1,) * (dims - operand.dim()) + tuple(operand.shape)
        changes.append(Broadcast(operand, shape, repeats=rows // batch_size))
    return Changes(changes)


def of_einsum(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    operands: Sequence[Tensor],
    is_of_examples: Callable[[Tensor], bool],
    batch_size: int,
) -> Changes | None:
    """Return how to replace operands of an einsum: they get the index of the examples too.

    Arguments as those of :func:`broadcast`.
    """
    equation, tensors = args[0], tensors_in(args[1:], {})
    if not isinstance(equation, str) or "." in equation:
        return None
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    first = {
        term[0] for term, t in zip(terms, tensors, strict=True) if is_of_examples(t) and t.dim()
    }
    sizes = {len(t) for t in tensors if is_of_examples(t) and t.dim()}
    if not arrow or len(first) != 1 or sizes != {batch_size} or not first <= set(output):
        return None
    (letter,) = first
    own = {id(operand) for operand in operands}
    for i, (term, tensor) in enumerate(zip(terms, tensors, strict=True)):
        if id(tensor) in own:
            if letter in term or batch_size * tensor.numel() > _COPIED:
                return None
            terms[i] = letter + term
    changes = [Broadcast(operand, (1, *operand.shape)) for operand in operands]
    return Changes(changes, (f"{','.join(terms)}->{output}", *tensors))


def _plain_name(func: Callable[..., Any]) -> str:
    """Return the name of an operation however it is called: ``add`` for ``__iadd__`` and ``add_``.

    >>> [_plain_name(f) for f in (torch.add, Tensor.__rsub__, Tensor.mul_, Tensor.__imul__)]
    ['add', 'sub', 'mul', 'mul']
    """
    name = func.__name__
    if name.startswith("__"):
        name = name.strip("_")
        return name[1:] if name[1:] in _BROADCASTING and name[0] in "ir" else name
    return name.rstrip("_")


class _AnchoredCopies(torch.autograd.Function):
    """A view of a frozen tensor with copies of it, depending on the anchor."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, anchor: Tensor, shape: tuple[int, ...]) -> Tensor:
        return values.expand(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        return None, None, None
