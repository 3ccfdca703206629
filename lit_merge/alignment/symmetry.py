"""A permutation symmetry: units of a network that can change places without changing what it does.

A permutation is an int64 vector ``[size]``: the new unit u is the old unit ``permutation[u]``. It
acts on every axis of a symmetry at once, on weights, buffers, and what has their shape (a diagonal
Hessian), and, at the sites, on the channels of activations.

Symmetries nest: the inner dimensions of attention heads can be permuted in each head for itself,
and the heads as wholes. Permutations act in the order of the symmetries, the outer before the
inner; an inner symmetry belongs to the place of a head, not to the head that stood there first.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PermutedAxis:
    """One axis of a parameter or buffer on which the units lie.

    Attributes:
        name: Of the parameter or buffer, as in the state dict.
        axis: Which of its axes, from 0.
        positions: The positions on this axis that belong to each unit, int64 ``[units, k]``; k = 1
            for a plain channel, h·w for a conv channel after a flatten, the head's size for a head.
    """

    name: str
    axis: int
    positions: Tensor


@dataclass(frozen=True, eq=False)
class PermutedSite:
    """A module whose output's channels are permuted.

    Attributes:
        name: Qualified name of the module.
        channel_dim: Axis of its output that holds the channels, counted from the end (−1, −3).
        positions: The channels of each unit, int64 ``[units, k]``.
    """

    name: str
    channel_dim: int
    positions: Tensor


@dataclass(frozen=True, eq=False)
class Symmetry:
    """Units that may be permuted.

    Attributes:
        name: The parameter that has them first, with the axis and, for an inner symmetry, the
            place of the outer unit: ``blocks.0.mlp.fc1.weight[0]``.
        size: Number of units.
        axes: All the axes on which they lie.
        sites: The modules in whose outputs they are channels.
        inside: Name of the symmetry in whose units these lie (the heads), or None.
    """

    name: str
    size: int
    axes: tuple[PermutedAxis, ...]
    sites: tuple[PermutedSite, ...] = ()
    inside: str | None = None
