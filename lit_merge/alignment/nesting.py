"""Symmetries inside of symmetries: the inner dimensions of attention heads, and the heads.

Two models' heads can only be compared up to their inner dimensions, which each model has in an
order of its own. So a head's profit at a place is what it earns after its inner dimensions have
been matched there; heads and inner dimensions are then permuted together. What must be known for it
is which inner symmetry of one head answers to which of another: those that lie on the same axes, at
the same distances from where their head begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lit_merge.alignment.symmetry import Symmetry

_Signature = tuple[tuple[str, int, tuple[tuple[int, ...], ...]], ...]


@dataclass(frozen=True)
class Family:
    """The counterparts of one inner symmetry in all units of an outer one.

    Attributes:
        members: Names, by the unit that they lie in.
        leaf: Whether nothing lies inside of them.
    """

    members: tuple[str, ...]
    leaf: bool


def families_inside(outer: Symmetry, symmetries: Sequence[Symmetry]) -> tuple[Family, ...]:
    """Return what lies inside the units of a symmetry, also deeper, the outer before the inner.

    Inner symmetries without a counterpart in every unit are left out; see :func:`unmatched`.

    Args:
        outer: The symmetry whose units contain others.
        symmetries: All symmetries.
    """
    parents = {s.name: s.inside for s in symmetries}
    containing = {s.inside for s in symmetries}
    found: dict[tuple[_Signature, int], dict[int, str]] = {}
    for inner in symmetries:
        if not _descends(inner.name, outer.name, parents):
            continue
        placed = _place(inner, outer)
        if placed is None:
            continue
        unit, signature = placed
        rank = 0  # equal signatures in one unit would be the same symmetry twice
        while unit in found.setdefault((signature, rank), {}):
            rank += 1
        found[signature, rank][unit] = inner.name
    return tuple(
        Family(tuple(units[u] for u in range(outer.size)), units[0] not in containing)
        for units in found.values()
        if len(units) == outer.size
    )


def unmatched(symmetries: Sequence[Symmetry]) -> frozenset[str]:
    """Return the inner symmetries that must stay as they are, lest moved heads lose track of them.

    They are those that not every unit around them has a counterpart of.
    """
    parents = {s.name: s.inside for s in symmetries}
    left_out = set()
    for outer in symmetries:
        known = {n for family in families_inside(outer, symmetries) for n in family.members}
        left_out |= {n for n in parents if _descends(n, outer.name, parents)} - known
    return frozenset(left_out)


def _descends(name: str, ancestor: str, parents: dict[str, str | None]) -> bool:
    parent = parents[name]
    return parent is not None and (parent == ancestor or _descends(parent, ancestor, parents))


def _place(inner: Symmetry, outer: Symmetry) -> tuple[int, _Signature] | None:
    """Return the outer unit in which an inner symmetry lies, and how it lies there."""
    around = {(axis.name, axis.axis): axis.positions for axis in outer.axes}
    units, signature = set(), []
    for axis in sorted(inner.axes, key=lambda axis: (axis.name, axis.axis)):
        positions = around.get((axis.name, axis.axis))
        if positions is None:
            return None
        owner = torch.full((int(max(positions.max(), axis.positions.max())) + 1, 2), -1)
        for unit, row in enumerate(positions):
            owner[row, 0] = unit
            owner[row, 1] = torch.arange(len(row))
        units |= set(owner[axis.positions, 0].flatten().tolist())
        offsets = tuple(map(tuple, owner[axis.positions, 1].tolist()))
        signature.append((axis.name, axis.axis, offsets))
    if len(units) != 1 or -1 in units:
        return None
    return int(units.pop()), tuple(signature)
