"""The state in which models are differentiated is restored, whatever happens inside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_merge.curvature.differentiation import differentiation, requiring_grad


def model() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
    net[0].weight.requires_grad_(False)
    net[1].eval()
    return net


def state(net: nn.Module) -> list[bool]:
    return [m.training for m in net.modules()] + [p.requires_grad for p in net.parameters()]


def test_inside_the_model_is_frozen_in_eval_mode_with_gradients_on() -> None:
    net = model()
    before = state(net)
    with torch.inference_mode(), differentiation(net):
        assert not any(state(net))
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.backends.mha.get_fastpath_enabled()
    assert state(net) == before
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_error_inside_restores_everything() -> None:
    net = model()
    before, random = state(net), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), differentiation(net):
        torch.rand(()).item() / 0
    assert state(net) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_parameters_require_a_gradient_only_inside() -> None:
    net = model()
    with differentiation(net):
        with requiring_grad(net[2].parameters()):
            assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]
        assert not any(p.requires_grad for p in net.parameters())
        with pytest.raises(ZeroDivisionError), requiring_grad(net.parameters()):
            torch.rand(()).item() / 0
        assert not any(p.requires_grad for p in net.parameters())
