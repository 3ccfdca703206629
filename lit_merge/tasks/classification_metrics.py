"""What is measured on a classification task: accuracy and negative log-likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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


class TaskMetrics(nn.ModuleDict):
    """The metrics of every task, for validation and for test; empty before the first restart."""

    def restart(self, tasks: Sequence[str], num_classes: Sequence[int]) -> None:
        """Forget what was counted.

        Args:
            tasks: Names of the tasks in the order of their indices.
            num_classes: Number of classes of each.
        """
        for stage in ("val", "test"):
            if stage not in self:
                self[stage] = nn.ModuleList(
                    classification_metrics(classes, f"{stage}/{name}/")
                    for name, classes in zip(tasks, num_classes, strict=True)
                )
        for metrics in self.modules():
            if isinstance(metrics, MetricCollection):
                # Here and not at the end: tensors that were reset in inference mode cannot be
                # counted in outside of it, as the sanity check of a fit does.
                metrics.reset()

    def of(self, stage: str, task: int) -> MetricCollection:
        """Return the metrics of one task, by its index."""
        return cast("MetricCollection", cast("nn.ModuleList", self[stage])[task])

    def compute(self, stage: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return each task's values, and their means over the tasks that were counted. Collective.

        All ranks must have counted the same tasks.
        """
        values: dict[str, Tensor] = {}
        listed: dict[str, list[Tensor]] = {}
        for index in range(len(cast("nn.ModuleList", self[stage]))):
            metrics = self.of(stage, index)
            if metrics["nll"].update_called:
                found = metrics.compute()
                values.update(found)
                for name, value in found.items():
                    listed.setdefault(f"{stage}/{name.rpartition('/')[2]}", []).append(value)
        return values, {name: torch.stack(each).mean() for name, each in listed.items()}
