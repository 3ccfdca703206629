"""What of a fit is watched for per-example gradients, and whether that can be done."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from torch import Tensor, nn

from lit_merge.callbacks.expert_callback import callbacks_of
from lit_merge.curvature import FisherBesideTraining
from lit_merge.curvature.backward import require_seen_forward
from lit_merge.curvature.differentiation import is_compiled
from lit_merge.errors import InputError

PASS = 'Use estimator "exact", which makes a pass when training ends.'
"""What an error advises where steps cannot be watched."""

_DIFFERENCE = 0.1  # of a parameter's largest square; half-precision gradients are rounded
_NOISE = 1e-6  # of the model's largest square: gradients that are truly zero are only noise


@dataclass(frozen=True)
class Watching:
    """Which micro-batches of a fit are watched.

    Attributes:
        every_n_batches: Every so manyeth, in (0, ∞).
        last_part: Of the planned optimizer steps, the part at the end, in (0, 1].

    Raises:
        InputError: A value cannot be.
    """

    every_n_batches: int = 1
    last_part: float = 0.1

    def __post_init__(self) -> None:
        if type(self.every_n_batches) is not int or self.every_n_batches < 1:
            raise InputError(
                "every_n_batches: must be a positive integer, 1 to watch every micro-batch; got "
                f"{self.every_n_batches!r}. Correct it, or leave it out."
            )
        if not 0 < self.last_part <= 1:
            raise InputError(
                "last_part: must be the part of the optimizer steps that is watched, above 0 and "
                f"at most 1; got {self.last_part!r}. Take 0.1 for the last tenth."
            )

    def first_step(self, trainer: pl.Trainer) -> int:
        """Return the number of optimizer steps before the watched part of a fit.

        Raises:
            InputError: Only a part is wanted, and nobody knows how long the fit will be.
        """
        if self.last_part == 1:
            return 0
        planned = _planned_steps(trainer)
        if planned is None:
            raise InputError(
                "last_part: must be 1.0 where the number of optimizer steps is not known before "
                "(max_time, endless training, data without length, accumulation that changes); got "
                f"{self.last_part}. Set last_part=1.0 and perhaps every_n_batches, or give the "
                "Trainer max_steps."
            )
        return planned - math.ceil(self.last_part * planned)


def require_watchable(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise where what comes by in a training step is not what it should be.

    Args:
        trainer: The Trainer.
        module: The module that it trains.

    Raises:
        InputError: The steps make themselves, are compiled or scaled, or have no batch.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise InputError(
            f"{name}: must have automatic optimization for its steps to be watched; got manual "
            f"optimization, with a loss of any scale. {PASS}"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise InputError(
            f"{name}.training_step: must take a batch for it to be watched; got a step that takes "
            f"dataloader_iter. {PASS}"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise InputError(
            'precision: must not be "16-mixed", whose gradients overflow in some steps and would '
            f"spoil the sums; got a gradient scaler. Train in bf16-mixed or 32-true. Or: {PASS}"
        )
    compiled = [path for path, child in module.named_modules() if is_compiled(child)]
    if module._compiler_ctx is not None or compiled:
        raise InputError(
            f"{name}: must not be compiled for its steps to be watched, because nobody can look "
            f"into compiled code; got torch.compile on {(compiled or ['the module'])[0]!r}. Train "
            f"without it. Or: {PASS}"
        )


def compare_in_training(
    module: nn.Module, loss: Callable[[nn.Module, Any], Tensor], one: Any, names: Sequence[str]
) -> None:
    """Compare with the gradient of one example, in the mode of training.

    In this mode a model may do what it does not do in eval mode: checkpoint its activations,
    for instance, in such a way that nothing is seen of the forward.

    Args:
        module: In the mode of training.
        loss: Called as ``loss(module, one)``.
        one: A batch of one example.
        names: Of the parameters to compare.

    Raises:
        InputError: A parameter's squares are not those of its gradient.
    """
    trial = FisherBesideTraining(module, parameters=names)
    try:
        with torch.enable_grad():
            trial.start(one)
            value = loss(module, one)
            trial.end_forward()
            require_seen_forward(value)
            parameters = dict(module.named_parameters())
            wanted = [parameters[name] for name in names]
            gradients = torch.autograd.grad(value, wanted, allow_unused=True)
            trial.stop()
    finally:
        trial.cancel()
    found = trial.sums()
    squares = {
        name: torch.zeros_like(found[name]) if gradient is None else gradient.float().square()
        for name, gradient in zip(names, gradients, strict=True)
    }
    noise = _NOISE * max(float(square.max()) for square in squares.values())
    for name, expected in squares.items():
        difference = float((found[name] - expected).abs().max())
        if difference > _DIFFERENCE * float(expected.max()) + noise:
            raise InputError(
                f"{name}: must be one whose per-example gradients come by in training; got "
                f"something else there than its gradient on one example. {PASS}"
            )


def _planned_steps(trainer: pl.Trainer) -> int | None:
    """Return how many optimizer steps a fit will make unless it stops early, None if unknown."""
    timers = (c for c in callbacks_of(trainer) if isinstance(c, Timer))
    if any(timer.time_remaining() is not None for timer in timers):
        return None
    if any(isinstance(c, GradientAccumulationScheduler) for c in callbacks_of(trainer)):
        return None  # Lightning's estimate takes the windows of the first epoch for all
    planned = trainer.estimated_stepping_batches
    return int(planned) if 0 < planned < float("inf") else None
