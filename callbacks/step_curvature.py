r"""Curvature from the optimizer steps of a fit: which gradient, over how many examples.

``on_before_optimizer_step`` sees gradients that are accumulated, averaged over ranks, not yet
clipped, and unscaled, except for fused optimizers under a GradScaler, which unscale by themselves.
Lightning divides the loss of each micro-batch by the A of ``accumulate_grad_batches``, also in the
last window of an epoch, which may have only k < A of them; so the mean gradient ḡ over the B
examples of a step (micro-batches × examples × ranks) is A/k times what is seen.

By :mod:`lit_merge.curvature.batch_gradient`, E[ḡ²] is the mean per-example Fisher divided by B.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lit_merge.callbacks.curvature_result import Curvature
from lit_merge.curvature import SquaredBatchGradient, adam_second_moment, batch_size_of
from lit_merge.distributed import failing_together, is_sharded, true_everywhere
from lit_merge.errors import InputError
from lit_merge.passes.data_pass import DataPass
from lit_merge.passes.data_ranks import DataRanks
from lit_merge.sharding import part_as, sharded_as, zero_everywhere


@dataclass
class Steps:
    """What one optimizer has done so far.

    Attributes:
        num_steps: Its steps.
        num_examples: Examples of all its steps, on all ranks; in every epoch anew.
        inverse_sizes: Σ over the steps of (k/A)² / B: the factor between the squares of the
            gradients that the optimizer saw and the mean per-example Fisher.
        window_examples: Examples of this rank since its last step.
        window_batches: Micro-batches since its last step, k.
    """

    num_steps: int = 0
    num_examples: int = 0
    inverse_sizes: float = 0.0
    window_examples: int = 0
    window_batches: int = 0

    def batch(self, size: int) -> None:
        """Count a micro-batch that has given gradients."""
        self.window_examples += size
        self.window_batches += 1

    def close(self, *, accumulate: int, world_size: int) -> tuple[int, float]:
        """Count a step, begin a new window, and return B and A/k of the old one."""
        size = self.window_examples * world_size
        factor = accumulate / self.window_batches
        self.num_steps += 1
        self.num_examples += size
        self.inverse_sizes += 1 / (factor**2 * size)
        self.window_examples = self.window_batches = 0
        return size, factor


class StepCurvature(ABC):
    """An estimate of the curvature that grows with the steps of a fit."""

    def __init__(self, trainer: pl.Trainer, names: Mapping[Parameter, str]) -> None:
        """Begin at no steps.

        Args:
            trainer: Its optimizers are followed.
            names: The parameters wanted, with their names; where one is sharded, every rank keeps
                its part.
        """
        self.names = names
        self.parameters = {name: parameter for parameter, name in names.items()}
        self.sharded = any(map(is_sharded, names))
        self.steps = [Steps() for _ in trainer.optimizers]
        self._size: int | None = None

    @property
    def num_batches(self) -> int | None:
        """How many micro-batches the sums are over, where they grow between steps, else None."""
        return None

    def look(self, trainer: pl.Trainer, data: DataPass, *, seed: int) -> None:  # noqa: B027
        """Try out before training what could fail late. Collective.

        Args:
            trainer: The Trainer.
            data: This rank's share of the training examples.
            seed: Of the random numbers meanwhile.
        """

    def on_batch(self, trainer: pl.Trainer, batch: Any) -> None:
        """Learn how many examples a micro-batch has, when it begins."""
        self._size = batch_size_of(batch)

    def on_loss(self) -> None:  # noqa: B027
        """Learn that the forward of a micro-batch is done, and its backward begins."""

    def on_backward(self) -> None:
        """Count the examples of a micro-batch, once: only those that give gradients count."""
        if self._size is not None:
            for steps in self.steps:
                steps.batch(self._size)
            self._size = None

    def cancel(self) -> None:  # noqa: B027
        """Give up a micro-batch that has no backward, if it has had none."""

    def on_step(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Take what a step has to tell, before the optimizer makes it."""
        if getattr(trainer.fit_loop, "_skip_backward", False):
            return  # the last epoch of StochasticWeightAveraging: gradients of an older step
        index = [id(own) for own in trainer.optimizers].index(id(optimizer))
        steps = self.steps[index]
        if steps.window_batches == 0:
            return  # another step on the same batch, whose examples are counted already
        automatic = trainer.lightning_module.automatic_optimization
        size, factor = steps.close(
            accumulate=trainer.accumulate_grad_batches if automatic else steps.window_batches,
            world_size=DataRanks.of(trainer).size,
        )
        self.take(trainer, index, size=size, factor=factor)

    @abstractmethod
    def take(self, trainer: pl.Trainer, index: int, *, size: int, factor: float) -> None:
        """Look at the gradients of one optimizer.

        Args:
            trainer: The Trainer.
            index: Number of the optimizer.
            size: B, the examples that the step is over.
            factor: A/k, from the gradients to their mean over the examples.
        """

    @abstractmethod
    def hessian(self, trainer: pl.Trainer, *, num_examples: int) -> dict[str, Tensor]:
        """Return the estimate of the sum over the training examples.

        Args:
            trainer: The Trainer.
            num_examples: N.
        """

    def result(self, trainer: pl.Trainer, *, num_examples: int | None) -> Curvature:
        """Return the estimate on the first rank, or its parts on every rank. Collective.

        Args:
            trainer: The Trainer.
            num_examples: N; None takes what an epoch has shown.

        Raises:
            InputError: On every rank, when there is nothing to estimate from.
        """
        seen = max((steps.num_examples for steps in self.steps), default=0)
        total = num_examples or max(1, round(seen / max(1, trainer.current_epoch)))
        hessian: dict[str, Tensor] = {}
        with failing_together():
            if trainer.is_global_zero or self.sharded:
                hessian = self.hessian(trainer, num_examples=total)
        unused = list(zero_everywhere(hessian))
        return Curvature(hessian, total, seen, {"unused": unused, **self.notes()})

    def zeros(self) -> dict[str, Tensor]:
        """Return zeros for every wanted parameter that is trained."""
        return {
            name: torch.zeros_like(parameter, dtype=torch.float)
            for parameter, name in self.names.items()
            if parameter.requires_grad
        }

    def notes(self) -> dict[str, Any]:
        """Return more for ``expert.json``."""
        return {"num_steps": [steps.num_steps for steps in self.steps]}

    def counts(self) -> dict[str, Any]:
        """Return everything but tensors, as primitives."""
        return {"steps": [asdict(steps) for steps in self.steps]}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors without which a resumed fit could not go on."""
        return {}

    def resume(self, counts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`counts` and this process' part of :meth:`tensors`.

        An unfinished window is given up.
        """
        for steps, kept in zip(self.steps, counts["steps"], strict=True):
            for count in ("num_steps", "num_examples", "inverse_sizes"):
                setattr(steps, count, kept[count])


