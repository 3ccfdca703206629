"""Which parameters are wanted, and which way each is computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_merge.curvature.coverage import Coverage, wanted_parameters
from lit_merge.errors import InputError


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.PReLU())


def test_all_trainable_parameters_are_wanted_once() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    net[0].bias.requires_grad_(False)
    assert list(wanted_parameters(net, None)) == ["0.weight", "1.bias"]


def test_every_parameter_is_computed_one_way() -> None:
    coverage = Coverage(frozenset({"a", "b"}), {"c": "why c"}, frozenset({"d", "e"}))
    moved = coverage.moved({"b": "why b", "d": "why d"})
    assert moved.at_once == {"a"}
    assert moved.one_by_one == {"b": "why b", "c": "why c", "d": "why d"}
    assert moved.unused == {"e"}
    assert coverage.at_once == {"a", "b"}


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


def test_a_complex_parameter_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(InputError, match=r"0\.weight: must be real; got torch\.complex64"):
        wanted_parameters(net, None)
