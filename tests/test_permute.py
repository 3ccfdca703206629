from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lit_merge.alignment.permute import permute, permute_statistics
from lit_merge.alignment.symmetries import find_symmetries
from lit_merge.alignment.symmetry import PermutedAxis, PermutedSite, Symmetry
from lit_merge.correction.sites import find_sites
from lit_merge.correction.statistics import ChannelStatistics, gather_statistics
from lit_merge.errors import InputError
from tests.tiny_models import images, tiny_bert, tiny_conv_net


def channels(count: int) -> Tensor:
    return torch.arange(count)[:, None]


def test_new_units_are_the_old_ones_that_the_permutation_names() -> None:
    heads = Symmetry("heads", 3, (PermutedAxis("w", 1, torch.arange(6).view(3, 2)),))
    w, permutation = torch.randn(4, 7), torch.tensor([2, 0, 1])
    moved = permute({"w": w, "b": w}, [heads], {"heads": permutation})
    expected = w.clone()
    for unit in range(3):
        for part in range(2):
            expected[:, 2 * unit + part] = w[:, 2 * int(permutation[unit]) + part]
    torch.testing.assert_close(moved["w"], expected, rtol=0, atol=0)
    assert moved["b"] is w


def test_outer_units_move_before_those_at_a_place_inside() -> None:
    heads = Symmetry("heads", 2, (PermutedAxis("w", 0, torch.arange(6).view(2, 3)),))
    inner = Symmetry("inner", 3, (PermutedAxis("w", 0, channels(3)),), inside="heads")
    permutations = {"heads": torch.tensor([1, 0]), "inner": torch.tensor([2, 0, 1])}
    moved = permute({"w": torch.arange(6)}, [heads, inner], permutations)
    assert moved["w"].tolist() == [5, 3, 4, 0, 1, 2]


def test_both_axes_of_a_matrix_are_permuted() -> None:
    stream = Symmetry("s", 4, tuple(PermutedAxis("w", axis, channels(4)) for axis in (0, 1)))
    w, order = torch.randn(4, 4), torch.tensor([3, 1, 0, 2])
    moved = permute({"w": w}, [stream], {"s": order})["w"]
    assert moved.tolist() == [[float(w[i, j]) for j in order] for i in order]


def test_the_permuted_models_gradients_and_statistics_are_the_permuted_ones() -> None:
    model = tiny_conv_net().double()
    symmetries = find_symmetries(model, images(2, channels=1))
    permutations = {s.name: torch.randperm(s.size) for s in symmetries}
    permuted = copy.deepcopy(model)
    permuted.load_state_dict(permute(model.state_dict(), symmetries, permutations))
    batch = images(5, seed=3, channels=1).double()

    def squared_gradients(net: nn.Module) -> dict[str, Tensor]:
        net(batch).square().sum().backward()
        return {n: p.grad.square() for n, p in net.named_parameters() if p.grad is not None}

    expected = permute_without_buffers(squared_gradients(model), symmetries, permutations)
    found = squared_gradients(permuted)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)

    sites = find_sites(model, where="norm")
    before = gather_statistics(model, [batch], sites)
    after = gather_statistics(permuted, [batch], sites)
    moved = permute_statistics(before, symmetries, permutations)
    assert any(not torch.equal(moved[n].mean, before[n].mean) for n in before)
    for name in after:
        torch.testing.assert_close(moved[name].mean, after[name].mean)
        torch.testing.assert_close(moved[name].m2, after[name].m2)
        assert moved[name].count == after[name].count


def permute_without_buffers(
    tensors: dict[str, Tensor], symmetries: tuple[Symmetry, ...], by: dict[str, Tensor]
) -> dict[str, Tensor]:
    kept = [
        Symmetry(s.name, s.size, tuple(a for a in s.axes if a.name in tensors)) for s in symmetries
    ]
    return permute(tensors, kept, by)


def test_the_inverse_permutation_returns_the_model() -> None:
    model = tiny_bert()
    symmetries = find_symmetries(model, {"input_ids": torch.randint(1, 50, (2, 6))})
    there = {s.name: torch.randperm(s.size) for s in symmetries}
    back = {name: permutation.argsort() for name, permutation in there.items()}
    moved = permute(model.state_dict(), symmetries, there)
    assert any(not torch.equal(moved[n], t) for n, t in model.state_dict().items())
    inner = [s for s in symmetries if s.inside]
    outer = [s for s in symmetries if not s.inside]
    moved = permute(moved, inner, {s.name: back[s.name] for s in inner})
    moved = permute(moved, outer, {s.name: back[s.name] for s in outer})
    for name, tensor in model.state_dict().items():
        assert torch.equal(moved[name], tensor), name


UNITS = Symmetry(
    "units", 3, (PermutedAxis("w", 0, channels(3)),), (PermutedSite("fc", -1, channels(3)),)
)
SWAP = {"units": torch.tensor([0, 2, 1])}


@pytest.mark.parametrize(
    ("tensors", "permutations", "match"),
    [
        ({"v": torch.ones(3)}, SWAP, "tensors: must hold 'w'"),
        ({"w": torch.ones(2)}, SWAP, "must have the places of the symmetry 'units' on axis 0"),
        ({"w": torch.tensor(1.0)}, SWAP, r"got shape \(\)"),
        ({"w": torch.ones(3)}, {"unit": torch.arange(3)}, "must be of the symmetries given"),
        ({"w": torch.ones(3)}, {"units": torch.tensor([0, 0, 2])}, "each of 0 to 2 once"),
        ({"w": torch.ones(3)}, {"units": torch.arange(4)}, "each of 0 to 2 once"),
        ({"w": torch.ones(3)}, {"units": torch.arange(3.0)}, "must be an int64 vector"),
    ],
)
def test_what_does_not_fit_is_an_error(
    tensors: dict[str, Tensor], permutations: dict[str, Tensor], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        permute(tensors, [UNITS], permutations)


def test_statistics_of_another_width_are_an_error() -> None:
    with pytest.raises(InputError, match="site 'fc': must have the channels of the symmetry"):
        permute_statistics({"fc": ChannelStatistics.empty(2)}, [UNITS], SWAP)
