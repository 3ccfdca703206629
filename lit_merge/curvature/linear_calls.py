r"""The calls in a forward that multiply by a wanted weight, as rows times a matrix.

A linear layer does :math:`y = W x` at every position of its input: a token, a pixel, an example. So
does a convolution, if x is the patch of the input under its kernel and W the weight [m, c, *kernel]
flattened to [m, n]. What is built on that, matrices of the inputs x (one row each, [n]) and of the
gradients at the outputs y ([m]), needs only these rows.

Calls of ``torch.nn.functional`` are watched, not modules: a layer that is called several times,
weights that several layers share and the packed projections of ``nn.MultiheadAttention`` need
nothing special.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lit_merge.correction.forward import rows as rows_that_count
from lit_merge.curvature.attention import MULTI_HEAD_ATTENTION, multi_head_attention
from lit_merge.curvature.capture import anchored
from lit_merge.curvature.convolution import Convolution
from lit_merge.curvature.estimator import widen
from lit_merge.curvature.operations import Linear

_ELEMENTS = 1 << 22  # of unfolded or widened inputs that are held at a time

GROUPED = "a grouped convolution has a matrix per group"
TABLE = "it is also a table that rows are looked up in"


@dataclass(frozen=True)
class LinearCall:
    """One call.

    Attributes:
        name: The weight's.
        operation: The call's arguments.
        places: The sizes of the output that count places; none for linear layers.
    """

    name: str
    operation: Linear | _Unfolding
    places: torch.Size

    def inputs(self, mask: Tensor | None) -> Iterator[Tensor]:
        """Yield the rows [r, n] of the input, float32 (float64 if they are that).

        Args:
            mask: [B, T], nonzero where a token counts; None counts all rows.
        """
        operation = self.operation
        if isinstance(operation, Linear):
            rows = rows_that_count(operation.x, mask)
            for block in torch.split(rows, _at_once(rows.shape[1])):
                yield widen(block)
            return
        x = _batched(operation.x, self.places)
        mask = _of_places(mask, len(x), self.places)
        for start in range(0, len(x), operation.examples_at_once(self.places)):
            some = slice(start, start + operation.examples_at_once(self.places))
            patches = operation.patches(widen(x[some]), self.places)
            yield rows_that_count(patches, None if mask is None else mask[some])


def gradient_rows(g: Tensor, places: torch.Size, mask: Tensor | None) -> Tensor:
    """Return the rows [r, m] of the gradient at the output of a call, as many as its inputs have.

    Args:
        g: The gradient, of the output's shape.
        places: Of the call.
        mask: [B, T], nonzero where a token counts; None counts all rows.
    """
    if not places:
        return widen(rows_that_count(g, mask))
    values = _batched(g, places).flatten(2).mT
    return widen(rows_that_count(values, _of_places(mask, len(values), places)))


def _of_places(mask: Tensor | None, size: int, places: torch.Size) -> Tensor | None:
    """Return the mask where the places of a convolution are the tokens of the batch's examples."""
    tokens = mask is not None and len(places) == 1 and len(mask) == size
    return mask if tokens else None


class _Unfolding(Convolution):
    """A convolution as a product of its weight's matrix with patches."""

    def patches(self, x: Tensor, places: torch.Size) -> Tensor:
        """Return the patches [b, L, n] of some examples, in the order of the weight's axes."""
        return self._patches(x, places).mT.flatten(2)

    def examples_at_once(self, places: torch.Size) -> int:
        """Return of how many examples the patches are not too large."""
        assert self.weight is not None
        return _at_once(places.numel() * self.weight[0].numel())


def _batched(values: Tensor, places: torch.Size) -> Tensor:
    """Return [B, C, *places], also of one example without the first axis."""
    return values.reshape(-1, *values.shape[-1 - len(places) :])


def _at_once(elements: int) -> int:
    return max(1, _ELEMENTS // max(1, elements))


class LinearCalls(TorchFunctionMode):
    """Within this context every call that multiplies by one of the weights is shown to somebody.

    Attributes:
        recording: Whether calls are shown. To be unset before a backward, in which the parts of a
            model that are under activation checkpointing run a second time.
        left_out: By name, why a weight's calls are not shown.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        see: Callable[[LinearCall, Tensor], None],
        *,
        anchor: Tensor | None = None,
    ) -> None:
        """Set up one forward.

        Args:
            weights: By name.
            see: Called with each call and its output.
            anchor: Requires a gradient. All outputs are made to depend on it, so that a backward to
                it runs through them all. None for a forward without a backward.
        """
        super().__init__()
        self.recording = True
        self.left_out: dict[str, str] = {}
        self._names = {id(weight): name for name, weight in weights.items()}
        self._see = see
        self._anchor = anchor

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a torch function, and show it if it is one of the calls."""
        kwargs = kwargs or {}
        if func is MULTI_HEAD_ATTENTION:
            with self:
                attended = multi_head_attention(*args, **kwargs)
            if attended is not None:
                return attended
        y = func(*args, **kwargs)
        if func in _TABLES:
            self._leave_out(args[1] if len(args) > 1 else kwargs.get("weight"), TABLE)
        if func not in _CALLS:
            return y
        operation = _CALLS[func](*args, **kwargs)
        name = self._names.get(id(operation.weight))
        if name is None or torch._C._functorch.maybe_current_level() is not None:
            return y
        if isinstance(operation, Convolution) and operation.groups > 1:
            self._leave_out(operation.weight, GROUPED)
            return y
        return self._shown(name, operation, y)

    def _shown(self, name: str, operation: Linear | _Unfolding, y: Tensor) -> Tensor:
        if self._anchor is not None and torch.is_grad_enabled() and not y.requires_grad:
            y = anchored(y, self._anchor)
        if self.recording:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                places = torch.Size()
                if isinstance(operation, Convolution):
                    places = y.shape[-len(operation.kernel) :]
                self._see(LinearCall(name, operation, places), y)
        return y

    def _leave_out(self, weight: object, reason: str) -> None:
        name = self._names.get(id(weight))
        if name is not None:
            self.left_out[name] = reason


_CALLS: dict[Callable[..., Any], Callable[..., Linear | _Unfolding]] = {
    F.linear: lambda input, weight, bias=None: Linear(input, weight, bias),
    F.conv1d: _Unfolding,
    F.conv2d: _Unfolding,
    F.conv3d: _Unfolding,
}
_TABLES = (F.embedding, F.embedding_bag)
