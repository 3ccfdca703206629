from __future__ import annotations

import pytest
import torch

from lit_merge import InputError
from lit_merge.alignment.matching import match
from lit_merge.alignment.symmetry import PermutedAxis, Symmetry
from lit_merge.alignment.terms import objective, similarity
from lit_merge.alignment.weight_matching import weight_terms
from tests.hand_symmetries import (
    inner_product,
    mlp,
    mlp_symmetries,
    moved,
    plain,
    random_permutations,
)

WIDTHS = (5, 9, 8, 3)
SYMMETRIES = mlp_symmetries(WIDTHS)
COMPARED = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight")


def test_the_sum_is_the_inner_product_of_what_is_permuted() -> None:
    left, right = mlp(WIDTHS, 0), mlp(WIDTHS, 1)
    terms = weight_terms(SYMMETRIES, left, right)
    assert set(terms) == set(COMPARED)
    permutations = random_permutations(SYMMETRIES, 2)
    out = moved(right, SYMMETRIES, permutations)
    expected = inner_product({n: left[n] for n in COMPARED}, out)
    assert objective(terms, permutations) == pytest.approx(expected, rel=1e-5)


def test_weighted_by_curvature_it_is_the_distance_up_to_a_constant() -> None:
    left, right = mlp(WIDTHS, 0), mlp(WIDTHS, 1)
    hessians = tuple({n: v.square() for n, v in mlp(WIDTHS, seed).items()} for seed in (2, 3))
    terms = weight_terms(SYMMETRIES, left, right, hessians=(hessians[0], hessians[1]))

    def minus_half_distance(seed: int) -> float:
        permutations = random_permutations(SYMMETRIES, seed)
        out, curvature = (moved(t, SYMMETRIES, permutations) for t in (right, hessians[1]))
        return sum(
            float((-0.5 * (hessians[0][n] + curvature[n]) * (left[n] - out[n]).square()).sum())
            for n in COMPARED
        )

    offsets = [
        objective(terms, random_permutations(SYMMETRIES, seed)) - minus_half_distance(seed)
        for seed in range(4)
    ]
    assert offsets == pytest.approx([offsets[0]] * 4, rel=1e-4)


def test_curvature_decides_between_units_that_weights_confuse() -> None:
    """Noise on weights that matter to neither model misleads plain matching, not weighted."""
    symmetries = mlp_symmetries((6, 12, 3))
    left = mlp((6, 12, 3), 0)
    planted = random_permutations(symmetries, 1)
    noise = mlp((6, 12, 3), 2)
    unsure = {name: torch.zeros_like(value) for name, value in left.items()}
    unsure["0.weight"][:, 2:] = 1.0
    hessian = {name: 1.0 - 0.999 * value for name, value in unsure.items()}
    right = {name: left[name] + 6.0 * unsure[name] * noise[name] for name in left}
    right = moved(right, symmetries, planted)
    curvature = (hessian, moved(hessian, symmetries, planted))
    back = torch.argsort(planted["hidden0"])
    weighted = match(symmetries, weight_terms(symmetries, left, right, hessians=curvature))
    assert torch.equal(weighted.permutations["hidden0"], back)
    unweighted = match(symmetries, weight_terms(symmetries, left, right))
    assert not torch.equal(unweighted.permutations["hidden0"], back)


def test_normalised_a_tensor_earns_its_cosine_times_its_units() -> None:
    left, right = mlp(WIDTHS, 0), mlp(WIDTHS, 1)
    terms = weight_terms(SYMMETRIES, left, right, normalised=True)
    cosine = torch.cosine_similarity(left["2.weight"].flatten(), right["2.weight"].flatten(), dim=0)
    assert terms["2.weight"].product({}) == pytest.approx(9 * float(cosine), rel=1e-4)
    assert similarity({"w": terms["2.weight"]}, {}, "hidden0") == pytest.approx(
        float(cosine), rel=1e-4
    )


def test_running_statistics_and_heads_are_not_compared() -> None:
    axes = [PermutedAxis(name, 0, plain(4)) for name in ("bn.weight", "bn.running_var", "head")]
    symmetry = Symmetry("s", 4, tuple(axes))
    tensors = {"bn.weight": torch.ones(4), "bn.running_var": torch.ones(4)}
    assert set(weight_terms((symmetry,), tensors, tensors, left_out=("head",))) == {"bn.weight"}


def test_a_missing_tensor_is_named() -> None:
    left, right = mlp(WIDTHS, 0), mlp(WIDTHS, 1)
    del right["2.bias"]
    with pytest.raises(InputError, match=r"2\.bias: must be in every model .* right one"):
        weight_terms(SYMMETRIES, left, right)


def test_another_shape_is_named() -> None:
    left, right = mlp(WIDTHS, 0), mlp((5, 9, 7, 3), 1)
    with pytest.raises(InputError, match=r"2\.weight: must have one shape .*\[8, 9\] and \[7, 9\]"):
        weight_terms(SYMMETRIES, left, right)
