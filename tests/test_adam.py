"""The second moment of Adam and its relatives, on the scale of a sum over examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_merge.curvature import adam_second_moment
from lit_merge.curvature.labels import SampledLabels
from lit_merge.errors import InputError
from tests.references import softmax_fisher_by_enumeration


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def stepped(kind: Any, gradients: list[Tensor], **settings: Any) -> tuple[nn.Linear, Any]:
    model = nn.Linear(2, 1, bias=False)
    optimizer = kind(model.parameters(), lr=1e-3, **settings)
    for gradient in gradients:
        model.weight.grad = gradient.clone()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.Adam, {"betas": (0.9, 0.95)}),
        (torch.optim.Adam, {"betas": (0.9, 0.95), "amsgrad": True}),
        (torch.optim.AdamW, {"betas": (0.9, 0.95), "weight_decay": 0.5}),
        (torch.optim.NAdam, {"betas": (0.9, 0.95)}),
        (torch.optim.RAdam, {"betas": (0.9, 0.95)}),
    ],
)
def test_it_is_the_weighted_mean_of_the_squared_gradients_times_n_and_b(
    kind: Any, settings: dict[str, Any]
) -> None:
    gradients = [
        torch.tensor([[1.0, -2.0]]),
        torch.tensor([[3.0, 0.5]]),
        torch.tensor([[0.1, 1.0]]),
    ]
    model, optimizer = stepped(kind, gradients, **settings)
    got = adam_second_moment(optimizer, names_of(model), num_examples=100, batch_size=8)
    shares = torch.tensor([0.95**2, 0.95, 1.0])
    mean = sum(s * g**2 for s, g in zip(shares / shares.sum(), gradients, strict=True))
    torch.testing.assert_close(got, {"weight": 100 * 8 * mean})


def test_with_sampled_labels_it_is_the_fisher_of_the_data() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    x = torch.randn(32, 3, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, betas=(0.9, 0.999))
    for step in range(1200):
        rows = x[8 * (step % 4) : 8 * (step % 4) + 8]
        with SampledLabels(0, range(8 * step, 8 * step + 8), {}):
            loss = F.cross_entropy(model(rows), torch.zeros(8).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    got = adam_second_moment(optimizer, names_of(model), num_examples=32, batch_size=8)
    for name, fisher in softmax_fisher_by_enumeration(model, x, 3).items():
        assert (got[name].sum() / fisher.sum()).item() == pytest.approx(1, abs=0.08)


def test_only_the_parameters_of_this_optimizer_are_returned() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    optimizers = [torch.optim.Adam(layer.parameters()) for layer in model]
    model(torch.ones(1, 2)).sum().backward()
    results = []
    for optimizer in optimizers:
        optimizer.step()
        results.append(adam_second_moment(optimizer, names_of(model), num_examples=1, batch_size=1))
    assert [list(result) for result in results] == [["0.weight"], ["1.weight"]]


def test_the_optimizer_is_not_changed() -> None:
    model, optimizer = stepped(torch.optim.Adam, [torch.ones(1, 2)])
    before = optimizer.state[model.weight]["exp_avg_sq"].clone()
    adam_second_moment(optimizer, names_of(model), num_examples=10, batch_size=2)["weight"].zero_()
    assert torch.equal(optimizer.state[model.weight]["exp_avg_sq"], before)


def test_frozen_parameters_are_left_out() -> None:
    model, optimizer = stepped(torch.optim.Adam, [])
    model.weight.requires_grad_(False)
    assert adam_second_moment(optimizer, names_of(model), num_examples=1, batch_size=1) == {}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adamax, torch.optim.Adagrad])
def test_another_optimizer_is_refused(kind: Any) -> None:
    model, optimizer = stepped(kind, [torch.ones(1, 2)])
    with pytest.raises(InputError, match=f"weight: must have a second moment.*got {kind.__name__}"):
        adam_second_moment(optimizer, names_of(model), num_examples=1, batch_size=1)


def test_an_optimizer_before_its_first_step_is_refused() -> None:
    model, optimizer = stepped(torch.optim.Adam, [])
    with pytest.raises(InputError, match=r"weight: .* got Adam with state empty. Use Adam"):
        adam_second_moment(optimizer, names_of(model), num_examples=1, batch_size=1)


@pytest.mark.parametrize("wrong", ["num_examples", "batch_size"])
def test_numbers_below_one_are_refused(wrong: str) -> None:
    model, optimizer = stepped(torch.optim.Adam, [torch.ones(1, 2)])
    numbers = {"num_examples": 1, "batch_size": 1, wrong: 0}
    with pytest.raises(InputError, match=f"{wrong}: must be at least 1; got 0"):
        adam_second_moment(optimizer, names_of(model), **numbers)
