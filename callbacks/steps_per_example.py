"""Curvature from the examples of training steps: exact squares, without a pass of their own.

Every n-th micro-batch of the last part of a fit is watched by
:class:`~lit_merge.curvature.FisherBesideTraining`, from before its forward until after its
backward. Each rank squares the gradients of its own examples, before anything is averaged; the
ranks' sums are added up at the end, and for a checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lit_merge.callbacks.curvature_result import Curvature
from lit_merge.callbacks.step_curvature import StepCurvature
from lit_merge.callbacks.training_loss import TrainingLoss, without_trace
from lit_merge.callbacks.watching import PASS, Watching, compare_in_training, require_watchable
from lit_merge.curvature import CurvatureWarning, FisherBesideTraining, take_examples
from lit_merge.distributed import sum_number, sum_over_ranks
from lit_merge.errors import InputError
from lit_merge.passes.data_pass import DataPass
from lit_merge.passes.on_device import to_device


class ExampleSteps(StepCurvature):
    """Σ (∂ℓ_n/∂θ)² over the watched examples, scaled from their number to N."""

    def __init__(
        self, trainer: pl.Trainer, names: Mapping[Parameter, str], *, watching: Watching
    ) -> None:
        """See :class:`StepCurvature`.

        Raises:
            InputError: The steps of this Trainer or module cannot be watched.
        """
        super().__init__(trainer, names)
        self._module = trainer.lightning_module
        require_watchable(trainer, self._module)
        self._watching = watching
        self._norms = [
            (name, module)
            for name, module in self._module.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        self._is_first = trainer.is_global_zero
        self._device = trainer.strategy.root_device
        self._first_step = 0
        self._offered = 0
        self._watched = 0
        self._trained: list[str] | None = None
        self._estimator: FisherBesideTraining | None = None
        self._listening = ExitStack()
        self._before: dict[str, Tensor] = {}
        self._num_before = 0
        self._num_seen = 0
        self._whole: dict[str, Tensor] = {}

    @property
    def num_batches(self) -> int:
        """See :attr:`StepCurvature.num_batches`."""
        return self._watched

    def look(self, trainer: pl.Trainer, data: DataPass, *, seed: int) -> None:
        """Compare with plain gradients on a few examples; leave no trace. Collective.

        Raises:
            InputError: The length of the fit is unknown, or the loss or the module cannot be
                watched.
        """
        self._first_step = self._watching.first_step(trainer)
        names = [name for name, p in self.parameters.items() if p.requires_grad]
        with without_trace(self._module, seed=seed), warnings.catch_warnings():
            warnings.simplefilter("ignore", CurvatureWarning)  # what they name is refused
            loss = TrainingLoss(trainer, self._module, own=False)
            few = to_device(trainer, data.first_few())
            FisherBesideTraining(self._module, parameters=names).try_out(few, loss)
            with self._running_statistics():
                compare_in_training(self._module, loss, take_examples(few, [0]), names)

    def on_batch(self, trainer: pl.Trainer, batch: Any) -> None:
        """Begin to watch a micro-batch, if it is one of those.

        Raises:
            InputError: Layers use statistics of the batch, or other parameters are trained than in
                the first watched batch.
        """
        super().on_batch(trainer, batch)
        self.cancel()
        self._require_running_statistics()
        if trainer.global_step < self._first_step:
            return
        self._offered += 1
        if (self._offered - 1) % self._watching.every_n_batches:
            return
        estimator = self._estimator_of_trained()
        # Compiled functions cannot be looked into.
        self._listening.enter_context(torch.compiler.set_stance("force_eager"))
        # Lightning divides by this also in the last window of an epoch, however short.
        estimator.start(batch, loss_scale=1 / trainer.accumulate_grad_batches)

    def on_loss(self) -> None:
        """See :meth:`StepCurvature.on_loss`."""
        if self._estimator is not None:
            self._estimator.end_forward()

    def on_backward(self) -> None:
        """Take what the backward of a watched micro-batch has given.

        Raises:
            InputError: A parameter cannot be computed for all examples at once.
        """
        super().on_backward()
        if self._estimator is None:
            return
        self._listening.close()
        before = self._estimator.num_examples
        self._estimator.stop()
        self._watched += self._estimator.num_examples > before

    def cancel(self) -> None:
        """See :meth:`StepCurvature.cancel`."""
        self._listening.close()
        if self._estimator is not None:
            self._estimator.cancel()

    def take(self, trainer: pl.Trainer, index: int, *, size: int, factor: float) -> None:
        """Leave the mean gradient of a step alone."""

    def result(self, trainer: pl.Trainer, *, num_examples: int | None) -> Curvature:
        """See :meth:`StepCurvature.result`."""
        self._num_seen = sum_number(self._num_here)
        self._whole = self._sums_of_all()
        found = super().result(trainer, num_examples=num_examples)
        return replace(found, num_seen=self._num_seen)

    def hessian(self, trainer: pl.Trainer, *, num_examples: int) -> dict[str, Tensor]:
        """Return the sums of all ranks, scaled.

        Raises:
            InputError: No batch was watched, or a sum is not finite.
        """
        if not self._num_seen:
            raise InputError(
                "last_part: must begin before training ends; got a fit that ended after "
                f"{trainer.global_step} optimizer steps, {self._first_step} before the watched "
                'part, with nothing measured. Run "lit-merge curvature" on its checkpoint; next '
                "time set a larger last_part where training may stop early."
            )
        for name, total in self._whole.items():
            if not total.isfinite().all():
                raise InputError(
                    f"{name}: must have finite squared gradients; got NaN or Inf from a watched "
                    'batch. Run "lit-merge curvature" on the checkpoint, without the examples that '
                    "it names."
                )
        scale = num_examples / self._num_seen
        return {name: total * scale for name, total in self._whole.items()}

    def notes(self) -> dict[str, Any]:
        """See :meth:`StepCurvature.notes`."""
        return {**super().notes(), **asdict(self._watching), "num_batches": self._watched}

    def counts(self) -> dict[str, Any]:
        """See :meth:`StepCurvature.counts`. Collective."""
        return {
            **super().counts(),
            "offered": self._offered,
            "watched": self._watched,
            "trained": self._trained,
            "num_seen": sum_number(self._num_here),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums of all ranks, on the first. Collective."""
        sums = self._sums_of_all()
        return {f"0.{name}": total for name, total in sums.items()} if self._is_first else {}

    def resume(self, counts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See :meth:`StepCurvature.resume`."""
        super().resume(counts, tensors)
        self._offered, self._watched = counts["offered"], counts["watched"]
        self._trained = counts["trained"]
        if self._is_first:
            self._num_before = counts["num_seen"]
            self._before = {name.partition(".")[2]: total for name, total in tensors.items()}

    @property
    def _num_here(self) -> int:
        own = 0 if self._estimator is None else self._estimator.num_examples
        return self._num_before + own

    def _sums_of_all(self) -> dict[str, Tensor]:
        """Return the sums over the examples of all ranks, on every rank. Collective."""
        own = {} if self._estimator is None else self._estimator.sums()
        for name, total in self._before.items():
            own[name] = own[name] + total.to(own[name].device) if name in own else total
        return sum_over_ranks(own, device=self._device)

    def _estimator_of_trained(self) -> FisherBesideTraining:
        """Return the estimator, which is of the parameters trained when watching begins."""
        trained = [name for name, p in self.parameters.items() if p.requires_grad]
        if self._trained is not None and trained != self._trained:
            changed = sorted(set(trained) ^ set(self._trained))
            raise InputError(
                "last_part: must hold no step at which parameters are frozen or unfrozen, whose "
                f"sums would be over other examples; got {changed[0]} at such a step. Set a "
                f"smaller last_part. Or: {PASS}"
            )
        self._trained = trained
        if self._estimator is None:
            self._estimator = FisherBesideTraining(self._module, parameters=trained)
        return self._estimator

    def _require_running_statistics(self) -> None:
        for name, module in self._norms:
            if module.training:
                raise InputError(
                    f"{name}: must not take its statistics from the batch, because they mix the "
                    f"gradients of its examples; got {type(module).__name__} in train mode. Call "
                    "its eval() in on_train_epoch_start, to train with running statistics. Or: "
                    f"{PASS}"
                )

    @contextmanager
    def _running_statistics(self) -> Iterator[None]:
        """Put BatchNorm into eval mode, as it will be when the first epoch has begun."""
        modes = [(module, module.training) for _, module in self._norms]
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
