r"""Aligning any number of models, by weights, by activations or by both.

Every model gets permutations into the order of the reference, whose own stays. To a reference, each
model is matched with it alone. Cycle-consistently, each is matched with all others as they are
aligned so far, in turn, until no model gains: this climbs

.. math:: \sum_{m < n} \langle P_m θ_m, P_n θ_n \rangle

and, as every permutation leads to one common order, going round a cycle of models by
:math:`P_{mn} = P_m^{-1} P_n` is the identity.

References:
    Ainsworth, Hayase, Srinivasa (2022), arXiv:2209.04836, appendix A.10 (MergeMany);
    Crisostomi et al. (2024), arXiv:2405.17897, which climbs the same sum by Frank-Wolfe steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_merge.alignment.activation_matching import CrossMoments, activation_terms
from lit_merge.alignment.matching import match
from lit_merge.alignment.symmetry import Symmetry
from lit_merge.alignment.terms import Term, joined, objective, scaled, similarity
from lit_merge.alignment.weight_matching import weight_terms
from lit_merge.errors import InputError

By = Literal["weights", "activations", "both", "none"]
Likeness = Literal["correlation", "covariance"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Alignment:
    """Permutations of several models into one order.

    Attributes:
        permutations: By model and symmetry, int64 ``[size]``; the reference's are the identity.
        by: What was compared; "none" if nothing was, and nothing is permuted.
        before: What was maximised, summed over the pairs of models, with nothing permuted.
        after: The same at the end.
        similarity: By model and symmetry, how alike its units are to the reference's in their
            places, before and after, from −1 to 1; see
            :func:`~lit_merge.alignment.terms.similarity`. None where nothing was compared.
    """

    permutations: Mapping[str, Mapping[str, Tensor]]
    by: By
    before: float
    after: float
    similarity: Mapping[str, Mapping[str, tuple[float, float] | None]]

    @classmethod
    def of_nothing(cls, models: Sequence[str]) -> Alignment:
        """Return the alignment that leaves every model as it is."""
        empty: dict[str, dict[str, tuple[float, float] | None]] = {name: {} for name in models[1:]}
        return cls({name: {} for name in models}, "none", 0.0, 0.0, empty)


def pairs_of(count: int, *, cycle_consistent: bool) -> tuple[Pair, ...]:
    """Return the pairs of models that are compared; the first model is the reference.

    >>> pairs_of(3, cycle_consistent=False), pairs_of(3, cycle_consistent=True)
    (((0, 1), (0, 2)), ((0, 1), (0, 2), (1, 2)))
    """
    left = range(count) if cycle_consistent else (0,)
    return tuple((m, n) for m in left for n in range(m + 1, count))


def align_state_dicts(
    models: Mapping[str, Mapping[str, Tensor]],
    symmetries: Sequence[Symmetry],
    *,
    by: By = "weights",
    activations: Mapping[Pair, Mapping[str, CrossMoments]] | None = None,
    likeness: Likeness = "covariance",
    activation_weight: float = 10.0,
    hessians: Mapping[str, Mapping[str, Tensor]] | None = None,
    cycle_consistent: bool = False,
    left_out: Sequence[str] = (),
    max_sweeps: int = 100,
    seed: int = 0,
) -> Alignment:
    """Return permutations that bring models of one architecture into the order of the first.

    Args:
        models: Tensors by name, by model; the first is the reference.
        symmetries: What may be permuted, in every model.
        by: What is compared: "weights", "activations", or "both", where a tensor counts by its
            cosine, as a site does by its correlations; "none" leaves every model as it is.
        activations: For "activations" and "both": of each pair that is compared, the models by
            index; see :func:`~lit_merge.alignment.activation_matching.gather_cross_moments`.
        likeness: What two activations are compared by: "covariance", in which large ones count for
            more, or "correlation", whatever their sizes.
        activation_weight: For "both": how often the activations count.
        hessians: Diagonal Hessians by model and parameter, to weight the comparison of weights.
        cycle_consistent: Whether every model is matched with all others, not with the first alone.
        left_out: Tensors that are not compared, such as heads.
        max_sweeps: How often at most each matching visits all symmetries.
        seed: Of the order of the visits.

    Raises:
        InputError: An option is none that there is, models or activations are missing, or tensors
            do not fit each other.
    """
    for option, value, known in (("by", by, By), ("likeness", likeness, Likeness)):
        if value not in get_args(known):
            raise InputError(
                f"{option}: must be one of {', '.join(get_args(known))}; got {value!r}. Choose one "
                "of these."
            )
    if not models:
        raise InputError("models: must hold at least one model; got none. Name the reference.")
    names = tuple(models)
    if by == "none":
        return Alignment.of_nothing(names)
    terms = {}
    for m, n in pairs_of(len(names), cycle_consistent=cycle_consistent):
        one: dict[str, Term] = {}
        if by != "activations":
            curvature = None
            if hessians is not None:
                curvature = _hessian(hessians, names[m]), _hessian(hessians, names[n])
            one |= weight_terms(
                symmetries,
                models[names[m]],
                models[names[n]],
                hessians=curvature,
                normalised=by == "both",
                left_out=left_out,
            )
        if by != "weights":
            if activations is None or (m, n) not in activations:
                raise InputError(
                    f"activations: must have what was gathered of {names[m]!r} and {names[n]!r}; "
                    f'got none. Gather it, or match by weights: by="weights".'
                )
            found = activation_terms(
                symmetries, activations[m, n], covariance=likeness == "covariance"
            )
            one |= scaled(found, activation_weight if by == "both" else 1.0)
        terms[m, n] = one
    permutations = match_several(
        symmetries,
        terms,
        len(names),
        cycle_consistent=cycle_consistent,
        max_sweeps=max_sweeps,
        seed=seed,
    )
    alike: dict[str, dict[str, tuple[float, float] | None]] = {}
    for model in range(1, len(names)):
        alike[names[model]] = {
            s.name: _before_and_after(terms[0, model], permutations[model], s.name)
            for s in symmetries
        }
    identity = [{s.name: torch.arange(s.size) for s in symmetries} for _ in names]
    return Alignment(
        permutations=dict(zip(names, permutations, strict=True)),
        by=by,
        before=sum_of_pairs(terms, identity),
        after=sum_of_pairs(terms, permutations),
        similarity=alike,
    )


def match_several(
    symmetries: Sequence[Symmetry],
    terms: Mapping[Pair, Mapping[str, Term]],
    count: int,
    *,
    cycle_consistent: bool = False,
    max_sweeps: int = 100,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Return the permutations of each model by symmetry.

    Args:
        symmetries: What may be permuted.
        terms: Of each pair (m, n), m < n, that is compared; the reference is model 0.
        count: Number of models.
        cycle_consistent: Whether each is matched with all others.
        max_sweeps: How often at most each matching visits all symmetries, and in a cycle all
            models are matched again.
        seed: Of the order of the visits.
    """
    found = [{s.name: torch.arange(s.size) for s in symmetries}]
    for model in range(1, count):
        one = match(symmetries, terms[0, model], max_sweeps=max_sweeps, seed=seed)
        found.append(dict(one.permutations))
    for _ in range(max_sweeps if cycle_consistent and count > 2 else 0):
        gained = False
        for model in range(1, count):
            others = [
                _fixed(terms[min(model, n), max(model, n)], found[n], first=n < model)
                for n in range(count)
                if n != model
            ]
            one = match(
                symmetries, joined(others), initial=found[model], max_sweeps=max_sweeps, seed=seed
            )
            gained = gained or len(one.history) > 1
            found[model] = dict(one.permutations)
        if not gained:
            break
    return found


