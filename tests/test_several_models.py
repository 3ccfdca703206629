from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_merge import InputError
from lit_merge.alignment.activation_matching import CrossMoments
from lit_merge.alignment.several_models import align_state_dicts, pairs_of
from tests.hand_symmetries import (
    inner_product,
    mlp,
    mlp_symmetries,
    moved,
    random_permutations,
    transformer,
    transformer_symmetries,
)

SYMMETRIES = transformer_symmetries(depth=1)


def noisy(seed: int, noise: float) -> dict[str, Tensor]:
    """Return one transformer, permuted and with noise."""
    out = moved(transformer(0, depth=1), SYMMETRIES, random_permutations(SYMMETRIES, seed))
    other = transformer(100 + seed, depth=1)
    return {name: value + noise * other[name] for name, value in out.items()}


@pytest.mark.parametrize("cycle_consistent", [False, True])
def test_planted_permutations_of_several_models_are_recovered(cycle_consistent: bool) -> None:
    models = {"a": transformer(0, depth=1)} | {f"m{seed}": noisy(seed, 0.0) for seed in (1, 2, 3)}
    found = align_state_dicts(models, SYMMETRIES, cycle_consistent=cycle_consistent)
    for name, model in models.items():
        out = moved(model, SYMMETRIES, found.permutations[name])
        assert all(torch.equal(out[key], models["a"][key]) for key in out)
    assert found.similarity["m1"]["stream"] == (pytest.approx(0, abs=0.4), pytest.approx(1.0))


def test_the_reference_stays() -> None:
    models = {"a": noisy(1, 0.3), "b": noisy(2, 0.3), "c": noisy(3, 0.3)}
    for cycle_consistent in (False, True):
        found = align_state_dicts(models, SYMMETRIES, cycle_consistent=cycle_consistent)
        for symmetry in SYMMETRIES:
            own = found.permutations["a"][symmetry.name]
            assert torch.equal(own, torch.arange(symmetry.size))
        assert "a" not in found.similarity


def test_a_cycle_brings_all_pairs_nearer_than_a_reference() -> None:
    models = {"a": noisy(1, 1.5), "b": noisy(2, 0.6), "c": noisy(3, 0.6), "d": noisy(4, 0.6)}

    def all_pairs(cycle_consistent: bool) -> float:
        found = align_state_dicts(models, SYMMETRIES, cycle_consistent=cycle_consistent)
        out = [moved(m, SYMMETRIES, found.permutations[name]) for name, m in models.items()]
        total = sum(inner_product(out[m], out[n]) for n in range(4) for m in range(n))
        if cycle_consistent:
            assert found.after == pytest.approx(total, rel=1e-4)
        return total

    assert all_pairs(True) > 1.02 * all_pairs(False)


def test_two_models_match_alike_in_a_cycle_and_to_a_reference() -> None:
    models = {"a": noisy(1, 0.5), "b": noisy(2, 0.5)}
    one, other = (
        align_state_dicts(models, SYMMETRIES, cycle_consistent=cycle) for cycle in (False, True)
    )
    assert one.after == other.after


def test_hessians_are_taken_by_model() -> None:
    models = {"a": transformer(0, depth=1), "b": noisy(1, 0.0)}
    hessians = {name: {n: 1 + 0.1 * v.square() for n, v in m.items()} for name, m in models.items()}
    found = align_state_dicts(models, SYMMETRIES, hessians=hessians)
    out = moved(models["b"], SYMMETRIES, found.permutations["b"])
    assert all(torch.equal(out[key], models["a"][key]) for key in out)
    with pytest.raises(InputError, match="hessians: must have one of every model; got none of 'b'"):
        align_state_dicts(models, SYMMETRIES, hessians={"a": hessians["a"]})


def moments(seed: int, permutations: dict[str, Tensor]) -> dict[str, CrossMoments]:
    """Return what two MLPs' hidden units would give that differ by a permutation and noise."""
    found = {}
    for place, (name, size) in enumerate((("0", 9), ("2", 8))):
        torch.manual_seed(seed + place)
        left = torch.randn(40, size)
        right = left[:, permutations[f"hidden{place}"]] + 0.1 * torch.randn(40, size)
        found[name] = CrossMoments(size, size)
        found[name].update(left, right)
    return found


@pytest.mark.parametrize("likeness", ["correlation", "covariance"])
@pytest.mark.parametrize("by", ["activations", "both"])
def test_activations_decide_where_weights_say_nothing(by: str, likeness: str) -> None:
    symmetries = mlp_symmetries((5, 9, 8, 3))
    planted = random_permutations(symmetries, 4)
    models = {"a": mlp((5, 9, 8, 3), 0), "b": mlp((5, 9, 8, 3), 1)}
    found = align_state_dicts(
        models,
        symmetries,
        by=by,  # type: ignore[arg-type]
        activations={(0, 1): moments(0, planted)},
        likeness=likeness,  # type: ignore[arg-type]
        activation_weight=10.0,
    )
    for name, permutation in planted.items():
        assert torch.equal(found.permutations["b"][name], torch.argsort(permutation))


def test_pairs() -> None:
    assert pairs_of(2, cycle_consistent=True) == ((0, 1),)
    assert len(pairs_of(5, cycle_consistent=True)) == 10


def test_bad_options_are_refused() -> None:
    model = {"a": transformer(0, depth=1), "b": transformer(1, depth=1)}
    with pytest.raises(
        InputError, match="by: must be one of weights, activations, both, none; got 'x'"
    ):
        align_state_dicts(model, SYMMETRIES, by="x")  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match="likeness: must be one of correlation, covariance; got 'x'"
    ):
        align_state_dicts(model, SYMMETRIES, likeness="x")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="models: must hold at least one model"):
        align_state_dicts({}, SYMMETRIES)
    with pytest.raises(InputError, match="activations: must have what was gathered of 'a' and 'b'"):
        align_state_dicts(model, SYMMETRIES, by="both")
