"""The weights of rows: against a Jacobian, and rows that nothing reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_merge.least_squares.sensitivity import RowWeights, row_sensitivity


class FirstToken(nn.Module):
    """Reads the first token, and half of what is left from the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.other, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        self.other(x)
        output: Tensor = self.head(torch.tanh(h[:, 0] + 0.5 * h[:, 1]))
        return output


def test_it_is_the_squared_gradient_of_a_random_direction_in_the_mean_that_of_the_jacobian() -> (
    None
):
    model, x = FirstToken(), torch.randn(1, 3, 3).double()
    hidden = model.layer(x)

    def rest(h: Tensor) -> Tensor:
        outputs = model.head(torch.tanh(h[:, 0] + 0.5 * h[:, 1]))[0]
        centred: Tensor = outputs - outputs.mean()  # what all logits share changes nothing
        return centred

    jacobian: Any = torch.autograd.functional.jacobian(rest, hidden)
    expected = jacobian.square().sum((0, -1))[0]
    many = x.expand(4000, 3, 3)
    found = row_sensitivity(model, lambda: model(many), {"layer": -1})["layer"]
    assert found.shape == (4000, 3, 1)
    torch.testing.assert_close(found.mean(0)[:, 0], expected.float(), rtol=0.1, atol=0)
    torch.testing.assert_close(found[:, 1], found[:, 0] / 4)
    assert not found[:, 2].any()


def test_modules_that_the_outputs_do_not_depend_on_have_none() -> None:
    model, x = FirstToken(), torch.randn(2, 3, 3).double()
    assert [*row_sensitivity(model, lambda: model(x), {"layer": -1, "other": -1})] == ["layer"]


def test_channels_are_summed_on_their_axis() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten())
    x = torch.randn(4, 2, 5, 6)
    assert row_sensitivity(model, lambda: model(x), {"0": 1})["0"].shape == (4, 5, 6, 1)


class Tuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.layer(x), None


def test_a_module_may_return_several_things() -> None:
    torch.manual_seed(0)
    block, head = Tuple(), nn.Linear(3, 2)
    model = nn.ModuleDict({"block": block, "head": head})
    x = torch.randn(4, 3)
    found = row_sensitivity(model, lambda: head(block(x)[0]), {"block": -1})
    assert found["block"].shape == (4, 1)
    assert found["block"].min() > 0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_weights_have_mean_one_over_the_rows_that_count(share: float) -> None:
    model, x = FirstToken(), torch.randn(4, 3, 3).double()
    weights = RowWeights(share)
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0]])
    weights.measure(7, model, lambda: model(x), {"layer": -1}, mask, seed=3)
    found = weights.of(7, "layer")
    assert found is not None
    assert found.shape == (8,)
    assert found.mean().item() == pytest.approx(1, abs=1e-6)
    assert found[2].item() == pytest.approx(1 - share)  # the third token of the first example
    assert weights.of(6, "layer") is None
    assert weights.of(7, "head") is None


def test_gradients_of_the_model_are_left_alone() -> None:
    model, x = FirstToken(), torch.randn(4, 3, 3).double()
    with torch.no_grad():
        row_sensitivity(model, lambda: model(x), {"layer": -1})
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
