"""The learning rate over a fit: a linear rise, then a cosine to zero at the last step."""

from __future__ import annotations

import math
from collections.abc import Callable

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from lit_merge.errors import InputError


def with_cosine(
    module: L.LightningModule,
    optimizer: torch.optim.Optimizer,
    *,
    warmup: float = 0.0,
    first_steps: int = 0,
) -> OptimizerLRScheduler:
    """Return the optimizer with a linear warm-up and a cosine to zero at the last step of the fit.

    Args:
        module: The module that is fitted; its trainer knows the number of steps.
        optimizer: The optimizer.
        warmup: Share of the steps in which the learning rate rises.
        first_steps: Number of steps over which it rises as well, for Adam's second moment to settle
            in a fit that begins near its goal.
    """
    # The number of steps is asked for after the first step only: asking builds the data loader, and
    # one that is built here, before a resumed fit has its progress back, begins at the epoch's
    # start.
    cosine = _cosine(lambda: _steps(module), warmup)

    def factor(step: int) -> float:
        return cosine(step) * min(1.0, (step + 1) / (first_steps + 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def cosine_factor(step: int, steps: int, *, warmup: float = 0.0) -> float:
    """Return the share of the learning rate at a step.

    Args:
        step: From 0.
        steps: Number of steps of the fit.
        warmup: Share of the steps in which it rises.

    >>> [round(cosine_factor(step, 4), 3) for step in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))


def _cosine(steps: Callable[[], int], warmup: float) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step == 0 and not warmup:
            return 1.0
        return cosine_factor(step, steps(), warmup=warmup)

    return factor


def _steps(module: L.LightningModule) -> int:
    steps = module.trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise InputError(
            "max_epochs: must be set, or max_steps, for a learning rate that ends at zero; got "
            "neither. Set trainer.max_epochs."
        )
    return int(steps)
