"""Learning from an expert's outputs: the losses, and the logits of many examples in advance.

No labels are needed: the merged network is fitted to what each expert says about its own task's
examples, at a temperature that shows how it ranks the wrong classes as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_merge.errors import InputError


def distillation_loss(logits: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    r"""Return how far each example's prediction is from the teacher's.

    .. math:: T^2 \, KL(softmax(y_{teacher} / T) \,\|\, softmax(y / T))

    Args:
        logits: The student's, ``[B, C]``; computed in float32 at least.
        teacher: The teacher's, ``[B, C]``; −inf in the columns that are no class of the example's
            task, whatever the student has there.
        temperature: T; the factor T² keeps the gradient's size.

    Returns:
        ``[B]``, zero where both agree.

    References:
        Hinton, Vinyals, Dean (2015), arXiv:1503.02531.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    none = teacher.isneginf()
    student = F.log_softmax(logits.to(wide).masked_fill(none, -torch.inf) / temperature, dim=-1)
    target = F.log_softmax(teacher.to(wide) / temperature, dim=-1)
    # Equal numbers where there is no class: 0 · (−inf − −inf) would be NaN, its gradient too.
    student, target = student.masked_fill(none, 0.0), target.masked_fill(none, 0.0)
    divergence = F.kl_div(student, target, reduction="none", log_target=True).sum(-1)
    return divergence * temperature**2


def feature_distance(feature: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    r"""Return how far each example's feature is from the teacher's.

    .. math:: \|z - z_{teacher}\|^2 / \sum_c var(z_{teacher, c})

    Args:
        feature: The student's, ``[B, ...]``; computed in float32 at least.
        teacher: The teacher's, ``[B, ...]``.
        variance: The teacher's total variance on the task of each example, ``[B]``.

    Returns:
        ``[B]``; on average 1 for a student that always gives the teacher's mean.
    """
    wide = torch.promote_types(feature.dtype, torch.float32)
    return (feature.to(wide) - teacher.to(wide)).square().flatten(1).sum(-1) / variance


@torch.no_grad()
def logits_of_all(forward: Callable[[Any], Tensor], batches: Iterable[Any], *, task: str) -> Tensor:
    """Return a teacher's logits for all examples, in their order.

    Args:
        forward: Takes inputs to logits ``[B, C]``.
        batches: Inputs, batch after batch.
        task: Name of the task, for messages.

    Returns:
        float32 ``[N, C]``.

    Raises:
        InputError: If a logit is NaN or infinite.
    """
    collected = [forward(inputs).float() for inputs in batches]
    logits = torch.cat(collected)
    wrong = (~logits.isfinite()).any(dim=-1).nonzero()
    if len(wrong):
        raise InputError(
            f"experts: the expert of task {task!r} must give finite logits; got NaN or infinity "
            "for "
            f"{len(wrong)} of {len(logits)} examples, first {int(wrong[0])}. Check its weights and "
            "the examples, or use a wider precision."
        )
    return logits
