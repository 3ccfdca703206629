"""Which tensors belong to the examples of a batch, and which to the parameters alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lit_merge.curvature.chosen_rows import (
    concerns_rows,
    counts_rows,
    factors,
    in_order,
    puts_rows,
    takes_rows,
)
from lit_merge.curvature.operations import DESCRIPTIONS, Lookup

MARK = "_of_the_examples"


class _Mark:
    """Put on the tensors of one forward: a tensor that outlives it is a constant in the next."""


@dataclass
class Derived:
    """A tensor computed from parameters alone.

    Attributes:
        value: The tensor.
        shadow: The same, computed from proxies of the parameters that require a gradient.
        names: The parameters behind it.
        lookup: Set if it is rows of one parameter, which need no general derivative.
        lookup_name: That parameter.
    """

    value: Tensor
    shadow: Tensor
    names: frozenset[str]
    lookup: Lookup | None = None
    lookup_name: str = ""


class Following:
    """Follows tensors through the calls of one forward.

    Attributes:
        parameters: The parameters, by name.
        proxies: Detached copies (sharing memory) of those from which something was derived that has
            no simpler form, by name.
        derived: What was computed from parameters alone, by identity.
        unsound: Parameters from which a computation made something else the second time (dropout).
    """

    def __init__(self, parameters: Mapping[str, Tensor], batch_size: int) -> None:
        """Begin with parameters only."""
        self.parameters = parameters
        self._size = batch_size
        self._in_order, self._chosen = _Mark(), _Mark()
        self._any_chosen = False
        self.proxies: dict[str, Tensor] = {}
        self.derived: dict[int, Derived] = {}
        self.unsound: set[str] = set()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._frozen = not any(parameter.requires_grad for parameter in parameters.values())

    def mark(self, tensors: Iterable[Tensor]) -> None:
        """Declare tensors to be of the examples."""
        for tensor in tensors:
            setattr(tensor, MARK, self._in_order)

    def mark_result(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        """Declare the result of a function, and what it changes in place, to be of the examples."""
        chooses = self._chooses(func, args, kwargs)
        self._any_chosen |= chooses
        mark = self._chosen if chooses else self._in_order
        changed = args[:1] if in_place(func) else ()
        for tensor in tensors_in((result, *changed), {}):
            setattr(tensor, MARK, mark)

    def has_chosen_rows(self, tensor: Tensor) -> bool:
        """Return whether the data chose its rows, so that it is unknown whose they are."""
        return getattr(tensor, MARK, None) is self._chosen

    def _chooses(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Return whether the rows of a function's result are chosen by the data."""
        if not self._any_chosen and not concerns_rows(func):
            return False  # almost always
        if counts_rows(func, args):
            return True
        if args and isinstance(args[0], Tensor) and self.is_of_examples(args[0]):
            others = tensors_in(args[1:], kwargs)
            if takes_rows(func) and any(self.is_of_examples(index) for index in others):
                return self.has_chosen_rows(args[0]) or not in_order(func, args, kwargs, self._size)
        if args and puts_rows(func):
            return self.has_chosen_rows(args[0])
        kept, summed = factors(func, args)
        summed = [t for t in summed if self.is_of_examples(t)]
        if summed and all(self.is_of_examples(t) for t in kept):
            put_back = all(self.has_chosen_rows(t) for t in summed)
            return not put_back or any(self.has_chosen_rows(t) for t in kept)
        return any(self.has_chosen_rows(tensor) for tensor in tensors_in(args, kwargs))

    def is_of_examples(self, tensor: Tensor) -> bool:
        """Return whether a tensor was computed from the examples."""
        if self._is_marked(tensor):
            return True
        # With frozen parameters, what autograd follows comes from the examples, even where it went
        # through code that makes no torch function calls.
        return self._frozen and tensor.requires_grad and not tensor.is_leaf

    def _is_marked(self, tensor: Tensor) -> bool:
        mark = getattr(tensor, MARK, None)
        return mark is self._in_order or mark is self._chosen

    def is_of_parameters(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a parameter or computed from parameters alone."""
        if id(tensor) in self.derived:
            return not self._is_marked(tensor)  # as it is once examples were put in in place
        return id(tensor) in self._names

    def name_of(self, parameter: Tensor) -> str:
        """Return a parameter's name."""
        return self._names[id(parameter)]

    def derived_from(self, tensor: Tensor) -> Derived | None:
        """Return what is known of a tensor computed from parameters alone."""
        return self.derived.get(id(tensor))

    def names_behind(self, tensor: Tensor) -> frozenset[str]:
        """Return the names of the parameters that a tensor is or was computed from."""
        derived = self.derived_from(tensor)
        return derived.names if derived is not None else frozenset({self.name_of(tensor)})

    def names_of(self, key: str | int) -> frozenset[str]:
        """Return the names of the parameters behind a name or the identity of a derived tensor."""
        return frozenset({key}) if isinstance(key, str) else self.derived[key].names

    def derive(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a function of parameters alone, and follow what comes out of it."""
        before = args[0].detach().clone() if in_place(func) else None
        lookup = self._lookup(func, args, kwargs)
        result = func(*args, **kwargs)
        outputs = _differentiable(result)
        if before is not None:
            outputs = [args[0]]
        if not outputs:
            return result
        names = frozenset(
            name
            for tensor in tensors_in(args, kwargs)
            if self.is_of_parameters(tensor)
            for name in self.names_behind(tensor)
        )
        if lookup is not None:
            (name,) = names
            self.derived[id(result)] = Derived(result, result, names, lookup, name)
            return result
        with _own_graph():
            shadow_args, shadow_kwargs = mapped((args, kwargs), self._shadow)
            if before is not None:
                base = self.derived_from(args[0])
                shadow_args = (before if base is None else base.shadow, *shadow_args[1:])
            made = func(*shadow_args, **shadow_kwargs)
        shadows = _differentiable(made)
        if before is not None:
            shadows = [shadow_args[0]]
        for output, shadow in zip(outputs, shadows, strict=True):
            if shadow.requires_grad:
                self.derived[id(output)] = Derived(output, shadow, names)
            if not self._frozen and not torch.equal(output, shadow):
                self.unsound |= names
        return result

    def _lookup(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Lookup | None:
        """Return the description of a call that takes rows of a parameter."""
        describe = DESCRIPTIONS.get(func)
        operation = None if describe is None else describe(*args, **kwargs)
        if isinstance(operation, Lookup) and id(operation.weight) in self._names:
            return (
                operation if operation.weight is not None and operation.weight.dim() == 2 else None
            )
        return None

    def take_whole(self, tensor: Tensor) -> None:
        """Follow rows of a parameter as what they are together: a matrix of their own."""
        if self.derived_from(tensor) is not None:
            with _own_graph():
                self._shadow(tensor)

    def _shadow(self, tensor: Tensor) -> Tensor:
        derived = self.derived_from(tensor)
        if derived is not None and derived.lookup is not None:
            lookup, derived.lookup = derived.lookup, None  # its rows are no longer used as such
            table = self._proxy(derived.lookup_name)
            derived.shadow = torch.nn.functional.embedding(
                lookup.x, table, padding_idx=lookup.padding_idx
            )
        if derived is not None:
            return derived.shadow
        if id(tensor) in self._names:
            return self._proxy(self._names[id(tensor)])
        return tensor.detach()

    def _proxy(self, name: str) -> Tensor:
        if name not in self.proxies:
            self.proxies[name] = self.parameters[name].detach().requires_grad_()
        return self.proxies[name]


def tensors_in(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors among arguments, also those in lists and tuples."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(tensors_in(value, {}))
    return found


def _own_graph() -> saved_tensors_hooks:
    """Keep what shadows save out of activation checkpointing, which frees and recomputes it."""
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _differentiable(result: Any) -> list[Tensor]:
    found = tensors_in((result,), {})
    return [tensor for tensor in found if tensor.is_floating_point() or tensor.is_complex()]


def in_place(func: Callable[..., Any]) -> bool:
    """Return whether a function changes its first argument (``add_``, ``__iadd__``, …)."""
    name = func.__name__
    if name.startswith("__"):
        return name == "__setitem__" or (
            name[2] == "i" and name not in ("__invert__", "__index__", "__int__")
        )
    return name.endswith("_")


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return arguments with each tensor changed, also those in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        changed = [mapped(entry, change) for entry in value]
        return tuple(changed) if isinstance(value, tuple) else changed
    if isinstance(value, dict):
        return {key: mapped(entry, change) for key, entry in value.items()}
    return value
