"""What the experts have said about all training examples, ready for mixed batches.

The answers of all tasks stand one below the other, so that one look-up serves a mixed batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.merged.distillation import distillation_loss, feature_distance


@dataclass(frozen=True)
class Targets:
    """The experts' outputs on the training examples of T tasks, N in all.

    Attributes:
        logits: float32 ``[N, W]`` with W the most classes of a task; −inf where a task has less.
        starts: Row of each task's first example, int64 ``[T]``.
        features: The final features, ``[N, ...]``; None where they are not learned from.
        variances: Total variance of each task's features, ``[T]``; None without them.
    """

    logits: Tensor
    starts: Tensor
    features: Tensor | None = None
    variances: Tensor | None = None

    @classmethod
    def of(
        cls,
        logits: Sequence[Tensor],
        features: Sequence[Tensor] | None = None,
        *,
        tasks: Sequence[str],
    ) -> Targets:
        """Return the targets of each task's outputs.

        Args:
            logits: ``[N_t, C_t]`` of each task.
            features: ``[N_t, ...]`` of each task; None for none.
            tasks: Names of the tasks, for messages.

        Raises:
            InputError: If features are not finite, all equal, or of different shapes.
        """
        width = max(own.shape[1] for own in logits)
        starts = torch.tensor([0, *(len(own) for own in logits)]).cumsum(0)[:-1]
        stacked = torch.cat(
            [F.pad(own, (0, width - own.shape[1]), value=-torch.inf) for own in logits]
        )
        starts = starts.to(stacked.device)
        if features is None:
            return cls(stacked, starts)
        variances = [_variance(own, task) for own, task in zip(features, tasks, strict=True)]
        shapes = {tuple(own.shape[1:]) for own in features}
        if len(shapes) > 1:
            raise InputError(
                f"feature_weight: the experts' final features must have one shape; got "
                f"{sorted(shapes)}. Set it to 0."
            )
        return cls(stacked, starts, torch.cat(list(features)), torch.stack(variances))

    def at(self, task: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the experts' logits ``[B, W]``, and features, on some examples.

        Args:
            task: Task of each example, int64 ``[B]``.
            index: The example's place in its task's training examples, int64 ``[B]``.
        """
        rows = self.starts[task] + index
        return self.logits[rows], None if self.features is None else self.features[rows]

    def loss(
        self,
        logits: Tensor,
        features: Tensor | None,
        teacher: tuple[Tensor, Tensor | None],
        task: Tensor,
        *,
        temperature: float,
        feature_weight: float = 0.0,
    ) -> Tensor:
        """Return each example's distance from its expert, ``[B]``.

        Args:
            logits: The student's, ``[B, at least W]``.
            features: The student's final features, ``[B, ...]``; None without a weight.
            teacher: The experts' logits ``[B, W]`` and features on these examples: :meth:`at`.
            task: Task of each example, int64 ``[B]``.
            temperature: See :func:`~lit_merge.merged.distillation.distillation_loss`.
            feature_weight: Weight of the distance of the features.
        """
        wanted, seen = teacher
        own = logits[:, : wanted.shape[1]]
        loss = distillation_loss(own, wanted, temperature=temperature)
        if features is not None and seen is not None and self.variances is not None:
            distance = feature_distance(features, seen, self.variances[task])
            loss = loss + feature_weight * distance
        return loss


def _variance(features: Tensor, task: str) -> Tensor:
    variance = features.float().flatten(1).var(dim=0, correction=0).sum()
    if not (variance.isfinite() and variance > 0):
        raise InputError(
            f"feature_weight: the final features of the expert of task {task!r} must be finite and "
            f"differ between its {len(features)} examples; got a variance of {float(variance)}. "
            "Check the expert and its examples, or set it to 0."
        )
    return variance
