"""What lies along an axis of a tensor: units, units inside units, or stretches of units.

An axis is one of

* :class:`Units`: n places that may be interchangeable, or are ``fixed``;
* :class:`Nested`: every unit of the first holds the whole of the next, as heads × head size after
  a flatten (row-major, as memory is);
* :class:`Joined`: one stretch after the other, as after a concatenation.

Two axes that meet in an operation (an addition, a contraction) must be permuted alike:
:func:`unify` makes them one, and splits units where the other side shows more structure. This is
the unification of terms; what cannot be brought together is fixed, which is always safe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor


class Units:
    """Places on an axis; ``value`` is what has later been found to lie there, if anything.

    Attributes:
        size: Number of places.
        fixed: They cannot be permuted.
        uniform: Along the axis of a tensor that these are, all its entries are the same.
        value: None while nothing finer is known.
        siblings: The units with which these were found nested on one axis.
        fibres: For places that were looked at one by one: what the siblings are at each.
    """

    def __init__(self, size: int, *, fixed: bool = False, uniform: bool = False) -> None:
        self.size = size
        self.fixed = fixed
        self.uniform = uniform
        self.value: Axis | None = None
        self.siblings: tuple[Units, ...] = ()
        self.fibres: dict[int, dict[Units, Units]] = {}


class Nested:
    """Units inside units, the outermost first; no parts is an axis of size 1."""

    def __init__(self, parts: Sequence[Axis]) -> None:
        self.parts = tuple(parts)
        self.size: int = math.prod(part.size for part in self.parts)


class Joined:
    """Stretches one after the other."""

    def __init__(self, parts: Sequence[Axis]) -> None:
        self.parts = tuple(parts)
        self.size: int = sum(part.size for part in self.parts)


Axis: TypeAlias = Units | Nested | Joined

SINGLE = Nested(())


def resolve(axis: Axis) -> Axis:
    """Return what is known of an axis now, without nesting in nesting or joins in joins."""
    if isinstance(axis, Units):
        if axis.size == 1:
            return SINGLE
        return axis if axis.value is None else resolve(axis.value)
    kind: type[Nested] | type[Joined] = Nested if isinstance(axis, Nested) else Joined
    parts: list[Axis] = []
    for part in map(resolve, axis.parts):
        if isinstance(part, kind):
            parts.extend(part.parts)
        elif part.size:
            parts.append(part)
    return parts[0] if len(parts) == 1 else kind(parts)


def leaves(axis: Axis) -> Iterator[Units]:
    """Yield the units of an axis, as often as they occur."""
    axis = resolve(axis)
    if isinstance(axis, Units):
        yield axis
    else:
        for part in axis.parts:
            yield from leaves(part)


def fix(axis: Axis) -> None:
    """Say that nothing on an axis may be permuted."""
    for units in leaves(axis):
        units.fixed = True


def is_fixed(axis: Axis) -> bool:
    """Return whether nothing on an axis may be permuted."""
    return all(units.fixed for units in leaves(axis))


def fixed_units(size: int) -> Axis:
    """Return a new axis on which nothing may be permuted."""
    return Units(size, fixed=True)


def is_uniform(axis: Axis) -> bool:
    """Return whether the entries along an axis are the same, as of zeros or after an expansion."""
    axis = resolve(axis)
    return isinstance(axis, Units) and axis.uniform and not axis.fixed


def unify(one: Axis, other: Axis) -> None:
    """Make two axes of one size the same; fix what cannot be."""
    one, other = resolve(one), resolve(other)
    if one is other:
        return
    if is_fixed(one) or is_fixed(other):
        fix(one)
        fix(other)
    elif isinstance(one, Units):
        if isinstance(other, Units):
            other.uniform = other.uniform and one.uniform
        one.value = other
    elif isinstance(other, Units):
        other.value = one
    elif isinstance(one, Nested) and isinstance(other, Nested):
        _unify_nested(one, other)
    elif isinstance(one, Joined) and isinstance(other, Joined):
        _unify_joined(one, other)
    else:
        joined, nested = (one, other) if isinstance(one, Joined) else (other, one)
        fix(nested.parts[0])
        stretch = Nested(nested.parts[1:])
        unify(joined, Joined([stretch] * nested.parts[0].size))


def _unify_nested(one: Nested, other: Nested) -> None:
    left, right = list(one.parts), list(other.parts)
    while left and right:
        for side in (left, right):  # what went before may have split what comes
            side[-1:] = _parts(side[-1])
        low, high = (left, right) if left[-1].size <= right[-1].size else (right, left)
        if low[-1].size != high[-1].size:
            inner = low[-1].size
            split = _split_nested(high[-1], high[-1].size // inner, inner)
            if split is None:
                for part in (*left, *right):
                    fix(part)
                return
            high[-1:] = split
        unify(left.pop(), right.pop())


def _split_nested(axis: Axis, outer: int, inner: int) -> list[Axis] | None:
    """Split an axis into outer × inner, as a view does; None if it has not that structure."""
    axis = resolve(axis)
    if axis.size != outer * inner:
        return None
    if isinstance(axis, Units):
        parts = Units(outer, fixed=axis.fixed), Units(inner, fixed=axis.fixed)
        axis.value = Nested(parts)
        return list(parts)
    if isinstance(axis, Joined) and all(part.size == inner for part in axis.parts):
        for part in axis.parts[1:]:
            unify(axis.parts[0], part)
        return [fixed_units(outer), axis.parts[0]]
    return None


def _unify_joined(one: Joined, other: Joined) -> None:
    left, right = list(reversed(one.parts)), list(reversed(other.parts))
    while left and right:
        for side in (left, right):
            now = resolve(side[-1])
            side[-1:] = reversed(now.parts) if isinstance(now, Joined) else [now]
        low, high = (left, right) if left[-1].size <= right[-1].size else (right, left)
        if low[-1].size != high[-1].size:
            size = low[-1].size
            split = _cut(high[-1], size)
            if split is None:
                for part in (*left, *right):
                    fix(part)
                return
            high[-1:] = [split[1], split[0]]
        unify(left.pop(), right.pop())


def _cut(axis: Axis, at: int) -> tuple[Axis, Axis] | None:
    """Cut an axis in two stretches; None where the cut goes through nested units."""
    axis = resolve(axis)
    if at == 0:
        return Joined(()), axis
    if at == axis.size:
        return axis, Joined(())
    if isinstance(axis, Units):
        first, second = (Units(n, fixed=axis.fixed) for n in (at, axis.size - at))
        axis.value = Joined((first, second))
        return first, second
    if isinstance(axis, Joined):
        before: list[Axis] = []
        for index, part in enumerate(axis.parts):
            if at < part.size:
                halves = _cut(part, at)
                if halves is None:
                    return None
                rest = axis.parts[index + 1 :]
                return Joined((*before, halves[0])), Joined((halves[1], *rest))
            before.append(part)
            at -= part.size
        return None
    inner = axis.size // axis.parts[0].size
    outer = _cut(axis.parts[0], at // inner) if at % inner == 0 else None
    if outer is None:
        return None
    return Nested((outer[0], *axis.parts[1:])), Nested((outer[1], *axis.parts[1:]))


def stretch(axis: Axis, start: int, size: int) -> Axis:
    """Return the places from ``start`` on; fixes the axis where it cannot be cut there."""
    if size == axis.size:
        return axis
    if is_fixed(axis):
        return fixed_units(size)
    tail = _cut(axis, start)
    part = None if tail is None else _cut(tail[1], size)
    if part is None:
        fix(axis)
        return fixed_units(size)
    return part[0]


def join(parts: Sequence[Axis]) -> Axis:
    """Return the axis of a concatenation."""
    joined = Joined(parts)
    return fixed_units(joined.size) if is_fixed(joined) else joined


def view(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
    """Return the axes of a row-major view of a tensor in another shape."""
    if 0 in shape:
        return _fixed_view(axes, shape)
    rest = [part for axis in axes for part in _parts(axis)]
    result: list[Axis] = []
    for size in reversed(shape):
        taken: list[Axis] = []
        wanted = size
        while wanted > 1:
            rest[-1:] = _parts(rest[-1])
            last = rest.pop()
            if wanted % last.size and last.size % wanted == 0:
                split = _split_nested(last, last.size // wanted, wanted)
                if split is None:
                    return _fixed_view(axes, shape)
                rest.append(split[0])
                last = split[1]
                _note_siblings(axes)
            elif wanted % last.size:
                return _fixed_view(axes, shape)
            taken.insert(0, last)
            wanted //= last.size
        result.insert(0, resolve(Nested(taken)))
    return result


def _parts(axis: Axis) -> tuple[Axis, ...]:
    axis = resolve(axis)
    return axis.parts if isinstance(axis, Nested) else (axis,)


def _fixed_view(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
    for axis in axes:
        fix(axis)
    return [fixed_units(size) for size in shape]


def _note_siblings(axes: Sequence[Axis]) -> None:
    for axis in axes:
        parts = _parts(axis)
        nested = tuple(part for part in parts if isinstance(part, Units))
        for units in nested if len(parts) > 1 else ():
            units.siblings = nested


def place(axis: Axis, index: int, others: Sequence[Axis]) -> list[Axis]:
    """Look at one place of an axis (``x[:, i]``), which from then on is fixed.

    Units nested on the same axis may be permuted otherwise at another place: queries, keys and
    values that come as one axis 3 × heads × size are three stretches, each with its own units.

    Returns:
        The other axes of the tensor, as they are at this place.
    """
    axis = resolve(axis)
    if not isinstance(axis, Units) or (axis.fixed and not axis.fibres):
        fix(axis)
        return list(others)
    axis.fixed = True
    inner = {u for sibling in axis.siblings if sibling is not axis for u in leaves(sibling)}
    fibre = axis.fibres.setdefault(index, {u: Units(u.size, fixed=u.fixed) for u in inner})
    return [_replaced(other, fibre) for other in others]


def _replaced(axis: Axis, units: dict[Units, Units]) -> Axis:
    axis = resolve(axis)
    if isinstance(axis, Units):
        return units.get(axis, axis)
    return type(axis)([_replaced(part, units) for part in axis.parts])


def separate_fibres(axes: Sequence[Axis]) -> list[Axis]:
    """Write axes whose outer places were looked at one by one as stretches, one for each place.

    Fixes the units for which that does not hold: those that are used without their outer places
    too, or that were found to have more structure after they had been looked at.
    """
    outers = {units for axis in axes for units in leaves(axis) if units.fibres}
    alone = {pair for axis in axes for pair in _without_outer(resolve(axis), outers, frozenset())}
    for outer in outers:
        for fibre in outer.fibres.values():
            for units, at_place in fibre.items():
                if units.value is not None or units.fixed or (units, outer) in alone:
                    fix(units)
                    fix(at_place)
    return [separated(axis) for axis in axes]


def _without_outer(
    axis: Axis, outers: set[Units], inside: frozenset[Axis]
) -> Iterator[tuple[Units, Units]]:
    if isinstance(axis, Units):
        for outer in outers - inside:
            yield axis, outer
        return
    for part in axis.parts:
        yield from _without_outer(part, outers, inside)
        if isinstance(axis, Nested):
            inside |= {part}


def separated(axis: Axis) -> Axis:
    """Write an axis whose outer places were looked at one by one as stretches."""
    axis = resolve(axis)
    if isinstance(axis, Units):
        return axis
    if isinstance(axis, Joined):
        return Joined([separated(part) for part in axis.parts])
    for i, outer in enumerate(axis.parts):
        if isinstance(outer, Units) and outer.fibres:
            rest = Nested(axis.parts[i + 1 :])
            stretches = [
                separated(_replaced(rest, outer.fibres.get(place, {})))
                for place in range(outer.size)
            ]
            return resolve(Nested((*axis.parts[:i], Joined(stretches))))
    return axis


def coordinates(axis: Axis, units: Units) -> Tensor | None:
    """Return which of the units each place of an axis belongs to, −1 for none, int64 ``[size]``.

    None if the units occur twice in one nesting, where no permutation of places can follow them.
    """
    axis = resolve(axis)
    if isinstance(axis, Units):
        return torch.arange(axis.size) if axis is units else torch.full((axis.size,), -1)
    found = [coordinates(part, units) for part in axis.parts]
    if any(part is None for part in found):
        return None
    parts = [part for part in found if part is not None]
    if isinstance(axis, Joined):
        return torch.cat(parts)
    inside = [i for i, part in enumerate(parts) if bool((part >= 0).any())]
    if len(inside) > 1:
        return None
    sizes = [part.size for part in axis.parts]
    result = torch.full(sizes, -1)
    for i in inside:
        shape = [1] * len(sizes)
        shape[i] = -1
        result = parts[i].view(shape).expand(sizes)
    return result.flatten()
