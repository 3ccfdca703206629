"""What turns one batched forward and backward into sums of squared per-example gradients.

While a :class:`Capture` is entered, it sees every call of a torch function, whoever makes it: that
of a module, of a function, of a parametrization. It follows two kinds of tensors:

* those *of the examples*: the batch and everything computed from it;
* those *of the parameters alone*: parameters and what is computed from them before any example
  comes in (a reshaped layer scale, a table of relative positions, a standardised kernel).

Where one of the second kind meets the first, its per-example gradient can be had: from the input of
the call and the gradient of its output (:mod:`lit_merge.curvature.operations`), or by giving each
example a copy of its own (:mod:`lit_merge.curvature.broadcasting`). A function that neither knows
makes its parameters *failed*: they are computed one example at a time instead.

The parameters themselves are frozen meanwhile, so autograd does not form their ordinary gradients:
this replaces that work instead of coming on top of it. (If they are not frozen, both are done.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lit_merge.curvature.attention import MULTI_HEAD_ATTENTION, multi_head_attention
from lit_merge.curvature.backward import accumulate_gradients
from lit_merge.curvature.broadcasting import Broadcast, broadcast, of_einsum
from lit_merge.curvature.estimator import zeros_for
from lit_merge.curvature.following import Derived, Following, mapped, tensors_in
from lit_merge.curvature.kernels import Contribution, add_squares, example_gradient
from lit_merge.curvature.operation import Operation
from lit_merge.curvature.operations import DESCRIPTIONS

_SHAPE_ONLY = frozenset({"expand_as", "view_as", "reshape_as", "type_as", "to"})
"""Methods that take from their arguments only shape, dtype or device."""

_GRADIENT: Any = vars(torch._C.TensorBase)["grad"].__get__
"""The attribute of a parameter that zero_grad looks at: not computed from it."""

_CHOSEN = "it is used on rows that the data chose, as tokens for an expert"

Arrival = Callable[[Tensor], Contribution]
"""Makes a contribution of the gradient that has arrived."""


@dataclass
class _Tally:
    """The uses of one parameter, or of what was computed from parameters, in one forward."""

    uses: int = 0
    arrived: list[Contribution] = field(default_factory=list)


@dataclass
class _Call:
    """A call whose gradient is waited for.

    Attributes:
        uses: What uses which parameter in it, and how to contribute; emptied when done, so that the
            inputs that they hold are given back as the backward goes along.
        x: The input.
        version: Of the input, to notice changes in place.
        output: Which output of its node in the graph.
    """

    uses: list[tuple[str | int, Arrival]]
    x: Tensor | None
    version: int
    output: int


class Capture(TorchFunctionMode):
    """The context of one forward and backward.

    Attributes:
        totals: By parameter name, what the squares are added to.
        anchor: Everything computed from the examples depends on it, so differentiating with respect
            to it runs the backward through all of that.
        failed: Parameters that cannot be covered in this batch, and why; nothing was added to their
            totals.
        reached: Parameters that got a gradient in this batch.
        dtypes: Of the gradients that arrived.
    """

    following_type: ClassVar[type[Following]] = Following

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        totals: MutableMapping[str, Tensor],
        batch_size: int,
        *,
        factor: float = 1.0,
    ) -> None:
        """Set up one batch.

        Args:
            parameters: Those to compute, by name.
            totals: By parameter name, what to add the squares to.
            batch_size: B.
            factor: What gradients are multiplied with before squaring, where the loss that is
                differentiated is not the sum over the examples.
        """
        super().__init__()
        self.totals = totals
        self.anchor = torch.zeros((), requires_grad=True)
        self.failed: dict[str, str] = {}
        self.reached: set[str] = set()
        self.dtypes: set[torch.dtype] = set()
        self._size = batch_size
        self._factor = factor
        self._following = self.following_type(parameters, batch_size)
        self._tallies: dict[str | int, _Tally] = {}
        self._recording = True

    def mark(self, tensors: Iterable[Tensor]) -> None:
        """Declare tensors to be of the examples: those of the batch."""
        self._following.mark(tensors)

    def end_forward(self) -> None:
        """Take no more calls: what comes now is recomputation by activation checkpointing."""
        self._recording = False

    def end_backward(self) -> None:
        """Finish what had to wait for the end of the backward."""
        random = "random numbers are drawn in computing with it before any example comes in"
        self.failed.update(dict.fromkeys(self._following.unsound, random))
        with torch._C.DisableTorchFunction():
            for name in self._following.parameters:
                if name in self._tallies and name not in self._following.proxies:
                    self._finish(name)
            self._finish_derived()
        self._tallies = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a torch function, and take from it what is to be known."""
        kwargs = kwargs or {}
        if func is Tensor.backward:
            with self:
                return accumulate_gradients(*args, **kwargs)
        following = self._following
        tensors = tensors_in(args, kwargs)
        operands = [t for t in tensors if following.is_of_parameters(t)]
        met = args[:1] if func.__name__ in _SHAPE_ONLY else tensors
        examples = any(following.is_of_examples(t) for t in met if isinstance(t, Tensor))
        if not operands or func == _GRADIENT or not torch.is_grad_enabled():
            result = func(*args, **kwargs)
            if examples:
                following.mark_result(func, args, kwargs, result)
            return result
        if torch._C._functorch.maybe_current_level() is not None:
            self._fail(operands, "it is used inside a transform of torch.func")
            return func(*args, **kwargs)
        if examples:
            return self._meeting(func, args, kwargs, operands)
        return following.derive(func, args, kwargs)

    def _meeting(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
    ) -> Any:
        """Run a function that combines parameters and examples."""
        if func is MULTI_HEAD_ATTENTION:
            with self:
                attended = multi_head_attention(*args, **kwargs)
            if attended is not None:
                return attended
        tensors, result = tensors_in(args, kwargs), None
        chosen = any(self._following.has_chosen_rows(tensor) for tensor in tensors)
        if not chosen:
            result = self._operation(func, args, kwargs, operands)
            if result is None:
                result = self._broadcast(func, args, kwargs, operands)
        if result is None:
            self._fail(operands, _CHOSEN if chosen else self._reason(func, tensors))
            result = func(*args, **kwargs)
        self._following.mark_result(func, args, kwargs, result)
        return result

    def _operation(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
    ) -> Tensor | None:
        operation = self._describe(func, args, kwargs)
        if operation is None:
            return None
        roles = {id(operation.weight): operation.weight_gradient}
        roles[id(operation.bias)] = operation.bias_gradient
        if not all(id(operand) in roles for operand in operands):
            return None
        if operation.weight is operation.bias:
            return None
        y: Tensor = func(*args, **kwargs)
        if not operation.fits(y, self._size):
            return None
        for operand in operands:
            self._following.take_whole(operand)
        if not y.requires_grad:
            y = anchored(y, self.anchor)
        uses = {
            id(operand): (operand, partial(roles[id(operand)], batch_size=self._size))
            for operand in operands
        }
        self._watch(y, list(uses.values()), operation.x)
        return y

    def _describe(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Operation | None:
        describe = DESCRIPTIONS.get(func)
        return None if describe is None else describe(*args, **kwargs)

    def _broadcast(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
    ) -> Any | None:
        """Give each example its own copy of the operands, where the function takes that."""
        plan = of_einsum if func.__name__ == "einsum" else broadcast
        changes = plan(func, args, kwargs, operands, self._following.is_of_examples, self._size)
        if changes is None:
            return None
        own: dict[int, Tensor] = {}
        for change in changes.operands:
            copies = change.copies(self.anchor, self._size)
            self._watch(copies, [(change.operand, self._of_copies(change))], None)
            own[id(change.operand)] = change.in_rows(copies)
        changed, named = mapped((changes.args or args, kwargs), lambda t: own.get(id(t), t))
        return func(*changed, **named)

    def _of_copies(self, change: Broadcast) -> Arrival:
        derived = self._following.derived_from(change.operand)
        if derived is None or derived.lookup is None:
            return partial(change.contribution, batch_size=self._size)
        examples = torch.arange(self._size, device=change.operand.device)
        return partial(derived.lookup.rows, examples=examples)

    def _watch(self, y: Tensor, uses: Sequence[tuple[Tensor, Arrival]], x: Tensor | None) -> None:
        """Wait for the gradient of y; of the input x notice changes in place."""
        if not self._recording:
            return
        keyed = [(self._key(operand), arrival) for operand, arrival in uses]
        for key, _ in keyed:
            self._tallies.setdefault(key, _Tally()).uses += 1
        call = _Call(keyed, x, 0 if x is None else _version(x), y.output_nr)
        # of the node, not of the tensor: hooks of the user on the tensor come before
        assert y.grad_fn is not None
        y.grad_fn.register_prehook(partial(self._arrive, call))

    def _key(self, operand: Tensor) -> str | int:
        """Return the parameter's name, or the identity of what was computed from parameters."""
        derived = self._following.derived_from(operand)
        if derived is None:
            return self._following.name_of(operand)
        return id(operand) if derived.lookup is None else derived.lookup_name

    def _fail(self, operands: Iterable[Tensor], reason: str) -> None:
        if self._recording:
            names = (name for o in operands for name in self._following.names_behind(o))
            self.failed.update(dict.fromkeys(names, reason))

    def _reason(self, func: Callable[..., Any], tensors: Iterable[Tensor]) -> str:
        for tensor in tensors:
            if self._following.is_of_examples(tensor) and tensor.dim():
                rows = len(tensor)
                if rows % self._size:
                    return (
                        f"{func.__name__}() was called with {rows} rows for {self._size} examples"
                    )
        return f"{func.__name__}() takes it in a way without a fast form"

    @torch.no_grad()
    def _arrive(self, call: _Call, gradients: tuple[Tensor | None, ...]) -> None:
        """Take the gradient of the output of a call."""
        g = gradients[call.output]
        if g is None:
            return
        with torch._C.DisableTorchFunction():
            self.dtypes.add(g.dtype)
            changed = call.x is not None and _version(call.x) != call.version
            for key, arrival in call.uses:
                names = self._following.names_of(key)
                if self._recording:
                    self.failed.update(dict.fromkeys(names, "gradients are taken in the forward"))
                elif changed:
                    reason = "the input of a call was changed in place after it"
                    self.failed.update(dict.fromkeys(names, reason))
                elif key not in self.failed:
                    self._add(key, arrival, g)
            call.uses, call.x = [], None

    def _add(self, key: str | int, arrival: Arrival, g: Tensor) -> None:
        tally = self._tallies[key]
        tally.arrived.append(arrival(g))
        held = isinstance(key, int) or key in self._following.proxies
        if len(tally.arrived) == tally.uses and not held:
            self._finish(key)

    def _finish(self, key: str | int) -> None:
        """Square and add what has arrived for a parameter."""
        assert isinstance(key, str)
        arrived, self._tallies[key].arrived = self._tallies[key].arrived, []
        if arrived and key not in self.failed:
            self.reached.add(key)
            add_squares(self._room(key), arrived, self._size, factor=self._factor)

    def _room(self, name: str) -> Tensor:
        """Return what a parameter's squares are added to."""
        return self.totals[name]

    def _finish_derived(self) -> None:
        """Carry gradients of what was computed from parameters on to them, per example."""
        proxies = {n: p for n, p in self._following.proxies.items() if n not in self.failed}
        direct = {n: self._tallies[n].arrived for n in proxies if n in self._tallies}
        ends = [
            (derived, self._tallies[key].arrived)
            for key, derived in self._following.derived.items()
            if key in self._tallies and self._tallies[key].arrived
        ]
        if not ends or not proxies:
            for name, arrived in direct.items():
                if arrived:
                    self._finish(name)
            return
        self._pull_back(proxies, direct, ends)

    def _pull_back(
        self,
        proxies: Mapping[str, Tensor],
        direct: Mapping[str, Sequence[Contribution]],
        ends: Sequence[tuple[Derived, Sequence[Contribution]]],
    ) -> None:
        outputs = [derived.shadow for derived, _ in ends]
        likes = [zeros_for(o) if o.is_floating_point() else torch.zeros_like(o) for o in outputs]
        for n in range(self._size):
            cotangents = [
                example_gradient(arrived, n, like).to(output.dtype)
                for (_, arrived), like, output in zip(ends, likes, outputs, strict=True)
            ]
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
                outputs,
                list(proxies.values()),
                cotangents,
                retain_graph=n < self._size - 1,
                allow_unused=True,
            )
            for name, gradient in zip(proxies, gradients, strict=True):
                arrived = direct.get(name, ())
                if gradient is None and not arrived:
                    continue
                total = self._room(name)
                self.reached.add(name)
                summed = example_gradient(arrived, n, total)
                if gradient is not None:
                    summed += gradient
                total.addcmul_(summed, summed, value=self._factor**2)


def _version(tensor: Tensor) -> int:
    """Return how often the tensor was changed in place; what inference mode made does not count."""
    return 0 if tensor.is_inference() else tensor._version


def anchored(values: Tensor, anchor: Tensor) -> Tensor:
    """Return the same tensor, now depending on the anchor."""
    result: Tensor = _Anchored.apply(values, anchor)
    return result


class _Anchored(torch.autograd.Function):
    """The same tensor, now depending on the anchor, with a derivative that nobody asks for."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(values)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None
