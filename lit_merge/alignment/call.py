"""One operation of PyTorch that has run, with the axes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lit_merge.alignment.units import SINGLE, Axis, fix, is_uniform, unify

Axes: TypeAlias = list[Axis]


class Call:
    """One operation that ran: its arguments by name, and the axes of its tensors."""

    def __init__(
        self,
        axes_of: Callable[[Tensor], Axes],
        func: Any,
        args: tuple[Any, ...],
        kwargs: Any,
        outputs: Any,
    ) -> None:
        schema = func._schema
        names = [argument.name for argument in schema.arguments]
        defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        self.arguments: dict[str, Any] = {**defaults, **dict(zip(names, args, strict=False))}
        self.arguments.update(kwargs)
        self.mutates = bool(schema.is_mutable)
        self.name = str(schema.name).removeprefix("aten::")
        if self.mutates:
            self.name = self.name.removesuffix("_")
        self.pointwise = torch.Tag.pointwise in func.tags
        self.tensors = [v for v in tree_leaves(self.arguments) if isinstance(v, Tensor)]
        self.outputs = [v for v in tree_leaves(outputs) if isinstance(v, Tensor)]
        self._axes_of = axes_of

    def axes(self, name: str) -> Axes:
        """Return the axes of the tensor that is this argument."""
        return list(self._axes_of(self.arguments[name]))

    def axes_of(self, tensor: Tensor) -> Axes:
        """Return the axes of a tensor."""
        return list(self._axes_of(tensor))

    def dim(self, name: str = "dim", rank: int | None = None) -> int:
        """Return an axis number that is an argument, counted from 0."""
        rank = len(self.axes("self")) if rank is None else rank
        return int(self.arguments[name]) % max(rank, 1)


Rule: TypeAlias = Callable[[Call], "list[Axes] | None"]
"""Unifies the axes that meet in a call, and returns those of its outputs.

None if it can say nothing of them, and all axes that enter are to be fixed.
"""


def fix_all(axes: Sequence[Axis]) -> None:
    """Fix all axes of a tensor."""
    for axis in axes:
        fix(axis)


def unify_all(one: Sequence[Axis], other: Sequence[Axis]) -> None:
    """Make the axes of two tensors of one shape the same."""
    for a, b in zip(one, other, strict=True):
        unify(a, b)


def broadcast(many: Sequence[Axes]) -> Axes:
    """Return the axes of what tensors are broadcast to, unified where they meet."""
    rank = max(map(len, many), default=0)
    result: Axes = [SINGLE] * rank
    for axes in many:
        for i, axis in enumerate(axes, start=rank - len(axes)):
            if axis.size == 1 or (result[i].size > 1 and is_uniform(axis)):
                continue
            if result[i].size > 1 and not is_uniform(result[i]):
                unify(result[i], axis)
            else:
                result[i] = axis
    return result
