from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lit_merge import InputError
from lit_merge.alignment.activation_matching import (
    CrossMoments,
    activation_terms,
    gather_cross_moments,
)
from lit_merge.alignment.matching import match
from lit_merge.alignment.symmetry import PermutedSite, Symmetry
from tests.hand_symmetries import mlp_symmetries, moved, plain, random_permutations


def rows(seed: int, count: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, generator=generator) * 3 + 100


def site(name: str, channels: int, dim: int = -1) -> tuple[Symmetry, ...]:
    where = PermutedSite(name, dim, plain(channels))
    return (Symmetry("s", channels, (), (where,)),)


def test_batches_add_up_to_the_correlation_of_all_rows() -> None:
    left, mixing = rows(0, 50, 4), torch.randn(4, 4)
    right = left @ mixing + rows(1, 50, 4)
    moments = CrossMoments(4, 4)
    for a, b in zip(left.split(7), right.split(7), strict=True):
        moments.update(a, b)
    expected = np.corrcoef(left.double().T, right.double().T)
    assert moments.count == 50
    np.testing.assert_allclose(moments.correlation(), expected[:4, 4:], atol=1e-9)
    covariance = np.cov(left.double().T, right.double().T, bias=True)[:4, 4:]
    np.testing.assert_allclose(moments.covariance(), covariance, atol=1e-9)


def test_a_batch_larger_than_a_block_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = rows(0, 50, 4), rows(1, 50, 4)
    whole, parts = CrossMoments(4, 4), CrossMoments(4, 4)
    whole.update(left, right)
    monkeypatch.setattr("lit_merge.alignment.activation_matching._BLOCK", 12)
    parts.update(left, right)
    torch.testing.assert_close(parts.correlation(), whole.correlation())


def test_a_channel_that_does_not_vary_correlates_with_nothing() -> None:
    left = rows(0, 20, 3)
    left[:, 1] = 5.0
    moments = CrossMoments(3, 3)
    moments.update(left, left)
    found = moments.correlation()
    assert found[1].tolist() == [0, 0, 0]
    assert found[:, 1].tolist() == [0, 0, 0]
    assert float(found[0, 0]) == pytest.approx(1.0)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 9), nn.ReLU(inplace=True), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)
    )


def permuted_net(model: nn.Sequential, permutations: dict[str, Tensor]) -> nn.Sequential:
    other = net(1)
    other.load_state_dict(moved(model.state_dict(), mlp_symmetries((5, 9, 8, 3)), permutations))
    return other


def test_a_planted_permutation_is_recovered_from_activations() -> None:
    symmetries = mlp_symmetries((5, 9, 8, 3))
    planted = random_permutations(symmetries, 3)
    models = (net(), permuted_net(net(), planted))
    batches = torch.randn(60, 5).split(16)
    moments = gather_cross_moments(models, batches, symmetries)[0, 1]
    assert moments["0"].count == 60
    found = match(symmetries, activation_terms(symmetries, moments))
    for name, permutation in planted.items():
        assert torch.equal(found.permutations[name], torch.argsort(permutation))
    assert found.after == pytest.approx(9 + 8)


def test_an_activation_in_place_behind_a_site_does_not_change_what_was_measured() -> None:
    symmetries, inputs = mlp_symmetries((5, 9, 8, 3)), torch.randn(40, 5)
    moments = gather_cross_moments((net(), net(1)), [inputs], symmetries)[0, 1]["0"]
    with torch.no_grad():
        left, right = (model[0](inputs).double() for model in (net(), net(1)))
    expected = np.corrcoef(left.T, right.T)[:9, 9:]
    np.testing.assert_allclose(moments.correlation(), expected, atol=1e-6)


def test_sites_of_images_are_compared_pixel_by_pixel() -> None:
    left, right = nn.Sequential(nn.Conv2d(1, 4, 3)), nn.Sequential(nn.Conv2d(1, 4, 3))
    images = torch.randn(6, 1, 5, 5)
    moments = gather_cross_moments((left, right), images.split(4), site("0", 4, -3))[0, 1]["0"]
    assert moments.count == 6 * 9
    with torch.no_grad():
        a, b = (m(images).transpose(0, 1).reshape(4, -1).double() for m in (left, right))
    np.testing.assert_allclose(moments.correlation(), np.corrcoef(a, b)[:4, 4:], atol=1e-6)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, values: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(values)


