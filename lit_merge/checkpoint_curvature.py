"""The curvature of weights that were trained before: an expert folder from any checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_merge.callbacks.activation_statistics import gather_over_ranks
from lit_merge.callbacks.curvature_result import Curvature
from lit_merge.callbacks.expert_callback import require_one_of, require_positive
from lit_merge.callbacks.expert_folder import (
    describe,
    fingerprint_of,
    save_expert,
    weights_of,
    with_details,
)
from lit_merge.callbacks.layer_matrices import matrices_of
from lit_merge.callbacks.pass_settings import PassEstimatorName, PassSettings, default_labels
from lit_merge.callbacks.sharded_pass import pass_over
from lit_merge.callbacks.training_loss import TrainingLoss
from lit_merge.checkpoint import load_into, unwrapped
from lit_merge.correction.forward import attention_mask_of
from lit_merge.correction.sites import find_sites
from lit_merge.correction.statistics import to_tensors
from lit_merge.curvature.input_grams import LayerGrams
from lit_merge.curvature.kronecker import KroneckerFisher
from lit_merge.curvature.layer_matrices import LayerMatrices
from lit_merge.curvature.losses import Reduction
from lit_merge.curvature.objective import Labels
from lit_merge.curvature_pass import CurvaturePass, Measurement
from lit_merge.distributed import broadcast, failing_together, sharded_parameters
from lit_merge.errors import InputError
from lit_merge.expert.adapter import add_to_adapter, open_over, under_names
from lit_merge.expert.info import ExpertInfo, read_info
from lit_merge.output import require_free
from lit_merge.passes.data_pass import DataPass
from lit_merge.passes.glimpse import glimpse
from lit_merge.passes.unfinished import UnfinishedPass
from lit_merge.sharding import copy_into


def curvature_of_checkpoint(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    datamodule: pl.LightningDataModule | None = None,
    *,
    checkpoint: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    weights: Literal["averaged", "raw"] = "averaged",
    estimator: PassEstimatorName | Literal["none"] = "exact",
    labels: Labels | None = None,
    samples: int = 1,
    reduction: Reduction = "loss",
    max_examples: int | None = None,
    parameters: list[str] | None = None,
    gram: bool = False,
    kronecker: bool = False,
    sites: str | list[str] | None = None,
    max_activation_examples: int | None = 512,
    batch_size: int | None = None,
    task: str | None = None,
    seed: int = 0,
    save_every: float | None = 60.0,
    replace: bool = False,
) -> Path:
    """Measure a checkpoint's curvature on the training examples, and write an expert folder.

    The pass is that of :class:`~lit_merge.callbacks.DiagonalHessian`. Where ``output`` is an expert
    folder of these very weights without curvature, the curvature is added to it; so a folder can be
    completed in place, also with matrices of its layers beside the diagonal (``estimator="none"``).

    A pass that is stopped half-way goes on where it was when it is started again with the same
    settings: the sums so far are in ``<output>.partial`` until the expert folder is written. One
    over sharded parameters begins again.

    Args:
        trainer: Any Trainer: its devices, strategy and precision are used. Its limits on batches
            have no effect.
        module: The module that was trained; its loss is ``curvature_loss`` or ``training_step``.
        datamodule: Where the training examples come from, from ``curvature_dataloader()`` or
            ``train_dataloader()``; None takes the module's.
        checkpoint: The weights: anything that :func:`~lit_merge.checkpoint.open_checkpoint` takes.
        output: The expert folder. Of an adapter it may be the adapter's own folder, to which the
            curvature of base plus adapter is added.
        base: What a PEFT LoRA adapter was trained on; None where the checkpoint is a whole model.
        weights: Which weights of a checkpoint that holds both the trained and the averaged ones.
        estimator: "exact" for the squared gradients of every example (the Fisher information), or
            "hutchinson" for an estimate of the diagonal of the true Hessian of the loss. "none"
            leaves the diagonal out, for what is asked for besides.
        labels: For "exact": "sampled" from the model's predictions, "expected" over all labels, at
            a pass per class, or "observed" in the data (the empirical Fisher). None is "sampled";
            the Hessian is of the loss with observed labels.
        samples: Labels drawn per example, or random vectors per batch; each costs a pass.
        reduction: "loss" takes the loss as it is; "mean" and "sum" put the terms of each example
            together first, for losses that are means over tokens of texts of different lengths.
        max_examples: A random subset of so many training examples, on all ranks together; the sum
            is scaled from it to all of them. None takes all.
        parameters: Patterns over the names of the parameters wanted; None for all that are trained.
        gram: Whether to gather the Gram matrices of the layers' inputs as well, as
            :class:`~lit_merge.callbacks.InputGrams` does, in a pass of their own.
        kronecker: Whether to gather Kronecker factors of the Fisher information as well, as
            :class:`~lit_merge.callbacks.KroneckerFactors` does, with these labels, in a pass of
            their own.
        sites: Where to gather activation statistics as well, as for
            :class:`~lit_merge.callbacks.ActivationStatistics`; None gathers none.
        max_activation_examples: How many examples these are gathered on; None takes all.
        batch_size: Examples per batch and rank; None takes the training loader's.
        task: Name of the task, for ``expert.json``.
        seed: Chooses examples and samples labels.
        save_every: Seconds after which the sums so far are written aside; they become more where
            writing takes long. None writes nothing, and does not look for what was written.
        replace: Whether an existing folder, or the curvature in it, may be replaced, and what is
            left of a pass with other settings.

    Returns:
        The expert folder.

    Raises:
        InputError: A setting cannot be, the weights do not fit the module, the module cannot be
            measured, or the folder may not be written.
    """
    require_one_of("weights", weights, ("averaged", "raw"))
    for name, value in (
        ("max_examples", max_examples),
        ("max_activation_examples", max_activation_examples),
        ("batch_size", batch_size),
    ):
        require_positive(name, value)
    if save_every is not None and not save_every >= 0:
        raise InputError(
            f"save_every: must be a number of seconds, or None; got {save_every!r}. 60 is usual."
        )
    require_one_of("estimator", estimator, (*get_args(PassEstimatorName), "none"))
    if estimator == "none" and not (gram or kronecker or sites):
        raise InputError(
            'estimator: must be "exact" or "hutchinson" where nothing else is to be gathered; got '
            '"none" without gram, kronecker and sites. Ask for one of them.'
        )
    pass_estimator: PassEstimatorName = "exact" if estimator == "none" else estimator
    measurement = _CheckpointCurvature(
        checkpoint=Path(checkpoint),
        output=Path(output),
        base=base,
        weights=weights,
        settings=PassSettings(
            estimator=pass_estimator,
            labels=default_labels(pass_estimator, labels),
            samples=samples,
            reduction=reduction,
            parameters=None if parameters is None else tuple(parameters),
            seed=seed,
        ),
        diagonal=estimator != "none",
        gram=gram,
        kronecker=kronecker,
        max_examples=max_examples,
        sites=tuple(sites) if isinstance(sites, list) else sites,
        max_activation_examples=max_activation_examples,
        batch_size=batch_size,
        task=task,
        save_every=save_every,
        replace=replace,
    )
    with open_over(checkpoint, base, weights=weights):  # before processes are started
        pass
    if measurement.beside_adapter:
        measurement.require_no_curvature()
    elif measurement.info_there() is None:
        measurement.require_room()
    CurvaturePass(module, datamodule, measurement).launch(trainer)
    return measurement.output


@dataclass(frozen=True)
class _CheckpointCurvature(Measurement):
    """The arguments of :func:`curvature_of_checkpoint`, and what they mean in every process."""

    takes_shards: ClassVar[bool] = True

    checkpoint: Path
    output: Path
    base: str | Path | None
    weights: Literal["averaged", "raw"]
    settings: PassSettings
    diagonal: bool
    gram: bool
    kronecker: bool
    max_examples: int | None
    sites: str | tuple[str, ...] | None
    max_activation_examples: int | None
    batch_size: int | None
    task: str | None
    save_every: float | None
    replace: bool

    @property
    def beside_adapter(self) -> bool:
        """Whether the curvature goes into the folder of the adapter that is measured."""
        return self.base is not None and self.output.resolve() == self.checkpoint.resolve()

    def load(self, module: pl.LightningModule) -> None:
        """Load the checkpoint."""
        with open_over(self.checkpoint, self.base, weights=self.weights) as (checkpoint, base):
            # An older checkpoint may hold buffers that the module does not save (position_ids).
            buffers = (unwrapped(name) for name, _ in module.named_buffers())
            named = under_names(checkpoint, base, (*weights_of(module), *buffers))
            load_into(module, named, copy=copy_into)

    def run(self, step: CurvaturePass) -> None:
        """Measure on every rank, and write on the first."""
        trainer, module = step.trainer, step.module
        weights = fingerprint_of(module)
        with failing_together():
            self._check_whole(module)
            if trainer.is_global_zero:
                self.joins(weights)
        described = describe(module)
        loss = TrainingLoss(trainer, module)
        sites = (
            None
            if self.sites is None
            else find_sites(module, where=self.sites, exclude=described.head_parameters)
        )
        info = with_details(described, checkpoint=str(self.checkpoint), weights=self.weights)
        info = replace(info, task=self.task)
        artifacts: dict[str, dict[str, Tensor]] = {}
        unfinished = None
        if self.diagonal:
            found, unfinished = self._diagonal(step, loss, weights)
            artifacts["hessian"] = found.hessian
            info = self._with_curvature(info, found, precision=str(trainer.precision))
        for kind, measured in self._estimators(module, loss).items():
            artifacts[kind], details = self._matrices(step, measured, kind)
            info = with_details(info, **{kind: details})
        if sites is not None:
            seed = self.settings.seed
            examples = self._examples(step, self.max_activation_examples)
            statistics = gather_over_ranks(trainer, module, examples, sites, loss=loss, seed=seed)
            artifacts["activations"] = to_tensors(statistics)
        base = self.base
        if base is not None and self.beside_adapter:
            with failing_together():
                if trainer.is_global_zero:
                    names = weights_of(module)
                    add_to_adapter(self.output, base, info=info, names=names, artifacts=artifacts)
        else:
            join = False
            with failing_together():
                if trainer.is_global_zero:
                    join = self.joins(weights)
            save_expert(
                self.output,
                module=module,
                info=info,
                join=broadcast(join),
                replace_folder=self.replace,
                **artifacts,
            )
        if unfinished is not None:
            unfinished.remove()
        rank_zero_info(f"Wrote {self.output}")

    def _examples(self, step: CurvaturePass, most: int | None) -> DataPass:
        return step.examples(max_examples=most, batch_size=self.batch_size, seed=self.settings.seed)

    def _diagonal(
        self, step: CurvaturePass, loss: TrainingLoss, weights: str
    ) -> tuple[Curvature, UnfinishedPass | None]:
        data = self._examples(step, self.max_examples)
        unfinished = self.unfinished(step, data, weights)
        measuring = pass_over(step.trainer, step.module, loss=loss, settings=self.settings)
        return measuring.run(data, unfinished=unfinished), unfinished

    def _with_curvature(self, info: ExpertInfo, found: Curvature, *, precision: str) -> ExpertInfo:
        info = replace(
            info,
            estimator=self.settings.estimator,
            labels=self.settings.labels,
            num_examples=found.num_examples,
        )
        settings = {"max_examples": self.max_examples, "precision": precision}
        return with_details(info, curvature={**settings, **found.details()})

    def _estimators(
        self, module: pl.LightningModule, loss: TrainingLoss
    ) -> dict[str, LayerMatrices]:
        """Return what gathers the matrices that are asked for, by kind."""
        estimators: dict[str, LayerMatrices] = {}
        names = self.settings.names(module)
        if self.gram:
            estimators["gram"] = LayerGrams(module, loss, parameters=names, mask=attention_mask_of)
        if self.kronecker:
            fisher = {**self.settings.of_fisher(module), "mask": attention_mask_of}
            estimators["kronecker"] = KroneckerFisher(module, loss, **fisher)
        return estimators

    def _matrices(
        self, step: CurvaturePass, measured: LayerMatrices, kind: str
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        data = self._examples(step, self.max_examples)
        title = {"gram": "Input Grams", "kronecker": "Kronecker factors"}[kind]
        seed = self.settings.seed
        found, details = matrices_of(step.trainer, step.module, data, measured, title, seed=seed)
        settings = {"max_examples": self.max_examples, **self.settings.details()}
        if kind == "kronecker":
            settings["labels"] = self.settings.labels
        return found, {**details, **settings}

    def unfinished(
        self, step: CurvaturePass, data: DataPass, weights: str
    ) -> UnfinishedPass | None:
        """Return where this pass may be gone on with, None if it may not. Collective."""
        # Of sharded sums the ranks would have to write their parts after the very same batch.
        if self.save_every is None or sharded_parameters(step.module):
            return None
        trainer = step.trainer
        with failing_together():
            settings = {
                "weights": weights,
                "estimator": self.settings.estimator,
                "labels": self.settings.labels,
                **self.settings.details(),
                "max_examples": self.max_examples,
                "precision": str(trainer.precision),
                **data.plan(),
                "first_examples": glimpse(data, seed=self.settings.seed) if data.indexed else {},
            }
        return UnfinishedPass(
            self.output.with_name(f"{self.output.name}.partial"),
            rank=trainer.global_rank,
            settings=settings,
            every=self.save_every,
            replace=self.replace,
        )

    def info_there(self) -> ExpertInfo | None:
        """Return what is known of the expert in the output folder, None without one."""
        path = self.output / "expert.json"
        return read_info(path) if path.is_file() else None

    def _check_whole(self, module: pl.LightningModule) -> None:
        if (self.gram or self.kronecker) and sharded_parameters(module):
            raise InputError(
                "gram and kronecker: must be false where parameters are sharded; got true. Gather "
                'matrices of layers with strategy="ddp" or a single device.'
            )
        if self.sites is not None and sharded_parameters(module):
            raise InputError(
                f"sites: must be None where parameters are sharded; got {self.sites!r}. Gather "
                'activation statistics with strategy="ddp" or a single device.'
            )

    def joins(self, weights: str) -> bool:
        """Return whether the output is an expert folder of weights with this fingerprint.

        Raises:
            InputError: Something else is there, or curvature that may not be replaced.
        """
        there = self.info_there()
        if not self.beside_adapter and (there is None or there.fingerprint != weights):
            self.require_room()
            return False
        self.require_no_curvature()
        return True

    def require_no_curvature(self) -> None:
        """Raise if the output has curvature of the kinds that are gathered, unless to replace it.

        Raises:
            InputError: It has.
        """
        kinds = {"hessian": self.diagonal, "gram": self.gram, "kronecker": self.kronecker}
        for file in (self.output / f"{kind}.safetensors" for kind, new in kinds.items() if new):
            if file.exists() and not self.replace:
                raise InputError(
                    f"{file}: must not exist yet; got curvature of these weights. Name another "
                    "output folder, or ask to replace it."
                )

    def require_room(self) -> None:
        """Raise unless an expert folder may be written, and the checkpoint is not in it.

        Raises:
            InputError: It may not.
        """
        require_free(self.output, replace=self.replace)
        checkpoint = self.checkpoint.resolve()
        if self.output.resolve() in (checkpoint, *checkpoint.parents):
            raise InputError(
                f"output: must not be replaced while {self.checkpoint} lies in it; got "
                f"{self.output}. Name another output folder."
            )
