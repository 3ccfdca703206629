r"""Matching by weights: how near two models' parameters lie.

.. math:: \max_P \langle θ_A, P(θ_B) \rangle \;=\; \min_P \tfrac12 \|θ_A - P(θ_B)\|^2 + \text{const}

or, weighted by the curvature of both,

.. math:: \min_P \tfrac12 \sum (h_A + P(h_B)) \, (θ_A - P(θ_B))^2 ,

in which what neither model is sure of does not count.

References:
    Ainsworth, Hayase, Srinivasa (2022), arXiv:2209.04836, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_merge.alignment.symmetry import Symmetry
from lit_merge.alignment.terms import Term, TermAxis, scaled
from lit_merge.errors import InputError

_NOT_WEIGHTS = ("running_mean", "running_var", "num_batches_tracked")


def weight_terms(
    symmetries: Sequence[Symmetry],
    left: Mapping[str, Tensor],
    right: Mapping[str, Tensor],
    *,
    hessians: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
    normalised: bool = False,
    left_out: Sequence[str] = (),
) -> dict[str, Term]:
    """Return the terms of matching by weights.

    Running statistics of BatchNorm say what the weights before them do to the data, in numbers of
    another size than weights; they are permuted, but not compared.

    Args:
        symmetries: What may be permuted.
        left: The model that stays.
        right: The model that is permuted.
        hessians: Diagonal Hessians of both, for parameters that have one in both; others are left
            out. None counts every parameter alike.
        normalised: Whether each tensor counts by its cosine times the number of its units, as a
            site of activations does, and not by its size.
        left_out: Tensors that are not compared, such as heads of other tasks.

    Raises:
        InputError: A tensor that is permuted is missing, or its shapes differ.
    """
    places: dict[str, list[TermAxis]] = {}
    for symmetry in symmetries:
        for axis in symmetry.axes:
            place = TermAxis(symmetry.name, axis.axis, axis.positions)
            places.setdefault(axis.name, []).append(place)
    terms: dict[str, Term] = {}
    for name, axes in places.items():
        if name in left_out or name.rpartition(".")[2] in _NOT_WEIGHTS:
            continue
        one, other = _tensor(left, name, "left"), _tensor(right, name, "right")
        if one.shape != other.shape:
            raise InputError(
                f"{name}: must have one shape in models that are aligned; got {list(one.shape)} "
                f"and {list(other.shape)}. Align models of one architecture."
            )
        if not one.is_floating_point():
            continue
        if hessians is None:
            stacks = one[None], other[None]
        elif name in hessians[0] and name in hessians[1]:
            curvature = _tensor(hessians[0], name, "left"), _tensor(hessians[1], name, "right")
            stacks = _weighted(one, other, *curvature)
        else:
            continue
        size = float(stacks[0].norm() * stacks[1].norm())
        term = {name: Term(*stacks, tuple(axes), size)}
        if normalised and size:
            term = scaled(term, max(len(axis.positions) for axis in axes) / size)
        terms |= term
    return terms


def _weighted(
    left: Tensor, right: Tensor, left_hessian: Tensor, right_hessian: Tensor
) -> tuple[Tensor, Tensor]:
    """Return X and Y of −½ Σ (h_A + P(h_B)) (θ_A − P(θ_B))², without what P does not change."""
    h, g = left_hessian, right_hessian
    stay = torch.stack([h * left, -0.5 * h, left, -0.5 * left.square()])
    move = torch.stack([right, right.square(), g * right, g])
    return stay, move


def _tensor(tensors: Mapping[str, Tensor], name: str, model: str) -> Tensor:
    if name not in tensors:
        raise InputError(
            f"{name}: must be in every model that is aligned; got none in the {model} one. "
            "Align models of one architecture."
        )
    value = tensors[name].detach()
    return value.to("cpu", torch.float64) if value.is_floating_point() else value
