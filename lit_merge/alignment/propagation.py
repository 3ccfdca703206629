"""Following the axes of tensors through a forward, operation by operation.

Every axis of every parameter begins as units of its own (:mod:`lit_merge.alignment.units`); each
operation that runs says which axes meet in it (:mod:`lit_merge.alignment.operations`). This sees
the operations that PyTorch really executes, below modules and functions, so that it needs to know
nothing of any architecture: attention heads show in the view that splits them off. The axes of
inputs and outputs are fixed, and so is all that meets them; an operation without a rule fixes all
axes that enter it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from lit_merge.alignment.call import Axes, Call, fix_all, unify_all
from lit_merge.alignment.operations import rule_of
from lit_merge.alignment.units import fixed_units


class AxisPropagation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, gives every tensor that is computed its axes.

    Attributes:
        unknown: Names of the operations that ran and have no rule.
        used: Ids of the given tensors that entered an operation.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._axes: Any = WeakIdKeyDictionary()
        self.unknown: set[str] = set()
        self.used: set[int] = set()

    def follow(self, tensor: Tensor, axes: Axes) -> None:
        """Say what the axes of a tensor are."""
        self._axes[tensor] = axes

    def axes(self, tensor: Tensor) -> Axes:
        """Return the axes of a tensor; fixed ones if nothing is known of it."""
        if tensor not in self._axes:
            self._axes[tensor] = [fixed_units(size) for size in tensor.shape]
        found: Axes = self._axes[tensor]
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and give its outputs their axes."""
        outputs = func(*args, **(kwargs or {}))
        call = Call(self.axes, func, args, kwargs or {}, outputs)
        self.used.update(map(id, call.tensors))
        rule = rule_of(call)
        results = rule(call) if rule else None
        if results is None:
            for tensor in call.tensors:
                fix_all(self.axes(tensor))
            if rule is None and call.tensors:
                self.unknown.add(call.name)
            results = []
        for index, output in enumerate(call.outputs):
            axes = results[index] if index < len(results) else []
            if [axis.size for axis in axes] != list(output.shape):
                axes = [fixed_units(size) for size in output.shape]
            if output is call.arguments.get("self") and call.mutates:
                unify_all(self.axes(output), axes)
            else:
                self.follow(output, axes)
        return outputs