class SquaredSteps(StepCurvature):
    """Σ over the steps of B² ḡ², scaled from the examples seen to the N of the training set.

    Gradients are averaged over ranks and thus the same on all of them: only the first sums them up.
    Of sharded ones every rank has a part, and sums that up.
    """

    def __init__(self, trainer: pl.Trainer, names: Mapping[Parameter, str]) -> None:
        """See :class:`StepCurvature`."""
        super().__init__(trainer, names)
        agree = partial(true_everywhere, device=trainer.strategy.root_device)
        self._estimators = [
            SquaredBatchGradient(agree=agree if self.sharded else bool) for _ in trainer.optimizers
        ]

    def take(self, trainer: pl.Trainer, index: int, *, size: int, factor: float) -> None:
        """Square the gradients of the parameters that this optimizer holds."""
        if not (trainer.is_global_zero or self.sharded):
            return
        optimizer = trainer.optimizers[index]
        gradients = {
            self.names[parameter]: part_as(parameter.grad, parameter)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter in self.names and parameter.grad is not None
        }
        if not gradients:
            return
        factor /= _scale(trainer, optimizer)
        dense = [g.to_dense() if g.is_sparse else g for g in gradients.values()]
        if factor != 1:
            dense = list(torch._foreach_mul(dense, factor))
        self._estimators[index].update(dict(zip(gradients, dense, strict=True)), num_examples=size)

    def hessian(self, trainer: pl.Trainer, *, num_examples: int) -> dict[str, Tensor]:
        """Return the sums of all optimizers; parameters without any gradient have zeros.

        Raises:
            InputError: No step had finite gradients.
        """
        if not any(estimator.num_examples for estimator in self._estimators):
            raise InputError(
                f"gradients: must have been finite in at least one step; got {self._skipped} steps "
                'that were not, and no other. Use estimator "exact".'
            )
        result = self.zeros()
        for estimator in self._estimators:
            for name, total in estimator.sums().items():
                if name in result:
                    total.mul_(num_examples / estimator.num_examples)
                    result[name] = sharded_as(total, self.parameters[name])
        return result

    def notes(self) -> dict[str, Any]:
        """See :meth:`StepCurvature.notes`."""
        return {**super().notes(), "skipped_steps": self._skipped}

    @property
    def _skipped(self) -> int:
        return sum(estimator.skipped_steps for estimator in self._estimators)

    def counts(self) -> dict[str, Any]:
        """See :meth:`StepCurvature.counts`."""
        seen = [
            {"num_examples": estimator.num_examples, "skipped_steps": estimator.skipped_steps}
            for estimator in self._estimators
        ]
        return {**super().counts(), "seen": seen}

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums, each under the number of its optimizer and its name."""
        return {
            f"{index}.{name}": sharded_as(total, self.parameters[name])
            for index, estimator in enumerate(self._estimators)
            for name, total in estimator.sums().items()
        }

    def resume(self, counts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`StepCurvature.resume`."""
        super().resume(counts, tensors)
        for index, estimator in enumerate(self._estimators):
            own = {
                name.partition(".")[2]: total
                for name, total in tensors.items()
                if name.partition(".")[0] == str(index)
            }
            sums = {name: total.to(self.parameters[name].device) for name, total in own.items()}
            estimator.resume(sums, **counts["seen"][index])


