"""One task of a merged network as the plain network of its architecture."""

from __future__ import annotations

import torch
from torch import nn

from lit_merge.merged.plain_network import plain_network, tied_names
from tests.corrected_folders import CLASSES, tiny_gpt2
from tests.tiny_models import tiny_vit


def test_a_task_gets_its_head_and_the_modules_of_the_architecture() -> None:
    model, other = tiny_vit(), tiny_vit(1)
    shared = {n: v for n, v in other.state_dict().items() if not n.startswith("head.")}
    own = {"head.weight": torch.randn(3, 32), "head.bias": torch.randn(3)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = plain_network(model, shared, own, task="svhn")
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    state = plain.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(value, {**shared, **own}[name]) for name, value in state.items())
    assert plain.get_submodule("head").out_features == CLASSES["svhn"]
    assert not plain.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_names_of_one_tensor_are_found() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert tied_names(net) == ()
    net[1].weight = net[0].weight
    assert tied_names(net) == (("0.weight", "1.weight"),)
    assert tied_names(tiny_gpt2()) == ()