def sum_of_pairs(
    terms: Mapping[Pair, Mapping[str, Term]], permutations: Sequence[Mapping[str, Tensor]]
) -> float:
    """Return what all pairs earn together after each model's permutations."""
    return sum(
        objective(_fixed(one, permutations[m], first=True), permutations[n])
        for (m, n), one in terms.items()
    )


def _fixed(
    terms: Mapping[str, Term], permutations: Mapping[str, Tensor], *, first: bool
) -> dict[str, Term]:
    """Return the terms of a pair for moving one model while the other stays as it is permuted.

    Args:
        terms: Of the pair.
        permutations: Of the model that stays.
        first: Whether that is the first of the pair.
    """
    found = {}
    for name, term in terms.items():
        one = term if first else term.swapped()
        found[name] = replace(one, left=one.permuted(one.left, permutations))
    return found


def _before_and_after(
    terms: Mapping[str, Term], permutations: Mapping[str, Tensor], symmetry: str
) -> tuple[float, float] | None:
    before, after = similarity(terms, {}, symmetry), similarity(terms, permutations, symmetry)
    return None if before is None or after is None else (before, after)


def _hessian(hessians: Mapping[str, Mapping[str, Tensor]], model: str) -> Mapping[str, Tensor]:
    if model not in hessians:
        raise InputError(
            f"hessians: must have one of every model; got none of {model!r}. Gather it, or leave "
            "them all out."
        )
    return hessians[model]