class AdamSteps(StepCurvature):
    """Adam's second moment at the end, times N and the (harmonic) mean size of a step."""

    def take(self, trainer: pl.Trainer, index: int, *, size: int, factor: float) -> None:
        """Check, from the second step on, that the optimizer keeps a second moment."""
        state = trainer.optimizers[index].state
        if state and not any("exp_avg_sq" in kept for kept in state.values()):
            raise InputError(
                f'estimator: must not be "adam" with an optimizer that keeps no second moment; got '
                f"{type(trainer.optimizers[index]).__name__}. Use Adam or AdamW, or estimator "
                '"exact".'
            )

    def hessian(self, trainer: pl.Trainer, *, num_examples: int) -> dict[str, Tensor]:
        """Read the state of all optimizers; parameters that never had a gradient have zeros.

        Raises:
            InputError: An optimizer has no second moment.
        """
        result = self.zeros()
        for optimizer, steps in zip(trainer.optimizers, self.steps, strict=True):
            if steps.num_steps == 0:
                continue
            moved = {p: name for p, name in self.names.items() if p in optimizer.state}
            moments = adam_second_moment(optimizer, moved, num_examples=num_examples, batch_size=1)
            mean_size = steps.num_steps / steps.inverse_sizes
            result |= {name: moment.mul_(mean_size) for name, moment in moments.items()}
        return result


def _scale(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """Return what the gradients are still multiplied with when the hook sees them."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
