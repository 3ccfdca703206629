from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from lit_merge.alignment.matching import match
from lit_merge.alignment.nesting import unmatched
from lit_merge.alignment.permute import permute
from lit_merge.alignment.symmetries import find_symmetries
from lit_merge.alignment.symmetry import PermutedAxis, Symmetry
from lit_merge.alignment.weight_matching import weight_terms
from tests.hand_symmetries import (
    inner_product,
    mlp,
    mlp_symmetries,
    moved,
    plain,
    random_permutations,
    transformer,
    transformer_symmetries,
)
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_conv_net, tiny_vit

WIDTHS = (5, 9, 8, 3)


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_permutation_is_recovered(seed: int) -> None:
    left, symmetries = mlp(WIDTHS, seed), mlp_symmetries(WIDTHS)
    right = moved(left, symmetries, random_permutations(symmetries, seed))
    found = match(symmetries, weight_terms(symmetries, left, right), seed=seed)
    out = moved(right, symmetries, found.permutations)
    assert all(torch.equal(out[name], left[name]) for name in left)
    gain = inner_product(left, left) - inner_product(left, right)
    assert found.after - found.before == pytest.approx(gain, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_planted_permutations_of_heads_and_inside_of_heads_are_recovered(seed: int) -> None:
    left, symmetries = transformer(seed), transformer_symmetries()
    right = moved(left, symmetries, random_permutations(symmetries, seed))
    noise = transformer(seed + 100)
    noisy = {name: value + 0.1 * noise[name] for name, value in right.items()}
    found = match(symmetries, weight_terms(symmetries, left, noisy), seed=seed)
    out = moved(right, symmetries, found.permutations)
    assert all(torch.equal(out[name], left[name]) for name in left)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (tiny_conv_net(), images(3, channels=1)),
        (tiny_vit(), images(2)),
        (tiny_bert(), padded_texts((5, 9, 4))),
    ],
    ids=["conv net", "vit", "bert"],
)
def test_planted_permutations_of_found_symmetries_are_recovered(
    model: nn.Module, inputs: Any
) -> None:
    symmetries = find_symmetries(model, inputs)
    assert unmatched(symmetries) == frozenset()
    left = model.state_dict()
    right = permute(left, symmetries, random_permutations(symmetries, 1))
    found = match(symmetries, weight_terms(symmetries, left, right))
    out = permute(right, symmetries, found.permutations)
    assert all(torch.equal(out[name], left[name]) for name in left)
    assert any(not torch.equal(right[name], left[name]) for name in left)


def test_heads_match_only_after_their_inner_dimensions() -> None:
    """The dimensions of each head are reversed: as they stand, a head fits its double badly."""
    left, symmetries = transformer(0, depth=1), transformer_symmetries(depth=1)
    inner = {s.name: torch.arange(s.size).flip(0) for s in symmetries if s.inside}
    planted = inner | {"0.qkv": torch.tensor([2, 0, 1])}
    right = moved(left, symmetries, planted)
    found = match(symmetries, weight_terms(symmetries, left, right), max_sweeps=1)
    assert found.permutations["0.qkv"].tolist() == [1, 2, 0]
    out = moved(right, symmetries, found.permutations)
    assert all(torch.equal(out[name], left[name]) for name in left)


@pytest.mark.parametrize("seed", range(3))
def test_every_step_rises_and_is_what_the_permuted_weights_say(seed: int) -> None:
    left, right, symmetries = transformer(seed), transformer(seed + 9), transformer_symmetries()
    terms = weight_terms(symmetries, left, right)
    found = match(symmetries, terms, seed=seed)
    values = (found.before, *found.history)
    assert len(values) > 3
    assert all(b > a for a, b in itertools.pairwise(values))
    assert found.before == pytest.approx(inner_product(left, right), rel=1e-4)
    out = moved(right, symmetries, found.permutations)
    assert found.after == pytest.approx(inner_product(left, out), rel=1e-5)


def test_equal_models_stay_as_they_are() -> None:
    left, symmetries = transformer(0), transformer_symmetries()
    found = match(symmetries, weight_terms(symmetries, left, left))
    for symmetry in symmetries:
        assert torch.equal(found.permutations[symmetry.name], torch.arange(symmetry.size))
    assert found.history == ()
    assert found.sweeps == 1


def test_one_symmetry_gets_the_best_of_all_permutations() -> None:
    widths = (3, 5, 2)
    left, right, symmetries = mlp(widths, 0), mlp(widths, 1), mlp_symmetries(widths)
    found = match(symmetries, weight_terms(symmetries, left, right))
    best = max(
        inner_product(left, moved(right, symmetries, {"hidden0": torch.tensor(order)}))
        for order in itertools.permutations(range(5))
    )
    gain = best - inner_product(left, right)
    assert found.after - found.before == pytest.approx(gain, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_a_tensor_with_a_symmetry_on_both_axes_never_makes_it_worse(seed: int) -> None:
    symmetry = Symmetry("s", 6, (PermutedAxis("w", 0, plain(6)), PermutedAxis("w", 1, plain(6))))
    generator = torch.Generator().manual_seed(seed)
    left, right = ({"w": torch.randn(6, 6, generator=generator)} for _ in range(2))
    found = match((symmetry,), weight_terms((symmetry,), left, right))
    assert found.after >= found.before
    out = moved(right, (symmetry,), found.permutations)
    assert found.after == pytest.approx(inner_product(left, out), rel=1e-5)


def test_a_matching_goes_on_from_permutations_that_are_given() -> None:
    left, symmetries = transformer(0), transformer_symmetries()
    planted = random_permutations(symmetries, 0)
    right = moved(left, symmetries, planted)
    terms = weight_terms(symmetries, left, right)
    first = match(symmetries, terms)
    again = match(symmetries, terms, initial=first.permutations)
    assert again.history == (pytest.approx(first.after),)
    for name, permutation in first.permutations.items():
        assert torch.equal(again.permutations[name], permutation)


def test_nothing_that_is_given_is_changed() -> None:
    left, right, symmetries = mlp(WIDTHS, 0), mlp(WIDTHS, 1), mlp_symmetries(WIDTHS)
    initial = random_permutations(symmetries, 3)
    copies = [{n: v.clone() for n, v in given.items()} for given in (left, right, initial)]
    match(symmetries, weight_terms(symmetries, left, right), initial=initial)
    for given, copy in zip((left, right, initial), copies, strict=True):
        assert all(torch.equal(given[name], copy[name]) for name in copy)
