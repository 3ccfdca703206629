"""The curvature of an expert, gathered while it trains: what a merge weighs its weights with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_merge.callbacks.exact_diagonal import ExactPass, chosen_parameters
from lit_merge.callbacks.expert_callback import ExpertCallback, require_one_of
from lit_merge.callbacks.expert_folder import describe, with_details
from lit_merge.callbacks.step_artifact import file_name, load_sums, remove_unused, save_sums
from lit_merge.callbacks.step_curvature import AdamSteps, SquaredSteps, StepCurvature
from lit_merge.callbacks.training_loss import TrainingLoss
from lit_merge.curvature import batch_size_of
from lit_merge.distributed import broadcast, failing_together
from lit_merge.errors import InputError

_FROM_STEPS: dict[str, type[StepCurvature]] = {
    "squared-batch-gradient": SquaredSteps,
    "adam": AdamSteps,
}


class DiagonalHessian(ExpertCallback):
    """Write an expert folder with the diagonal curvature of the trained weights.

    The curvature of a weight is Σ over the training examples of its squared per-example gradient
    (the diagonal of the Fisher information). Three estimators:

    - "exact": a pass over the training data when training ends, every rank its own examples. Before
      training begins, a few examples are tried out, so that what cannot be measured fails early.
    - "squared-batch-gradient": from the gradients of the steps, at almost no cost. An average along
      the whole path of training, right in expectation near its end; observed labels.
    - "adam": from the second moment that Adam keeps anyway, at no cost; see
      :func:`~lit_merge.curvature.adam_second_moment` for what is in it.

    The weights are written with it, to ``<folder of the checkpoints>/expert``. Put the callback
    after a ``WeightAveraging``, and it measures and writes the averaged weights. Training itself is
    bit by bit what it would be without the callback. The loss is ``curvature_loss(batch)`` where
    the module defines it, else what ``training_step`` returns; it must be the mean over the
    examples. The examples are those of ``curvature_dataloader()`` where module or data module
    define it, else those of the training loader (:mod:`lit_merge.passes.training_examples` says
    which).

    A fit can be resumed anywhere: estimators that follow its steps write their sums beside each
    checkpoint, into a file of their own, as large as the model.

    Nothing is written after a ``fast_dev_run``, an interrupted fit, or a fit without any step;
    ``lit-merge curvature`` measures checkpoints later.

    Example::

        trainer = L.Trainer(callbacks=[DiagonalHessian()])
        trainer.fit(module, datamodule)        # writes <checkpoint folder>/expert/
    """

    def __init__(
        self,
        *,
        estimator: Literal["exact", "squared-batch-gradient", "adam"] = "exact",
        labels: Literal["sampled", "observed"] | None = None,
        max_examples: int | None = None,
        parameters: list[str] | None = None,
        weights: Literal["last", "best"] = "last",
        output: str | None = None,
        replace: bool = False,
        task: str | None = None,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        """Configure the callback; all of it can stand in a YAML file.

        Args:
            estimator: Where the curvature comes from.
            labels: "sampled" from the model's predictions (the Fisher information) or "observed" in
                the data (the empirical Fisher). None is "sampled" for "exact"; gradients of steps
                have observed labels.
            max_examples: For "exact": a random subset of so many training examples, on all ranks
                together; the sum is scaled from it to all of them. None takes all.
            parameters: Patterns over the names of the parameters wanted; None for all that are
                trained. A merge treats the others as task arithmetic does.
            weights: For "exact": "last", or "best" for those of the ``ModelCheckpoint``'s best
                checkpoint.
            output: The expert folder; None is ``expert`` in the folder of the checkpoints.
            replace: Whether an existing folder may be replaced. That of the same run always may,
                when the fit is resumed from one of its checkpoints.
            task: Name of the task, for ``expert.json``.
            seed: Chooses examples and samples labels.
            batch_size: For "exact": examples per batch and rank; None takes the training loader's.
                The result does not depend on it.

        Raises:
            InputError: A value cannot be, or does not go with the estimator.
        """
        super().__init__(
            weights=weights,
            max_examples=max_examples,
            batch_size=batch_size,
            output=output,
            replace=replace,
            task=task,
            seed=seed,
        )
        require_one_of("estimator", estimator, ("exact", *_FROM_STEPS))
        if labels is not None:
            require_one_of("labels", labels, ("sampled", "observed"))
        self.estimator = estimator
        self.labels: Literal["sampled", "observed"] = labels or (
            "sampled" if estimator == "exact" else "observed"
        )
        self.parameters = parameters
        if estimator != "exact":
            _require_exact("labels", self.labels, "observed", estimator)
            _require_exact("weights", weights, "last", estimator)
            _require_exact("max_examples", max_examples, None, estimator)
            _require_exact("batch_size", batch_size, None, estimator)
        self._steps: StepCurvature | None = None
        self._kept: dict[str, Any] | None = None
        self._saved: Path | None = None

    @property
    def state_key(self) -> str:
        """One state per estimator, so that several can be compared in one fit."""
        return self._generate_state_key(estimator=self.estimator)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See :meth:`ExpertCallback.setup`."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._steps = self._kept = self._saved = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check what can be checked, and go on where a resumed fit stopped.

        Raises:
            InputError: The fit could not end with an expert folder.
        """
        super().on_fit_start(trainer, pl_module)
        chosen = chosen_parameters(pl_module, self.parameters)
        if self.estimator == "exact":
            TrainingLoss(trainer, pl_module)
            return
        if trainer.strategy.handles_gradient_accumulation:
            raise InputError(
                f'estimator: must be "exact" with {type(trainer.strategy).__name__}, which keeps '
                f'the gradients of steps to itself; got "{self.estimator}". Use estimator "exact".'
            )
        if self.estimator == "adam":
            _check_adam(trainer)
        # Also those that are frozen now: finetuning callbacks unfreeze layers later.
        names = {p: n for n, p in pl_module.named_parameters() if chosen is None or n in chosen}
        self._steps = _FROM_STEPS[self.estimator](trainer, names)
        if self._kept is not None:
            self._restore(trainer, self._steps, self._kept)

    def look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Find the training examples, and for "exact" try out a few.

        Raises:
            InputError: The loss, the module or the data cannot be measured.
        """
        data = self.examples(trainer, module)
        if self.estimator == "exact":
            self._pass(trainer, module).try_out(data)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Learn how many examples a micro-batch has."""
        if self._steps is not None:
            self._steps.on_batch(batch_size_of(batch))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count them, as they have given gradients."""
        if self._steps is not None:
            self._steps.on_backward()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the gradients of a step, before they are clipped."""
        if self._steps is not None:
            self._steps.on_step(trainer, optimizer)

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure on every rank, and write on the first."""
        data = self.examples(trainer, module)
        if self._steps is None:
            found = self._pass(trainer, module).run(data)
        else:
            found = self._steps.result(trainer, num_examples=data.num_examples)
        info = replace(
            describe(module),
            estimator=self.estimator,
            labels=self.labels,
            num_examples=found.num_examples,
        )
        settings = {
            "parameters": self.parameters,
            "max_examples": self.max_examples,
            "seed": self.seed,
            "precision": str(trainer.precision),
        }
        curvature = {"num_seen": found.num_seen, **settings, **found.notes}
        info = with_details(info, **self.details(trainer), curvature=curvature)
        self.save(trainer, module, info, hessian=found.hessian)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the sums beside the checkpoint, and only counts and their file's name into it."""
        if self._steps is None:
            return
        state = checkpoint["callbacks"][self.state_key]
        state["steps"] = {**self._steps.counts(), "file": None, "folder": None}
        sums = self._steps.tensors()
        if not sums:
            return
        folder = self.checkpoint_folder(trainer)
        path = folder / file_name(self.estimator, trainer.global_step)
        state["steps"] |= {"file": path.name, "folder": str(folder.resolve())}
        if path != self._saved:  # several ModelCheckpoints may save one step
            remove_unused(folder, estimator=self.estimator, state_key=self.state_key)
            save_sums(path, sums, run=state["run"])
            self._saved = path

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the run of a checkpoint."""
        super().load_state_dict(state_dict)
        self._kept = state_dict.get("steps")

    def _pass(self, trainer: pl.Trainer, module: pl.LightningModule) -> ExactPass:
        return ExactPass(
            trainer,
            module,
            loss=TrainingLoss(trainer, module),
            labels=self.labels,
            parameters=chosen_parameters(module, self.parameters),
            seed=self.seed,
        )

    def _restore(self, trainer: pl.Trainer, steps: StepCurvature, kept: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint; the first rank is the only one that has any."""
        sums: dict[str, Tensor] | None = {}
        with failing_together():
            if kept["file"] is not None and trainer.is_global_zero:
                folders = [Path(str(trainer.ckpt_path)).parent, Path(kept["folder"])]
                shapes = {name: parameter.shape for parameter, name in steps.names.items()}
                sums = load_sums(kept["file"], folders, run=str(self.run), shapes=shapes)
        if broadcast(sums is None):
            rank_zero_warn(
                f"{type(self).__name__}: the sums of the resumed fit are missing: no "
                f"{kept['file']} of this run beside {trainer.ckpt_path} or in {kept['folder']}. "
                "The curvature now begins again, from the steps that follow."
            )
            return
        steps.resume(kept, sums or {})


def _require_exact(name: str, value: object, default: object, estimator: str) -> None:
    if value != default:
        raise InputError(
            f'{name}: must be {default!r} with estimator "{estimator}", which makes no pass over '
            f'the data; got {value!r}. Leave it out, or use estimator "exact".'
        )


def _check_adam(trainer: pl.Trainer) -> None:
    for optimizer in trainer.optimizers:
        kind = type(optimizer).__name__
        if hasattr(optimizer, "consolidate_state_dict") or "betas" not in optimizer.param_groups[0]:
            raise InputError(
                'estimator: must be another one than "adam" without an Adam optimizer whose whole '
                f'state is on every rank; got {kind}. Use Adam or AdamW, or estimator "exact".'
            )
    if trainer.gradient_clip_val:
        rank_zero_warn(
            "DiagonalHessian: Adam's second moment is of clipped gradients "
            f"(gradient_clip_val={trainer.gradient_clip_val}), so this curvature is too small "
            'wherever they were clipped. Use estimator "squared-batch-gradient" or "exact".'
        )