def test_padded_tokens_do_not_count() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    values = torch.randn(2, 3, 3)
    wild = values + 1e3 * (1 - mask[..., None]) * torch.randn(2, 3, 3)
    models = (Tokens(), Tokens())
    found = [
        gather_cross_moments(models, [{"values": v, "attention_mask": mask}], site("inner", 4))
        for v in (values, wild)
    ]
    one, other = (moments[0, 1]["inner"] for moments in found)
    assert one.count == other.count == 3
    assert torch.equal(one.correlation(), other.correlation())


def test_pairs_of_several_models_are_compared_in_one_pass() -> None:
    symmetries, runs = site("0", 9), []

    def forward(model: nn.Module, batch: Any) -> None:
        runs.append(model)
        model(batch)

    models = tuple(net(seed) for seed in range(3))
    pairs = ((0, 1), (0, 2), (1, 2))
    batch = torch.randn(20, 5)
    found = gather_cross_moments(models, [batch], symmetries, pairs=pairs, forward=forward)
    assert len(runs) == 1 + 3  # one forward looks which sites give something of their own
    for m, n in pairs:
        alone = gather_cross_moments((models[m], models[n]), [batch], symmetries)[0, 1]["0"]
        assert torch.equal(found[m, n]["0"].correlation(), alone.correlation())


def test_a_module_that_hands_on_an_output_is_no_further_site() -> None:
    models = tuple(
        nn.Sequential(nn.Sequential(nn.Linear(5, 9), nn.Identity()), nn.ReLU(inplace=True))
        for _ in range(2)
    )
    where = tuple(PermutedSite(name, -1, plain(9)) for name in ("0", "0.0", "0.1", "1"))
    symmetries = (Symmetry("s", 9, (), where),)
    found = gather_cross_moments(models, [torch.randn(4, 5)], symmetries)[0, 1]
    assert set(found) == {"0.0", "1"}  # the activation in place has made something new


def test_models_are_left_as_they_were() -> None:
    models = (net().train(), net(1).train())
    gather_cross_moments(models, [torch.randn(4, 5)], site("0", 9))
    assert all(model.training for model in models)
    assert not any(module._forward_hooks for model in models for module in model.modules())


def test_covariance_gives_large_channels_more_to_say() -> None:
    left = rows(0, 30, 2) * torch.tensor([1.0, 10.0])
    moments = CrossMoments(2, 2)
    moments.update(left, left)
    terms = activation_terms(site("0", 2), {"0": moments}, covariance=True)
    (term,) = terms.values()
    assert float(term.left[0, 1, 1] / term.left[0, 0, 0]) > 50
    assert term.product({}) / term.scale == pytest.approx(1.0)


def test_symmetries_without_sites_are_refused() -> None:
    with pytest.raises(InputError, match=r"symmetries: must have sites .* got none"):
        gather_cross_moments((net(), net()), [torch.randn(4, 5)], (Symmetry("s", 9, ()),))


def test_no_batches_are_refused() -> None:
    with pytest.raises(InputError, match="batches: must run at least one of the 1 sites"):
        gather_cross_moments((net(), net()), [], site("0", 9))


def test_nan_is_named() -> None:
    broken = net()
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="site '0': activations must be finite"):
        gather_cross_moments((net(), broken), [torch.randn(4, 5)], site("0", 9))


def test_a_site_that_gives_no_tensor_is_named() -> None:
    class Pair(nn.Module):
        def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
            return values, values

    models = (nn.Sequential(Pair()), nn.Sequential(Pair()))
    with pytest.raises(InputError, match="site '0': its output must be a batch of tensors"):
        gather_cross_moments(models, [torch.randn(4, 5)], site("0", 5))
