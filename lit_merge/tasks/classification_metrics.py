"""What is measured on a classification task: accuracy and negative log-likelihood."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lit_merge.errors import InputError
from lit_merge.tasks.task import IGNORED


def classification_metrics(num_classes: int, prefix: str) -> MetricCollection:
    """Return accuracy and mean negative log-likelihood, both over the examples that count."""
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED),
            "nll": weighted_mean(),
        },
        prefix=prefix,
    )


def weighted_mean() -> MeanMetric:
    """Return a mean that takes a weight per value."""
    # Not nan_strategy="disable": in torchmetrics 1.9 that also sets all weights to one.
    return MeanMetric(nan_strategy="error")


def update_metrics(metrics: MetricCollection, logits: Tensor, labels: Tensor) -> None:
    """Count a batch.

    Args:
        metrics: From :func:`classification_metrics`.
        logits: ``[B, C]``, or ``[B, L, C]`` where every token of an example is classified.
        labels: int64 ``[B]`` or ``[B, L]``, -100 where one must not count.

    Raises:
        InputError: If logits are NaN, or all that could be right are −inf.
    """
    logits, labels = logits.float().flatten(0, -2), labels.flatten()
    nll = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    if not bool(nll.isfinite().all()):
        raise InputError(
            f"model: must give finite logits ({metrics.prefix or ''}nll); got NaN or infinity for "
            f"{int((~nll.isfinite()).sum())} of {len(nll)} examples. Check its weights and inputs, "
            "or use a wider precision."
        )
    metrics["accuracy"].update(logits, labels)
    metrics["nll"].update(nll, (labels != IGNORED).to(nll))
