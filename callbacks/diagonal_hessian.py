"""The curvature of an expert, gathered while it trains: what a merge weighs its weights with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_merge.callbacks.exact_diagonal import ExactPass
from lit_merge.callbacks.expert_callback import ExpertCallback, require_one_of
from lit_merge.callbacks.expert_folder import describe, with_details
from lit_merge.callbacks.pass_settings import PassSettings, chosen_parameters, default_labels
from lit_merge.callbacks.sharded_pass import pass_over
from lit_merge.callbacks.step_artifact import file_name, load_sums, remove_unused, save_sums
from lit_merge.callbacks.step_curvature import AdamSteps, SquaredSteps, StepCurvature
from lit_merge.callbacks.steps_per_example import ExampleSteps
from lit_merge.callbacks.training_loss import TrainingLoss
from lit_merge.callbacks.watching import Watching
from lit_merge.curvature.losses import Reduction
from lit_merge.curvature.objective import Labels
from lit_merge.distributed import failing_together, gather
from lit_merge.errors import InputError

_FROM_STEPS: dict[str, type[StepCurvature]] = {
    "squared-batch-gradient": SquaredSteps,
    "adam": AdamSteps,
}
_IN_TRAINING = "exact-in-training"


class DiagonalHessian(ExpertCallback):
    """Write an expert folder with the diagonal curvature of the trained weights.

    The curvature of a weight is Σ over the training examples of its squared per-example gradient
    (the diagonal of the Fisher information). The estimators:

    - "exact": a pass over the training data when training ends, every rank its own examples. Before
      training begins, a few examples are tried out, so that what cannot be measured fails early.
    - "hutchinson": a pass as well, for an estimate of the diagonal of the loss's true Hessian, its
      negative entries put to zero; see :class:`~lit_merge.curvature.hutchinson.HessianDiagonal`.
    - "exact-in-training": the same squares with observed labels, from training steps themselves:
      every n-th micro-batch of the last part of the fit is watched, which makes its forward and
      backward about half as expensive again. An average along that part of the path; no pass of
      its own. Needs automatic optimization, whole parameters, frozen BatchNorm statistics, and a
      model that is neither compiled nor trained in 16-mixed; every parameter must be one that is
      computed for all examples at once.
    - "squared-batch-gradient": from the gradients of the steps, at almost no cost. An average along
      the whole path of training, right in expectation near its end; observed labels.
    - "adam": from the second moment that Adam keeps anyway, at no cost; see
      :func:`~lit_merge.curvature.adam_second_moment` for what is in it.

    The weights are written with it, to ``<folder of the checkpoints>/expert``. Put the callback
    after a ``WeightAveraging``, and it measures and writes the averaged weights. Training itself is
    bit by bit what it would be without the callback, except for "exact-in-training", with which it
    is the same but for rounding. The loss of a pass is ``curvature_loss(batch)`` where the module
    defines it, else what ``training_step`` returns; it must be the mean over the examples. The
    examples are those of ``curvature_dataloader()`` where module or data module define it, else
    those of the training loader (:mod:`lit_merge.passes.training_examples` says which).

    Parameters may be sharded with FSDP2 or tensor parallelism, except for "hutchinson" and
    "exact-in-training": sums stay in the same shards, and the folder is written whole.

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
        estimator: Literal[
            "exact", "hutchinson", "exact-in-training", "squared-batch-gradient", "adam"
        ] = "exact",
        labels: Labels | None = None,
        samples: int = 1,
        reduction: Reduction = "loss",
        max_examples: int | None = None,
        parameters: list[str] | None = None,
        weights: Literal["last", "best"] = "last",
        output: str | None = None,
        replace: bool = False,
        task: str | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        every_n_batches: int = 1,
        last_part: float = 0.1,
    ) -> None:
        """Configure the callback; all of it can stand in a YAML file.

        Args:
            estimator: Where the curvature comes from.
            labels: For "exact": "sampled" from the model's predictions (the Fisher information),
                "expected" over all labels (the same without sampling, at a pass per class), or
                "observed" in the data (the empirical Fisher). None is "sampled"; all other
                estimators have observed labels.
            samples: Labels drawn per example, or random vectors per batch; each costs a pass.
            reduction: For a pass: "loss" takes the loss as it is; "mean" and "sum" put the terms of
                each example together first, for losses that are means over the tokens of texts of
                different lengths.
            max_examples: For a pass: a random subset of so many training examples, on all ranks
                together; the sum is scaled from it to all of them. None takes all.
            parameters: Patterns over the names of the parameters wanted; None for all that are
                trained. A merge treats the others as task arithmetic does.
            weights: For a pass: "last", or "best" for those of the ``ModelCheckpoint``'s best
                checkpoint.
            output: The expert folder; None is ``expert`` in the folder of the checkpoints.
            replace: Whether an existing folder may be replaced. That of the same run always may,
                when the fit is resumed from one of its checkpoints.
            task: Name of the task, for ``expert.json``.
            seed: Chooses examples and samples labels.
            batch_size: For a pass: examples per batch and rank; None takes the training loader's.
                The result does not depend on it.
            every_n_batches: For "exact-in-training": of the micro-batches of a rank in the last
                part of the fit, every so manyeth is watched.
            last_part: For "exact-in-training": how much of the planned optimizer steps is watched,
                from the end, in (0, 1]; must be 1 where nobody knows how many there will be.

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
        require_one_of("estimator", estimator, ("exact", "hutchinson", *_FROM_STEPS, _IN_TRAINING))
        self.estimator = estimator
        self.labels: Labels = default_labels(estimator, labels)
        self.parameters = parameters
        self._settings: PassSettings | None = None
        self._watching: Watching | None = None
        if estimator == "exact" or estimator == "hutchinson":
            self._settings = PassSettings(
                estimator=estimator,
                labels=self.labels,
                samples=samples,
                reduction=reduction,
                parameters=None if parameters is None else tuple(parameters),
                seed=seed,
            )
        else:
            _require_exact("labels", self.labels, "observed", estimator)
            _require_exact("samples", samples, 1, estimator)
            _require_exact("reduction", reduction, "loss", estimator)
            _require_exact("weights", weights, "last", estimator)
            _require_exact("max_examples", max_examples, None, estimator)
            _require_exact("batch_size", batch_size, None, estimator)
        if estimator == _IN_TRAINING:
            self._watching = Watching(every_n_batches=every_n_batches, last_part=last_part)
        else:
            _require_not_watching("every_n_batches", every_n_batches, 1, estimator)
            _require_not_watching("last_part", last_part, 0.1, estimator)
        self._steps: StepCurvature | None = None
        self._kept: dict[str, Any] | None = None
        self._saved: Path | None = None

    @property
    def state_key(self) -> str:
        """One state per estimator, so that several can be compared in one fit."""
        return self._generate_state_key(estimator=self.estimator)

    @property
    def takes_shards(self) -> bool:
        """All but the Hessian and what watches training can do with parts of the parameters."""
        return self.estimator == "exact" or self.estimator in _FROM_STEPS

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
        if self._settings is not None:
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
        if self._watching is not None:
            self._steps = ExampleSteps(trainer, names, watching=self._watching)
        else:
            self._steps = _FROM_STEPS[self.estimator](trainer, names)
        self._restore(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See :meth:`ExpertCallback.on_train_start`."""
        super().on_train_start(trainer, pl_module)
        self._restore(trainer)  # where the checkpoint was loaded after on_fit_start

    def look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Find the training examples, and try out a few where there will be a pass.

        Raises:
            InputError: The loss, the module or the data cannot be measured.
        """
        data = self.examples(trainer, module)
        if self._settings is not None:
            self._pass(trainer, module, self._settings).try_out(data)
        if self._steps is not None:
            self._steps.look(trainer, data, seed=self.seed)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Learn how many examples a micro-batch has."""
        if self._steps is not None:
            self._steps.on_batch(trainer, batch)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Learn that the forward is done."""
        if self._steps is not None:
            self._steps.on_loss()

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

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Give up a micro-batch without a loss."""
        if self._steps is not None:
            self._steps.cancel()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give up a micro-batch that the module has declined."""
        if self._steps is not None:
            self._steps.cancel()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Give up a micro-batch that has failed."""
        if self._steps is not None:
            self._steps.cancel()
        super().on_exception(trainer, pl_module, exception)

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure on every rank, and write on the first."""
        data = self.examples(trainer, module)
        if self._settings is not None:
            found = self._pass(trainer, module, self._settings).run(data)
        else:
            assert self._steps is not None, "made in on_fit_start"
            found = self._steps.result(trainer, num_examples=data.num_examples)
        info = replace(
            describe(module),
            estimator=self.estimator,
            labels=self.labels,
            num_examples=found.num_examples,
        )
        settings = {
            "parameters": self.parameters,
            "seed": self.seed,
            "max_examples": self.max_examples,
            "precision": str(trainer.precision),
        }
        curvature = {**settings, **found.details()}
        info = with_details(info, **self.details(trainer), curvature=curvature)
        self.save(trainer, module, info, hessian=found.hessian)
        if found.quality is not None:
            rank_zero_info(f"{type(self).__name__}: {found.quality}")

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
        path = folder / file_name(self.estimator, trainer.global_step, self._steps.num_batches)
        state["steps"] |= {"file": path.name, "folder": str(folder.resolve())}
        if path != self._saved:  # several ModelCheckpoints may save one step
            if trainer.is_global_zero:
                remove_unused(folder, estimator=self.estimator, state_key=self.state_key)
            save_sums(path, sums, run=state["run"])
            self._saved = path

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the run of a checkpoint."""
        super().load_state_dict(state_dict)
        self._kept = state_dict.get("steps")

    def _pass(
        self, trainer: pl.Trainer, module: pl.LightningModule, settings: PassSettings
    ) -> ExactPass:
        return pass_over(trainer, module, loss=TrainingLoss(trainer, module), settings=settings)

    def _restore(self, trainer: pl.Trainer) -> None:
        """Go on once with the sums of a checkpoint, on the ranks that have any."""
        steps, kept, self._kept = self._steps, self._kept, None
        if steps is None or kept is None:
            return
        sums: dict[str, Tensor] | None = {}
        with failing_together():
            if kept["file"] is not None and (trainer.is_global_zero or steps.sharded):
                folders = [Path(str(trainer.ckpt_path)).parent, Path(kept["folder"])]
                sums = load_sums(
                    kept["file"], folders, run=str(self.run), parameters=steps.parameters
                )
        if any(gather(sums is None)):
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


def _require_not_watching(name: str, value: object, default: object, estimator: str) -> None:
    if value != default:
        raise InputError(
            f'{name}: must be {default!r} with estimator "{estimator}", which watches no batches '
            f'in training; got {value!r}. Leave it out, or use estimator "{_IN_TRAINING}".'
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
