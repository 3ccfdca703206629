r"""Matching: the permutations of one model's units that bring it nearest to another.

Coordinate descent: one symmetry after another is given its best permutation while all others stay,
an assignment problem, until no symmetry gains. A step is taken only if the sum of all terms rises,
so it never falls. The sum is linear in the permutation of one symmetry unless a tensor has that
symmetry on two of its axes (a layer from the residual stream straight into it); then the assignment
is that of the linear part, and may be refused.

References:
    Ainsworth, Hayase, Srinivasa (2022), arXiv:2209.04836, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_merge.alignment.assignment import assign
from lit_merge.alignment.nesting import Family, families_inside, unmatched
from lit_merge.alignment.symmetry import Symmetry
from lit_merge.alignment.terms import Term, TermAxis, objective, profit

_ROUNDING = 1e-12  # of the objective's size: smaller gains are none


@dataclass(frozen=True)
class Matching:
    """The permutations of one model's units.

    Attributes:
        permutations: By symmetry, int64 ``[size]``: the new unit u is the old ``permutation[u]``.
        before: The sum of the terms with nothing permuted.
        history: The sum after each step that was taken, rising.
        sweeps: How often all symmetries were visited.
    """

    permutations: Mapping[str, Tensor]
    before: float
    history: tuple[float, ...]
    sweeps: int

    @property
    def after(self) -> float:
        """The sum of the terms at the end."""
        return self.history[-1] if self.history else self.before


def match(
    symmetries: Sequence[Symmetry],
    terms: Mapping[str, Term],
    *,
    initial: Mapping[str, Tensor] | None = None,
    max_sweeps: int = 100,
    seed: int = 0,
) -> Matching:
    """Return the permutations of the right model that a coordinate descent finds.

    Args:
        symmetries: What may be permuted, the outer before the inner.
        terms: What to maximise.
        initial: Permutations to begin with; None for the identity.
        max_sweeps: How often at most all symmetries are visited.
        seed: Of the order of the visits.
    """
    descent = _Descent(symmetries, terms, initial)
    before = objective(terms, {})
    value = objective(terms, descent.permutations)
    history = [value] if initial else []
    least = _ROUNDING * sum(float(t.left.norm() * t.right.norm()) for t in terms.values())
    free = descent.visited(symmetries)
    generator = torch.Generator().manual_seed(seed)
    sweeps = 0
    for _ in range(max_sweeps):
        sweeps += 1
        gained = False
        for index in torch.randperm(len(free), generator=generator).tolist():
            gain = descent.improve(free[index], least)
            if gain > 0:
                value += gain
                history.append(value)
                gained = True
        if not gained:
            break
    return Matching(descent.permutations, before, tuple(history), sweeps)


class _Descent:
    """The state of a descent: the permutations so far, and the right stacks moved by them."""

    def __init__(
        self,
        symmetries: Sequence[Symmetry],
        terms: Mapping[str, Term],
        initial: Mapping[str, Tensor] | None,
    ) -> None:
        self.sizes = {s.name: s.size for s in symmetries}
        self.fixed = unmatched(symmetries)
        self.families = {s.name: families_inside(s, symmetries) for s in symmetries}
        self.permutations = {s.name: torch.arange(s.size) for s in symmetries}
        if initial is not None:
            self.permutations |= {n: p.clone() for n, p in initial.items()}
        self.lefts = {name: term.left for name, term in terms.items()}
        self.rights = {n: t.permuted(t.right, self.permutations) for n, t in terms.items()}
        self.axes: dict[str, list[tuple[str, TermAxis]]] = {name: [] for name in self.sizes}
        self.terms = terms
        for name, term in terms.items():
            for place in term.axes:
                self.axes[place.symmetry].append((name, place))

    def visited(self, symmetries: Sequence[Symmetry]) -> list[Symmetry]:
        """Return what is visited: not the inner symmetries that their outer one takes along."""
        free = [s for s in symmetries if s.size > 1 and s.name not in self.fixed]
        along = {n for s in free for f in self._disjoint_leaves(s.name) for n in f.members}
        return [s for s in free if s.name not in along]

    def improve(self, symmetry: Symmetry, least: float) -> float:
        """Take the best step in one symmetry, if it gains more than ``least``; return the gain."""
        if not self.axes[symmetry.name]:
            return 0.0
        families = self._disjoint_leaves(symmetry.name)
        steps = [self._step(symmetry, families)]
        if families:
            steps.append(self._step(symmetry, ()))
        for step in steps:
            if all(torch.equal(p, torch.arange(len(p))) for p in step.values()):
                continue
            gain, moved_stacks = self._gain(step)
            if gain > least:
                self.rights |= moved_stacks
                self._compose(symmetry.name, step)
                return gain
        return 0.0

    def _disjoint_leaves(self, name: str) -> tuple[Family, ...]:
        """Return families to match together with the units around them.

        No two of them lie at one place: what such two earn does not add up.
        """
        chosen: list[Family] = []
        taken: dict[tuple[str, int], set[int]] = {}
        for family in self.families[name]:
            own = [
                ((term, place.axis), set(place.positions.flatten().tolist()))
                for term, place in self.axes[family.members[0]]
            ]
            if family.leaf and not any(taken.get(key, set()) & seen for key, seen in own):
                chosen.append(family)
                for key, seen in own:
                    taken.setdefault(key, set()).update(seen)
        return tuple(chosen)

    def _step(self, symmetry: Symmetry, families: Sequence[Family]) -> dict[str, Tensor]:
        """Return the best permutations of a symmetry and, together with it, of families inside."""
        total = self._profit_outside(symmetry.name, families)
        inner: list[tuple[Family, list[list[Tensor]]]] = []
        for family in families:
            profits = self._profit_inside(family)
            units = range(symmetry.size)
            best = [[assign(profits[u, :, v]) for v in units] for u in units]
            earned = [[value for _, value in row] for row in best]
            total += torch.tensor(earned, dtype=torch.float64)
            inner.append((family, [[permutation for permutation, _ in row] for row in best]))
        chosen, _ = assign(total)
        step = {symmetry.name: chosen}
        for family, permutations in inner:
            for place, unit in enumerate(chosen.tolist()):
                step[family.members[place]] = permutations[place][unit]
        return step

    def _profit_outside(self, name: str, families: Sequence[Family]) -> Tensor:
        """Return what units earn at places, ``[n, n]``, apart from what lies in the families."""
        size = self.sizes[name]
        total = torch.zeros(size, size, dtype=torch.float64)
        covered: dict[tuple[str, int], list[Tensor]] = {}
        for family in families:
            for member in family.members:
                for term, place in self.axes[member]:
                    covered.setdefault((term, place.axis), []).append(place.positions.flatten())
        for term, place in self.axes[name]:
            positions = place.positions
            inside = covered.get((term, place.axis))
            if inside is not None:
                outside = ~torch.isin(positions[0], torch.cat(inside))
                positions = positions[:, outside]
            total += profit(self.lefts[term], self.rights[term], place.axis, positions)
        return total

    def _profit_inside(self, family: Family) -> Tensor:
        """Return what inner units earn, ``[place, inner place, outer unit, inner unit]``."""
        outer, inner = len(family.members), self.sizes[family.members[0]]
        total = torch.zeros(outer * inner, outer * inner, dtype=torch.float64)
        for axes in zip(*(self.axes[member] for member in family.members), strict=True):
            term, place = axes[0]
            positions = torch.cat([other.positions for _, other in axes])
            total += profit(self.lefts[term], self.rights[term], place.axis, positions)
        return total.reshape(outer, inner, outer, inner)

    def _gain(self, step: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """Return what a step earns, and the stacks after it."""
        touched = {name for key in step for name, _ in self.axes[key]}
        after = {name: self.terms[name].permuted(self.rights[name], step) for name in touched}
        gain = sum(
            float((self.lefts[name] * (stack - self.rights[name])).sum())
            for name, stack in after.items()
        )
        return gain, after

    def _compose(self, outer: str, step: Mapping[str, Tensor]) -> None:
        """Take a step into the permutations; what lies inside moved units moves with them."""
        before = dict(self.permutations)
        chosen = step[outer]
        self.permutations[outer] = before[outer][chosen]
        for family in self.families[outer]:
            for place, unit in enumerate(chosen.tolist()):
                member, permutation = family.members[place], before[family.members[unit]]
                self.permutations[member] = permutation[step.get(member, slice(None))]
