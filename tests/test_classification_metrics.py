"""Accuracy and negative log-likelihood over the examples that count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lit_merge.errors import InputError
from lit_merge.tasks.classification_metrics import (
    classification_metrics,
    update_metrics,
    weighted_mean,
)
from lit_merge.tasks.task import IGNORED


def test_metrics_are_means_over_the_examples_with_a_label():
    torch.manual_seed(0)
    logits, labels = torch.randn(10, 3), torch.arange(10) % 3
    labels[[2, 7]] = IGNORED
    metrics = classification_metrics(3, "test/")
    for part in (slice(0, 4), slice(4, 8), slice(8, 10)):
        update_metrics(metrics, logits[part], labels[part])
    kept = labels != IGNORED
    found = metrics.compute()
    right = logits[kept].argmax(-1) == labels[kept]
    torch.testing.assert_close(found["test/accuracy"], right.float().mean())
    torch.testing.assert_close(found["test/nll"], F.cross_entropy(logits[kept], labels[kept]))


def test_tokens_count_as_examples_do():
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 5, 3), torch.randint(3, (4, 5))
    labels[1, 2:] = IGNORED
    tokens, examples = classification_metrics(3, ""), classification_metrics(3, "")
    update_metrics(tokens, logits, labels)
    update_metrics(examples, logits.reshape(20, 3), labels.reshape(20))
    assert tokens.compute() == examples.compute()


def test_a_batch_without_labels_counts_for_nothing():
    metrics = classification_metrics(3, "")
    update_metrics(metrics, torch.eye(3), torch.arange(3))
    before = metrics.compute()
    update_metrics(metrics, torch.randn(2, 3), torch.full((2,), IGNORED))
    assert metrics.compute() == before


def test_a_weighted_mean_takes_weights():
    mean = weighted_mean()
    mean.update(torch.tensor([2.0, 5.0]), torch.tensor([1.0, 0.0]))
    assert mean.compute() == 2.0


def test_logits_that_are_not_finite_are_named():
    logits = torch.zeros(3, 2)
    logits[1] = float("nan")
    metrics = classification_metrics(2, "val/svhn/")
    message = r"model: must give finite logits \(val/svhn/nll\); got NaN or infinity for 1 of 3"
    with pytest.raises(InputError, match=message):
        update_metrics(metrics, logits, torch.zeros(3, dtype=torch.int64))
