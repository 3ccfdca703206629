"""The experts' outputs in a mixed batch, against each task alone."""

from __future__ import annotations

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.merged.targets import Targets
from tests.references import softened_divergence


def test_a_mixed_batch_has_the_losses_of_each_task_alone() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(6, 5), torch.randn(4, 3)]
    features = [torch.randn(6, 7), 3 * torch.randn(4, 7)]
    targets = Targets.of(logits, features, tasks=("svhn", "dtd"))
    task, index = torch.tensor([0, 1, 1, 0]), torch.tensor([5, 0, 3, 2])
    own = torch.randn(4, 5, requires_grad=True)  # a shared head: no −inf beyond a task's classes
    feature = torch.randn(4, 7)
    loss = targets.loss(
        own, feature, targets.at(task, index), task, temperature=2.0, feature_weight=0.5
    )
    for row, (t, i) in enumerate(zip(task.tolist(), index.tolist(), strict=True)):
        width = logits[t].shape[1]
        expected = softened_divergence(
            own.detach()[row : row + 1, :width], logits[t][i : i + 1], 2.0
        )[0]
        variance = features[t].double().var(dim=0, correction=0).sum()
        distance = (feature[row] - features[t][i]).double().square().sum() / variance
        assert float(loss[row].detach()) == pytest.approx(
            float(expected + 0.5 * distance), rel=1e-5
        )
    loss.sum().backward()
    assert own.grad is not None
    assert own.grad.isfinite().all()
    assert (own.grad[task == 1, 3:] == 0).all()


def test_logits_that_are_minus_infinity_beyond_the_classes_have_finite_gradients() -> None:
    targets = Targets.of([torch.randn(2, 4), torch.randn(2, 2)], tasks=("a", "b"))
    own = torch.tensor([[0.3, 1.0, -torch.inf, -torch.inf]], requires_grad=True)
    task = torch.tensor([1])
    teacher = targets.at(task, torch.tensor([0]))
    targets.loss(own, None, teacher, task, temperature=1.0).sum().backward()
    assert own.grad is not None
    assert own.grad.isfinite().all()


def test_features_that_are_all_equal_or_not_finite_are_refused() -> None:
    logits = [torch.randn(3, 2)]
    for features in (torch.ones(3, 4), torch.full((3, 4), float("nan"))):
        with pytest.raises(InputError, match=r"feature_weight: the final features.*task 'svhn'"):
            Targets.of(logits, [features], tasks=("svhn",))


def test_features_of_different_shapes_are_refused() -> None:
    logits = [torch.randn(3, 2), torch.randn(3, 2)]
    with pytest.raises(InputError, match=r"feature_weight: .* must have one shape"):
        Targets.of(logits, [torch.randn(3, 4), torch.randn(3, 5)], tasks=("a", "b"))
