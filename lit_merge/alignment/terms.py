r"""What a matching earns: a sum of inner products between one model and the other, permuted.

A term is a pair of stacks :math:`X, Y` of r tensors of one shape; the model that stays gives X, the
one that is permuted gives Y, and the matching maximises

.. math:: \sum_{\text{terms}} \langle X, P(Y) \rangle

over the permutations P of its units. Every way of matching here is such a sum: for weights X and Y
are the weights themselves, for activations X is their correlation matrix and Y the identity, whose
rows are permuted. So they are maximised by the same code, alone or added up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TermAxis:
    """Where the units of a symmetry lie in the tensors of a term.

    Attributes:
        symmetry: Name of the symmetry.
        axis: Axis of one tensor of the stack, from 0.
        positions: The positions on it of each unit, int64 ``[units, k]``.
    """

    symmetry: str
    axis: int
    positions: Tensor


@dataclass(frozen=True, eq=False)
class Term:
    """One inner product ⟨X, P(Y)⟩.

    Attributes:
        left: X of the model that stays, float64 ``[r, *shape]``.
        right: Y of the model that is permuted, float64 ``[r, *shape]``.
        axes: Where units lie, in the order in which the symmetries act.
        scale: What the product is divided by to become a similarity in [−1, 1].
    """

    left: Tensor
    right: Tensor
    axes: tuple[TermAxis, ...]
    scale: float

    def swapped(self) -> Term:
        """Return the term for moving the other model: ⟨P(X), Y⟩."""
        return replace(self, left=self.right, right=self.left)

    def product(self, permutations: Mapping[str, Tensor]) -> float:
        """Return ⟨X, P(Y)⟩ after permutations by symmetry."""
        return float((self.left * self.permuted(self.right, permutations)).sum())

    def permuted(self, stack: Tensor, permutations: Mapping[str, Tensor]) -> Tensor:
        """Return one of the two stacks after permutations by symmetry; others stay as they are."""
        for place in self.axes:
            if place.symmetry in permutations:
                stack = moved(stack, place, permutations[place.symmetry])
        return stack


def moved(stack: Tensor, place: TermAxis, permutation: Tensor) -> Tensor:
    """Return a stack ``[r, *shape]`` with its units permuted on one axis."""
    index = torch.arange(stack.shape[place.axis + 1])
    index[place.positions] = place.positions[permutation]
    return stack.index_select(place.axis + 1, index.to(stack.device))


def profit(
    left: Tensor, right: Tensor, axis: int, places: Tensor, units: Tensor | None = None
) -> Tensor:
    """Return what each unit of the right stack earns at each place of the left one.

    Args:
        left: X, ``[r, *shape]``.
        right: Y, ``[r, *shape]``.
        axis: The axis of the units.
        places: Positions of each place, int64 ``[n, k]``.
        units: Positions of each unit, int64 ``[m, k]``; None for those of the places.

    Returns:
        ``[n, m]``.
    """
    if not places.shape[1]:
        return left.new_zeros(len(places), len(places if units is None else units))
    rows = left.movedim(axis + 1, 0)[places].flatten(1)
    columns = right.movedim(axis + 1, 0)[places if units is None else units].flatten(1)
    return rows @ columns.mT


def joined(terms: Sequence[Mapping[str, Term]]) -> dict[str, Term]:
    """Return the sum of several matchings of the same model, its terms stacked by name."""
    names = dict.fromkeys(name for one in terms for name in one)
    found = {}
    for name in names:
        same = [one[name] for one in terms if name in one]
        left, right = (torch.cat([getattr(t, s) for t in same]) for s in ("left", "right"))
        found[name] = Term(left, right, same[0].axes, sum(t.scale for t in same))
    return found


def scaled(terms: Mapping[str, Term], factor: float) -> dict[str, Term]:
    """Return terms that count ``factor`` times as much."""
    return {
        name: replace(term, left=term.left * factor, scale=term.scale * factor)
        for name, term in terms.items()
    }


def objective(terms: Mapping[str, Term], permutations: Mapping[str, Tensor]) -> float:
    """Return the sum of all terms after permutations by symmetry."""
    return sum(term.product(permutations) for term in terms.values())


def similarity(
    terms: Mapping[str, Term], permutations: Mapping[str, Tensor], symmetry: str
) -> float | None:
    """Return how alike units of a symmetry are in their places, from −1 to 1.

    The mean over the terms that the symmetry acts on: cosines of weights, mean correlations of
    activations.

    Args:
        terms: What was compared.
        permutations: Of the right model, by symmetry.
        symmetry: Name of the symmetry.

    Returns:
        The mean; None where nothing of the symmetry was compared.
    """
    own = [t for t in terms.values() if any(place.symmetry == symmetry for place in t.axes)]
    values = [term.product(permutations) / term.scale for term in own if term.scale]
    return sum(values) / len(values) if values else None
