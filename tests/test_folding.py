"""Folding all corrections of a network, against running it with them between the layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_merge.correction import Site
from lit_merge.correction.folding import SiteAffine, fold_corrections, largest_difference
from lit_merge.correction.site import channel_layout, input_layout


def affines(network: nn.Module, *names: str, shift: bool = True) -> list[SiteAffine]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for name in names:
        module = network.get_submodule(name.removesuffix(":input"))
        layout = input_layout(module) if name.endswith(":input") else channel_layout(module)
        assert layout is not None
        scale = 0.5 + torch.rand(layout[0], generator=generator)
        bias = torch.randn(layout[0], generator=generator) * shift
        found.append(SiteAffine(Site(name, *layout), scale, bias))
    return found


def hooked(network: nn.Module, corrections: list[SiteAffine], inputs: Tensor) -> Tensor:
    """Run a network with corrections between its layers."""
    handles = []
    for c in corrections:
        module = network.get_submodule(c.site.module)
        if c.site.before:
            handles.append(module.register_forward_pre_hook(lambda m, args, c=c: c(args)))
        else:
            handles.append(module.register_forward_hook(lambda m, args, output, c=c: c(output)))
    with torch.no_grad():
        output: Tensor = network(inputs)
    for handle in handles:
        handle.remove()
    return output


def check(
    network: nn.Module, corrections: list[SiteAffine], inputs: Tensor, *left: str
) -> dict[str, str]:
    """Fold; check that the rest, hooked, gives what all corrections hooked give."""
    network = network.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    folding = fold_corrections(network, corrections, lambda model: model(inputs))
    assert set(folding.left) == set(left)
    assert set(folding.folded) == {c.site.name for c in corrections} - set(left)
    rest = [c for c in corrections if c.site.name in left]
    expected = hooked(network, corrections, inputs)
    assert largest_difference(hooked(folding.network, rest, inputs), expected) < 1e-6
    assert largest_difference(network(inputs), expected) > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in folding.network.modules())
    return dict(folding.left)


class Net(nn.Module):
    """Layers a, b, … and how they are called."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.call = forward
        for tensor in self.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.2, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def conv_net(forward: Callable[[Net, Tensor], Tensor]) -> Net:
    return Net(forward, a=nn.Conv2d(3, 4, 3, bias=False), b=nn.BatchNorm2d(4))


def test_a_shift_behind_a_convolution_without_bias_goes_into_its_batch_norm() -> None:
    network = conv_net(lambda net, x: net.b(net.a(x)).relu())
    check(network, affines(network, "a", "b"), IMAGES)


def test_a_batch_norm_with_its_own_activation_takes_the_shift_but_no_correction() -> None:
    network = Net(
        lambda net, x: net.b(net.a(x)),
        a=nn.Conv2d(3, 4, 3, bias=False),
        b=timm.layers.BatchNormAct2d(4),
    )
    with torch.no_grad():
        network.b.weight.mul_(-1.0)  # most of it is cut off
    reasons = check(network, affines(network, "a", "b"), IMAGES, "b")
    assert "no weights of a BatchNormAct2d scale and shift what it gives" in reasons["b"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.b(net.a(x)) + net.a(x),
        lambda net, x: (lambda z: net.b(z) + z)(net.a(x)),
        lambda net, x: net.b(net.a(x).mul(2.0)),
        lambda net, x: net.b(net.a(x)) + net.b(x[:, :1].expand(-1, 4, -1, -1)).mean(),
        lambda net, x: (lambda z: (z.relu_(), net.b(z))[1])(net.a(x)),
    ],
    ids=["called twice", "shortcut", "something between", "norm called twice", "in place"],
)
def test_a_shift_stays_where_the_batch_norm_is_not_all_that_takes_it(
    forward: Callable[[Net, Tensor], Tensor],
) -> None:
    network = conv_net(forward)
    reasons = check(network, affines(network, "a"), IMAGES, "a")
    assert reasons == {"a": "it has no bias for the shift"}


def test_a_scale_alone_needs_no_bias() -> None:
    network = conv_net(lambda net, x: net.b(net.a(x)) + net.a(x))
    check(network, affines(network, "a", shift=False), IMAGES)


def test_a_layer_that_is_called_twice_is_corrected_twice() -> None:
    network = Net(lambda net, x: net.a(net.a(x)), a=nn.Linear(4, 4))
    check(network, affines(network, "a"), ROWS)


def test_a_layer_under_two_names_is_one_layer() -> None:
    layer = nn.Linear(4, 4)
    network = Net(lambda net, x: net.b(net.a(x)), a=layer, b=layer)
    check(network, affines(network, "a"), ROWS)


def test_tied_weights_do_not_fold() -> None:
    network = Net(lambda net, x: net.b(net.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    network.b.weight = network.a.weight
    reasons = check(network, affines(network, "a", "b"), ROWS, "a", "b")
    assert set(reasons.values()) == {"its weight is shared with another layer"}


def test_a_layer_whose_weight_is_read_elsewhere_does_not_fold() -> None:
    network = Net(lambda net, x: net.a(x) + F.linear(x, net.a.weight), a=nn.Linear(4, 4))
    reasons = check(network, affines(network, "a"), ROWS, "a")
    assert reasons == {"a": "its parameters are also used outside of it"}


def test_a_layer_that_the_inputs_do_not_reach_does_not_fold() -> None:
    network = Net(lambda net, x: net.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    reasons = check(network, affines(network, "a", "b"), ROWS, "b")
    assert reasons == {"b": "the example inputs do not reach it"}


def test_input_and_output_of_one_layer_fold_together() -> None:
    network = Net(lambda net, x: net.a(x), a=nn.Linear(4, 3))
    check(network, affines(network, "a:input", "a"), ROWS)
    check(network, affines(network, "a", "a:input"), ROWS)


def test_a_shift_before_a_padded_convolution_does_not_fold() -> None:
    padded = Net(lambda net, x: net.a(x), a=nn.Conv2d(3, 4, 3, padding=1))
    reasons = check(padded, affines(padded, "a:input"), IMAGES, "a:input")
    assert "no weights of a Conv2d scale and shift what it takes" in reasons["a:input"]
    check(padded, affines(padded, "a:input", shift=False), IMAGES)
    bare = Net(lambda net, x: net.a(x), a=nn.Conv2d(3, 4, 3))
    check(bare, affines(bare, "a:input"), IMAGES)


def test_the_identity_is_folded_whatever_the_layer() -> None:
    network = Net(lambda net, x: net.a(x), a=nn.Linear(4, 4, bias=False))
    site = Site("a", 4, -1)
    same = SiteAffine(site, torch.ones(4), torch.zeros(4))
    folding = fold_corrections(network, [same], lambda model: model(ROWS))
    assert folding.folded == ("a",)


def test_a_difference_that_is_no_number_is_infinite() -> None:
    ones = torch.ones(2)
    assert largest_difference(ones * torch.nan, ones) == float("inf")
    assert largest_difference(ones, ones * torch.nan) == float("inf")
    assert largest_difference(torch.ones(3), ones) == float("inf")
    assert largest_difference(ones[:0], ones[:0]) == 0.0
