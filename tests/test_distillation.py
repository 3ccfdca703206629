"""The distillation loss and the logits of a teacher."""

from __future__ import annotations

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.merged.distillation import distillation_loss, logits_of_all
from tests.references import softened_divergence


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_loss_is_the_softened_divergence_of_each_example(temperature):
    torch.manual_seed(0)
    logits, teacher = 3 * torch.randn(4, 5), 3 * torch.randn(4, 5)
    loss = distillation_loss(logits, teacher, temperature=temperature)
    expected = softened_divergence(logits, teacher, temperature)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_is_zero_where_both_agree_up_to_a_constant():
    logits = torch.randn(3, 4)
    assert distillation_loss(logits, logits + 7, temperature=2.0).abs().max() < 1e-6


def test_the_gradient_at_high_temperature_keeps_its_size():
    teacher = torch.randn(2, 4)
    sizes = []
    for temperature in (10.0, 100.0):
        logits = torch.zeros(2, 4, requires_grad=True)
        distillation_loss(logits, teacher, temperature=temperature).sum().backward()
        sizes.append(float(logits.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_half_precision_is_raised_before_it_is_summed():
    logits = torch.randn(2, 4).bfloat16()
    assert distillation_loss(logits, torch.randn(2, 4), temperature=1.0).dtype == torch.float32


def test_no_examples_have_no_losses():
    assert distillation_loss(torch.zeros(0, 3), torch.zeros(0, 3), temperature=2.0).shape == (0,)


def test_logits_of_all_examples_keep_their_order_and_no_graph():
    layer = torch.nn.Linear(2, 3)
    inputs = torch.randn(5, 2)
    logits = logits_of_all(layer, inputs.split(2), task="svhn")
    torch.testing.assert_close(logits, layer(inputs).detach())
    assert not logits.requires_grad


def test_logits_that_are_not_finite_are_named():
    batches = [torch.zeros(2, 3), torch.tensor([[0.0, float("nan"), 1.0]])]
    with pytest.raises(InputError, match=r"task 'svhn' must give finite logits.* 1 of 3 .*first 2"):
        logits_of_all(lambda inputs: inputs, batches, task="svhn")
