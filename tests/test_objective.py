"""What a loss function may not return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_merge.curvature.objective import Objective
from lit_merge.errors import InputError


def objective(value: Any, labels: Any = "observed") -> Objective:
    return Objective(nn.Linear(1, 1), lambda model, batch: value, labels=labels, seed=0)


def test_the_loss_is_what_the_function_returns() -> None:
    model = nn.Linear(3, 2)
    batch = (torch.ones(4, 3), torch.zeros(4).long())

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    value = Objective(model, loss, labels="observed", seed=0)(batch, range(4))
    assert torch.equal(value, loss(model, batch))


def test_one_number_in_a_vector_is_taken() -> None:
    assert objective(torch.ones(1))(None, [0]).shape == ()


def test_samples_are_kept_until_forgotten() -> None:
    logits = torch.zeros(50, 3)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(batch, torch.zeros(50).long())

    sampled = Objective(nn.Linear(1, 1), loss, labels="sampled", seed=0)
    sampled(logits, range(50))
    shifted = logits + torch.tensor([0.0, 0.0, 50.0])
    kept = sampled(shifted, range(50))
    sampled.forget()
    assert kept > 1
    assert sampled(shifted, range(50)) < 1e-6


def test_no_loss_is_refused() -> None:
    with pytest.raises(InputError, match=r'got NoneType. Models of transformers .* no "labels"'):
        objective(None)(None, [0])


def test_a_loss_per_example_is_refused() -> None:
    with pytest.raises(InputError, match=r"one number, the mean over the batch; got shape \(4,\)"):
        objective(torch.ones(4))(None, range(4))


def test_a_loss_that_is_not_finite_is_refused_with_its_examples() -> None:
    with pytest.raises(InputError, match=r"must be finite; got inf on the examples 0, .*, 7, …"):
        objective(torch.tensor(float("inf")))(None, range(20))


def test_a_loss_whose_labels_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(InputError, match=r'none of these calls. Use one .* or labels="observed"'):
        objective(torch.ones(()), "sampled")(None, [0])


def test_an_unknown_kind_of_labels_is_refused() -> None:
    with pytest.raises(InputError, match=r"labels: must be .* \"expected\"; got 'true'"):
        objective(torch.ones(()), "true")


def test_logits_of_nan_are_named_as_such_with_sampled_labels() -> None:
    model = nn.Linear(3, 4)
    nn.init.constant_(model.weight, float("nan"))
    batch = (torch.ones(5, 3), torch.zeros(5, dtype=torch.int64))
    objective = Objective(
        model,
        lambda net, b: F.cross_entropy(net(b[0]), b[1]),
        labels="sampled",
        seed=0,
    )
    with pytest.raises(InputError, match="loss: must be finite; got nan"):
        objective(batch, range(5))


def outputs_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"labels": "observed"}, 1),
        ({"labels": "sampled"}, 1),
        ({"labels": "sampled", "samples": 3}, 3),
        ({"labels": "expected"}, 4),  # the classes
    ],
)
def test_there_is_a_round_for_every_draw_or_output(settings: Any, count: int) -> None:
    torch.manual_seed(0)
    first = Objective(nn.Linear(3, 4), outputs_loss, seed=0, **settings)
    batch = (torch.randn(5, 3), torch.zeros(5, dtype=torch.int64))
    values = [objective(batch, range(5)).item() for objective in first.rounds()]
    assert len(values) == len(set(values)) == count
    assert values[0] == first(batch, range(5)).item()


def test_the_mean_over_examples_is_told_from_other_losses() -> None:
    def total(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    batch = (torch.eye(3), torch.arange(3))
    settings: Any = {"labels": "observed", "seed": 0}
    Objective(nn.Linear(3, 4), outputs_loss, **settings).require_mean(batch, range(3))
    with pytest.raises(InputError, match=r"must be the mean .* for 3 examples .* a sum instead of"):
        Objective(nn.Linear(3, 4), total, **settings).require_mean(batch, range(3))
