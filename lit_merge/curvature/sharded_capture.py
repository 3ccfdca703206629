"""The capture of a model that is sharded over ranks with FSDP2 or tensor parallelism.

FSDP2 makes a parameter whole for a forward and a backward; its squares are then found as in one
process, in a buffer as large as the parameter, and each rank keeps of the sum over all ranks what
it holds of the parameter. Under tensor parallelism each rank finds the squares of its part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_merge.curvature.capture import Capture, anchored
from lit_merge.curvature.estimator import zeros_for
from lit_merge.curvature.following import MARK, Following, tensors_in
from lit_merge.curvature.kernels import Contribution, Rows
from lit_merge.curvature.norms import LastNorm
from lit_merge.curvature.operation import Operation
from lit_merge.curvature.operations import Linear, Lookup
from lit_merge.distributed import is_dtensor
from lit_merge.sharding import local_part, operand, own_rows, reduce_scatter_into


class ShardedFollowing(Following):
    """Follows tensors also where shards are put together or exchanged, which no mode sees."""

    def __init__(self, parameters: Mapping[str, Tensor], batch_size: int) -> None:
        """Begin with parameters only."""
        super().__init__(parameters, batch_size)
        self._frozen = True  # from the forward on: used parameters take that over from stored ones
        self._any_chosen = False

    def mark_result(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """See :meth:`Following.mark_result`."""
        super().mark_result(func, args, kwargs, result)
        if not self._any_chosen:
            self._any_chosen = any(map(super().has_chosen_rows, tensors_in((result,), {})))

    def has_chosen_rows(self, tensor: Tensor) -> bool:
        """Return whether the data chose its rows, or may have: an exchange has lost its mark."""
        if super().has_chosen_rows(tensor):
            return True
        marked = getattr(tensor, MARK, None) is self._in_order
        return self._any_chosen and not marked and self.is_of_examples(tensor)

    def is_of_examples(self, tensor: Tensor) -> bool:
        """Return whether a tensor was computed from the examples.

        What is sharded and no parameter is: a batch that goes into a parallel layer.
        """
        if super().is_of_examples(tensor):
            return True
        return (
            is_dtensor(tensor)
            and not isinstance(tensor, nn.Parameter)
            and not self.is_of_parameters(tensor)
        )

    def _proxy(self, name: str) -> Tensor:
        # A copy: the memory of a parameter that FSDP2 has made whole is freed after the backward.
        if name not in self.proxies:
            self.proxies[name] = self.parameters[name].detach().clone().requires_grad_()
        return self.proxies[name]


class ShardedCapture(Capture):
    """The context of one forward and backward, on every rank alike.

    The sum over the ranks of a parameter's squares is taken as soon as this rank's are there, one
    parameter after the other, in the order in which their gradients arrive.
    """

    following_type = ShardedFollowing

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        totals: MutableMapping[str, Tensor],
        batch_size: int,
        *,
        counts: bool = True,
    ) -> None:
        """Set up one batch.

        Args:
            parameters: Those to compute as the forward uses them, by name.
            totals: By parameter name, what to add the squares to, sharded like the parameters.
            batch_size: B.
            counts: Whether the squares of this rank's examples count.
        """
        super().__init__(parameters, totals, batch_size)
        self._counts = counts
        self._rooms: dict[str, Tensor] = {}
        self._settled: set[str] = set()

    def plan(self) -> tuple[Any, ...]:
        """Return what all ranks must have in common between forward and backward."""
        names = {name: tally.uses for name, tally in self._tallies.items() if isinstance(name, str)}
        derived = [sorted(self._following.names_of(k)) for k in self._tallies if isinstance(k, int)]
        return names, derived, tuple(self._following.proxies)

    def end_backward(self) -> None:
        """See :meth:`Capture.end_backward`."""
        super().end_backward()
        for name in self._following.proxies:
            self._settle(name)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See :meth:`Capture.__torch_function__`."""
        result = super().__torch_function__(func, types, args, kwargs)
        if (
            isinstance(result, Tensor)
            and is_dtensor(result)
            and result.is_floating_point()
            and not result.requires_grad
            and torch.is_grad_enabled()
            and self._following.is_of_examples(result)
        ):
            # What autograd follows is known to be of the examples also after an exchange.
            return anchored(result, self.anchor)
        return result

    def _describe(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Operation | None:
        operation = super()._describe(func, args, kwargs)
        if operation is None or not _any_sharded(operation.weight, operation.bias, operation.x):
            return operation
        operands = (operation.weight, operation.bias)
        if any(o is not None and self._following.derived_from(o) is not None for o in operands):
            return None
        if func is F.linear:
            return ShardedLinear(operation.x, operation.weight, operation.bias)
        if isinstance(operation, Lookup) and operation.weight is not None and func is F.embedding:
            return ShardedLookup(operation.x, operation.weight, operation.padding_idx)
        if isinstance(operation, LastNorm):
            return ShardedNorm(operation)
        return None

    def _broadcast(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
    ) -> Any | None:
        if _any_sharded(*operands):
            return None
        return super()._broadcast(func, args, kwargs, operands)

    def _finish(self, key: str | int) -> None:
        assert isinstance(key, str)
        if key not in self._settled:
            super()._finish(key)
            self._settle(key)

    def _room(self, name: str) -> Tensor:
        if name not in self._rooms:
            self._rooms[name] = zeros_for(local_part(self._following.parameters[name]))
        return self._rooms[name]

    def _settle(self, name: str) -> None:
        """Add the squares of all ranks, also where this one has none."""
        if name in self._settled:
            return
        self._settled.add(name)
        room = self._room(name)
        del self._rooms[name]
        if not self._counts or name in self.failed:
            room.zero_()
        with torch.no_grad():
            used = self._following.parameters[name]
            reduce_scatter_into(self.totals[name], room, used=used)


class ShardedLinear(Linear):
    """y = x Wᵀ + b, of which each rank has rows or columns."""

    def weight_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        assert self.weight is not None
        inputs = operand(self.x, self.weight, {1: -1})
        return Linear(inputs, None).weight_gradient(operand(g, self.weight, {0: -1}), batch_size)

    def bias_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        assert self.bias is not None
        return super().bias_gradient(operand(g, self.bias, {0: -1}), batch_size)


class ShardedLookup(Lookup):
    """Rows of a table, of which each rank has some rows or columns."""

    def weight_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        assert self.weight is not None
        whole = Lookup(operand(self.x, self.weight, {}), self.weight, self.padding_idx)
        rows = whole.weight_gradient(operand(g, self.weight, {1: -1}), batch_size)
        assert isinstance(rows, Rows)
        own = own_rows(self.weight)
        here = (rows.indices >= own.start) & (rows.indices < own.stop)
        return Rows(rows.examples[here], rows.indices[here] - own.start, rows.values[here])


class ShardedNorm(Operation):
    """A norm over the last dimensions whose weight every rank has, of activations in parts."""

    def __init__(self, norm: LastNorm) -> None:
        """Take the norm of what would be whole."""
        super().__init__(norm.x, norm.weight, norm.bias)
        self._norm = norm

    def fits(self, y: Tensor, batch_size: int) -> bool:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        return self._norm.fits(y, batch_size)

    def weight_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        assert self.weight is not None
        x, g = operand(self.x, self.weight, {}), operand(g, self.weight, {})
        norm = LastNorm(x, None, None, shape=self._norm.shape, normalise=self._norm.normalise)
        return norm.weight_gradient(g, batch_size)

    def bias_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        assert self.bias is not None
        return self._norm.bias_gradient(operand(g, self.bias, {}), batch_size)


def _any_sharded(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and is_dtensor(tensor) for tensor in tensors)
