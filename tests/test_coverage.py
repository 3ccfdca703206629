"""Which parameters are wanted, and what is known of them beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_merge.curvature.coverage import (
    Coverage,
    owners_of,
    supported_coverage,
    wanted_parameters,
)
from lit_merge.errors import InputError


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.PReLU())


def first_coverage(net: nn.Module) -> Coverage:
    return supported_coverage(owners_of(net, wanted_parameters(net, None)))


def test_all_trainable_parameters_are_wanted_once() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    net[0].bias.requires_grad_(False)
    assert list(wanted_parameters(net, None)) == ["0.weight", "1.bias"]


def test_a_shared_parameter_has_several_owners() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    owners = owners_of(net, wanted_parameters(net, ["0.weight"]))
    assert owners == {"0.weight": ((net[0], "weight"), (net[1], "weight"))}


def test_every_parameter_is_computed_one_way() -> None:
    net = model()
    coverage = first_coverage(net)
    linear_and_norm = {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert coverage.at_once == linear_and_norm
    assert set(coverage.one_by_one) == {"2.weight"}
    moved = coverage.moved({"0.bias": "a reason"})
    assert moved.at_once == linear_and_norm - {"0.bias"}
    assert moved.one_by_one["0.bias"] == "a reason"
    copied = moved.with_copies(["2.weight"], 1)
    assert (copied.layouts, set(copied.one_by_one)) == ({"2.weight": 1}, {"0.bias"})
    resting = copied.resting({"1.weight", "2.weight"})
    assert resting.unused == {"1.weight", "2.weight"}
    assert resting.at_once == {"0.weight", "1.bias"}
    site = next(site for site in coverage.sites if site.bias == "0.bias")
    assert resting.with_site(site).at_once == {"0.weight", "0.bias", "1.bias"}
    assert not resting.with_site(site).one_by_one


def test_other_parameters_of_a_supported_module_are_not_taken_for_its_weight() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].register_parameter("scale", nn.Parameter(torch.ones(2)))
    assert set(first_coverage(net).one_by_one) == {"0.scale"}


def test_an_embedding_tied_to_a_head_is_computed_at_once() -> None:
    net = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 5, bias=False))
    net[1].weight = net[0].weight
    assert first_coverage(net).at_once == {"0.weight"}


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(InputError, match="Linear: must have trainable parameters; got none"):
        wanted_parameters(nn.Linear(2, 2).requires_grad_(False), None)


def test_an_unknown_parameter_is_refused_with_those_that_exist() -> None:
    with pytest.raises(InputError, match=r"got 'head\.\*'. The model has 0\.weight, 0\.bias"):
        wanted_parameters(model(), ["0.*", "head.*"])


def test_a_single_name_instead_of_a_list_is_refused() -> None:
    with pytest.raises(InputError, match=r"parameters: must be a list of names; got '0\.weight'"):
        wanted_parameters(model(), "0.weight")


def test_a_sharded_parameter_is_refused_by_name() -> None:
    net = nn.Linear(2, 2)
    net.weight.placements = ("a shard",)
    with pytest.raises(InputError, match=r"weight: must be a whole tensor .* sharded over devices"):
        wanted_parameters(net, None)


def test_a_parameter_made_in_inference_mode_is_refused_by_name() -> None:
    with torch.inference_mode():
        net = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"weight: .* got one made in inference mode"):
        wanted_parameters(net, None)
