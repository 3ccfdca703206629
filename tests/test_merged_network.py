"""One network for several tasks: its heads, its sites, and what it is stored as."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lit_merge.checkpoint import open_state_dict
from lit_merge.correction import RescaleShift, Site
from lit_merge.errors import InputError
from lit_merge.merged.network import (
    MergedNetwork,
    check_sites,
    choose_sites,
    empty_heads,
    expert_network,
    heads_in,
    own_tensors,
)
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_conv_net, tiny_vit

CASES = {
    "vit": (tiny_vit, ("head.weight", "head.bias"), lambda: images(4)),
    "conv": (tiny_conv_net, ("8.weight", "8.bias"), lambda: images(4, channels=1)),
    "bert": (
        tiny_bert,
        ("classifier.weight", "classifier.bias"),
        lambda: padded_texts((3, 7, 5, 2)),
    ),
}


def heads_of(network: nn.Module, names: tuple[str, ...], widths: dict[str, int]) -> dict:
    width = network.state_dict()[names[0]].shape[1]
    return {
        task: {names[0]: torch.randn(classes, width), names[1]: torch.randn(classes)}
        for task, classes in widths.items()
    }


@pytest.mark.parametrize("kind", CASES)
def test_each_example_of_a_mixed_batch_is_seen_as_its_own_task_sees_it(kind):
    make, names, inputs = CASES[kind]
    network, batch = make(), inputs()
    torch.manual_seed(1)
    heads = heads_of(network, names, {"a": 2, "b": 4})
    sites = choose_sites(network, "auto", names)
    merged = MergedNetwork(network, ("a", "b"), heads=heads, sites=sites).eval()
    merged.load_shared(network.state_dict())
    with torch.no_grad():
        for parameter in merged.corrections.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        mixed = merged(batch, torch.tensor([0, 1, 1, 0]))
        alone = [merged(batch, task) for task in (0, 1)]
    torch.testing.assert_close(mixed[[0, 3]], alone[0][[0, 3]])
    torch.testing.assert_close(mixed[[1, 2]], alone[1][[1, 2]])
    assert mixed[0, 2:].eq(float("-inf")).all()
    assert merged.num_classes() == (2, 4)


@pytest.mark.parametrize("kind", CASES)
def test_without_corrections_and_other_heads_it_is_the_network(kind):
    make, names, inputs = CASES[kind]
    network, batch = make(), inputs()
    own = {name: network.state_dict()[name] for name in names}
    sites = choose_sites(network, "auto", names)
    merged = MergedNetwork(network, ("a",), heads={"a": own}, sites=sites).eval()
    merged.load_shared(network.state_dict())
    with torch.no_grad():
        output = network(**batch).logits if isinstance(batch, dict) else network(batch)
        assert torch.equal(merged(batch, 0), output)


def test_the_network_is_copied_and_only_corrections_learn():
    network = tiny_vit()
    merged = MergedNetwork(network, ("a",), heads={}, sites=choose_sites(network, "auto", ()))
    assert all(p.requires_grad for p in network.parameters())
    trainable = {name for name, p in merged.named_parameters() if p.requires_grad}
    assert trainable == {f"corrections.{n}" for n, _ in merged.corrections.named_parameters()}


def test_it_runs_in_evaluation_mode_whatever_its_mode():
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 2))
    merged = MergedNetwork(network, ("a",), heads={}, sites=choose_sites(network, "auto", ()))
    batch = torch.randn(6, 4)
    assert all(module.training for module in merged.modules())
    output = merged(batch, 0)
    assert torch.equal(merged.eval()(batch, 0), output)
    assert merged.network[1].num_batches_tracked == 0
    assert all(module.training for module in merged.train().modules())


def test_heads_are_no_sites():
    names = ("head.weight", "head.bias")
    sites = [site.name for site in choose_sites(tiny_vit(), "auto", names)]
    assert "head" not in sites
    assert "blocks.0.attn.qkv" in sites


def test_its_state_is_shared_weights_and_heads_by_the_networks_names():
    network = tiny_vit()
    heads = heads_of(network, ("head.weight", "head.bias"), {"a": 2, "b": 4})
    merged = MergedNetwork(network, ("a", "b"), heads=heads, sites=())
    merged.load_shared(network.state_dict())
    shared, own = merged.shared_state(), merged.head_state()
    assert set(shared) | set(own["a"]) == set(network.state_dict())
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in shared.items())
    assert all(torch.equal(own[t][n], value) for t, h in heads.items() for n, value in h.items())


def test_heads_shared_by_all_tasks_have_one_width():
    network = tiny_vit()
    merged = MergedNetwork(network, ("a", "b"), heads={}, sites=())
    assert merged.num_classes() == (5, 5)
    assert merged.head_state() == {}


def test_a_norm_of_each_tasks_own_is_no_head():
    network = tiny_vit()
    own = {name: network.state_dict()[name] for name in ("norm.weight", "norm.bias")}
    merged = MergedNetwork(network, ("a", "b"), heads={"a": own, "b": own}, sites=()).eval()
    merged.load_shared(network.state_dict())
    assert merged.num_classes() == (5, 5)
    with torch.no_grad():
        torch.testing.assert_close(merged(images(2), torch.tensor([0, 1])), network(images(2)))


def test_a_network_whose_head_is_not_known_has_no_width():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    assert MergedNetwork(network, ("a",), heads={}, sites=()).num_classes() == (None,)


def test_the_width_is_that_of_the_last_layer_whatever_the_order_of_the_file():
    class TwoLayerHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pre_classifier = nn.Linear(3, 7)
            self.classifier = nn.Linear(7, 2)

    network = TwoLayerHead()
    own = dict(sorted(network.state_dict().items()))
    assert next(iter(own)).startswith("classifier")
    assert MergedNetwork(network, ("a",), heads={"a": own}, sites=()).num_classes() == (2,)


def test_an_expert_alone_gives_what_the_expert_gives():
    network, expert = tiny_bert(0), tiny_bert(1)
    expert.classifier = nn.Linear(16, 6)
    state = {f"model.{name}": value for name, value in expert.state_dict().items()}
    names = ("classifier.weight", "classifier.bias")
    alone = expert_network(network, open_state_dict(state), task="a", head_names=names)
    batch = padded_texts((3, 7))
    with torch.no_grad():
        assert torch.equal(alone(batch, 0), expert.eval()(**batch).logits)


def test_heads_get_the_networks_names():
    network = tiny_vit()
    state = {f"net.model.{name}": value for name, value in network.state_dict().items()}
    own = {"net.model.head.weight": torch.zeros(2, 32)}
    assert set(heads_in(network, state, {"a": own})["a"]) == {"head.weight"}


def test_heads_get_the_networks_names_where_the_base_has_another_prefix():
    network = tiny_bert()
    base = network.bert.state_dict()
    own = {"model.classifier.weight": torch.zeros(2, 16), "model.classifier.bias": torch.zeros(2)}
    assert set(heads_in(network, base, {"a": own})["a"]) == {"classifier.weight", "classifier.bias"}


def test_empty_heads_have_shapes_and_the_networks_types():
    network = tiny_vit().double()
    heads = empty_heads(network, {"a": {"head.weight": [2, 32]}})
    assert heads["a"]["head.weight"].shape == (2, 32)
    assert heads["a"]["head.weight"].dtype == torch.float64


def test_a_copy_corrects_with_its_own_corrections():
    network = tiny_conv_net()
    merged = MergedNetwork(
        network, ("a",), heads={}, sites=choose_sites(network, "auto", ())
    ).eval()
    twin = copy.deepcopy(merged)
    batch = images(2, channels=1)
    before = merged(batch, 0)
    with torch.no_grad():
        next(twin.corrections.parameters()).zero_()
    assert torch.equal(merged(batch, 0), before)
    assert not torch.equal(twin(batch, 0), before)


def test_an_expert_without_the_head_is_named():
    with pytest.raises(InputError, match=r"must hold the head of task 'svhn'; got no 'head.bias'"):
        own_tensors(open_state_dict({"head.weight": torch.zeros(1)}), ("head.bias",), task="svhn")


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site("blocks.9", 32, -1), "got no such layer"),
        (Site("blocks.0.attn.qkv", 10**12, -1), "got 96 on axis -1"),
        (Site("norm", 32, 1), "got 32 on axis -1"),
    ],
)
def test_sites_that_are_not_the_networks_are_refused(site, message):
    with pytest.raises(InputError, match=f"x.json: site '{site.name}' must have .*{message}"):
        check_sites(tiny_vit(), (site,), source="x.json")


def test_the_class_of_corrections_is_the_factorys():
    network = tiny_conv_net()
    sites = choose_sites(network, "auto", ())
    merged = MergedNetwork(network, ("a", "b"), heads={}, sites=sites)
    assert all(isinstance(one, RescaleShift) for one in merged.corrections.children())
    assert merged.sites == sites
