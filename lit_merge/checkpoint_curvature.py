"""The curvature of weights that were trained before: an expert folder from any checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lit_merge.callbacks.activation_statistics import gather_over_ranks
from lit_merge.callbacks.exact_diagonal import ExactPass, chosen_parameters
from lit_merge.callbacks.expert_callback import require_one_of, require_positive
from lit_merge.callbacks.expert_folder import describe, save_expert, weights_of, with_details
from lit_merge.callbacks.training_loss import TrainingLoss
from lit_merge.checkpoint import fingerprint, load_into, open_checkpoint
from lit_merge.correction.sites import find_sites
from lit_merge.correction.statistics import to_tensors
from lit_merge.curvature_pass import CurvaturePass, Measurement
from lit_merge.distributed import failing_together
from lit_merge.errors import InputError
from lit_merge.expert.info import ExpertInfo, read_info
from lit_merge.output import require_free


def curvature_of_checkpoint(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    datamodule: pl.LightningDataModule | None = None,
    *,
    checkpoint: str | Path,
    output: str | Path,
    weights: Literal["averaged", "raw"] = "averaged",
    labels: Literal["sampled", "observed"] = "sampled",
    max_examples: int | None = None,
    parameters: list[str] | None = None,
    sites: str | list[str] | None = None,
    max_activation_examples: int | None = 512,
    batch_size: int | None = None,
    task: str | None = None,
    seed: int = 0,
    replace: bool = False,
) -> Path:
    """Measure a checkpoint's curvature on the training examples, and write an expert folder.

    The pass is that of :class:`~lit_merge.callbacks.DiagonalHessian`. Where ``output`` is an expert
    folder of these very weights without curvature, the curvature is added to it; so a folder can be
    completed in place.

    Args:
        trainer: Any Trainer: its devices, strategy and precision are used. Its limits on batches
            have no effect.
        module: The module that was trained; its loss is ``curvature_loss`` or ``training_step``.
        datamodule: Where the training examples come from, from ``curvature_dataloader()`` or
            ``train_dataloader()``; None takes the module's.
        checkpoint: The weights: anything that :func:`~lit_merge.checkpoint.open_checkpoint` takes.
        output: The expert folder.
        weights: Which weights of a checkpoint that holds both the trained and the averaged ones.
        labels: "sampled" from the model's predictions (the Fisher information) or "observed".
        max_examples: A random subset of so many training examples, on all ranks together; the sum
            is scaled from it to all of them. None takes all.
        parameters: Patterns over the names of the parameters wanted; None for all that are trained.
        sites: Where to gather activation statistics as well, as for
            :class:`~lit_merge.callbacks.ActivationStatistics`; None gathers none.
        max_activation_examples: How many examples these are gathered on; None takes all.
        batch_size: Examples per batch and rank; None takes the training loader's.
        task: Name of the task, for ``expert.json``.
        seed: Chooses examples and samples labels.
        replace: Whether an existing folder, or the curvature in it, may be replaced.

    Returns:
        The expert folder.

    Raises:
        InputError: A setting cannot be, the weights do not fit the module, the module cannot be
            measured, or the folder may not be written.
    """
    require_one_of("weights", weights, ("averaged", "raw"))
    require_one_of("labels", labels, ("sampled", "observed"))
    for name, value in (
        ("max_examples", max_examples),
        ("max_activation_examples", max_activation_examples),
        ("batch_size", batch_size),
    ):
        require_positive(name, value)
    measurement = _CheckpointCurvature(
        checkpoint=Path(checkpoint),
        output=Path(output),
        weights=weights,
        labels=labels,
        max_examples=max_examples,
        parameters=None if parameters is None else tuple(parameters),
        sites=tuple(sites) if isinstance(sites, list) else sites,
        max_activation_examples=max_activation_examples,
        batch_size=batch_size,
        task=task,
        seed=seed,
        replace=replace,
    )
    open_checkpoint(measurement.checkpoint, weights=weights).close()  # before processes are started
    if measurement.info_there() is None:
        measurement.require_room()
    CurvaturePass(module, datamodule, measurement).launch(trainer)
    return measurement.output


@dataclass(frozen=True)
class _CheckpointCurvature(Measurement):
    """The arguments of :func:`curvature_of_checkpoint`, and what they mean in every process."""

    checkpoint: Path
    output: Path
    weights: Literal["averaged", "raw"]
    labels: Literal["sampled", "observed"]
    max_examples: int | None
    parameters: tuple[str, ...] | None
    sites: str | tuple[str, ...] | None
    max_activation_examples: int | None
    batch_size: int | None
    task: str | None
    seed: int
    replace: bool

    def load(self, module: pl.LightningModule) -> None:
        """Load the checkpoint."""
        with open_checkpoint(self.checkpoint, weights=self.weights) as checkpoint:
            load_into(module, checkpoint)

    def run(self, step: CurvaturePass) -> None:
        """Measure on every rank, and write on the first."""
        trainer, module = step.trainer, step.module
        with failing_together():
            if trainer.is_global_zero:
                self.joins(module)
        info = describe(module)
        loss = TrainingLoss(trainer, module)
        sites = (
            None
            if self.sites is None
            else find_sites(module, where=self.sites, exclude=info.head_parameters)
        )
        found = ExactPass(
            trainer,
            module,
            loss=loss,
            labels=self.labels,
            parameters=chosen_parameters(module, self.parameters),
            seed=self.seed,
        ).run(
            step.examples(
                max_examples=self.max_examples, batch_size=self.batch_size, seed=self.seed
            )
        )
        activations = None
        if sites is not None:
            examples = step.examples(
                max_examples=self.max_activation_examples,
                batch_size=self.batch_size,
                seed=self.seed,
            )
            statistics = gather_over_ranks(
                trainer, module, examples, sites, loss=loss, seed=self.seed
            )
            activations = to_tensors(statistics)
        info = replace(
            info,
            task=self.task,
            estimator="exact",
            labels=self.labels,
            num_examples=found.num_examples,
        )
        curvature = {
            "num_seen": found.num_seen,
            "parameters": self.parameters,
            "max_examples": self.max_examples,
            "seed": self.seed,
            "precision": str(trainer.precision),
            **found.notes,
        }
        info = with_details(
            info, checkpoint=str(self.checkpoint), weights=self.weights, curvature=curvature
        )
        with failing_together():
            if trainer.is_global_zero:
                save_expert(
                    self.output,
                    module=module,
                    info=info,
                    join=self.joins(module),
                    replace_folder=self.replace,
                    hessian=found.hessian,
                    activations=activations,
                )
        rank_zero_info(f"Wrote {self.output}")

    def info_there(self) -> ExpertInfo | None:
        """Return what is known of the expert in the output folder, None without one."""
        path = self.output / "expert.json"
        return read_info(path) if path.is_file() else None

    def joins(self, module: pl.LightningModule) -> bool:
        """Return whether the output is an expert folder of the module's weights.

        Raises:
            InputError: Something else is there, or curvature that may not be replaced.
        """
        there = self.info_there()
        if there is None or there.fingerprint != fingerprint(weights_of(module)):
            self.require_room()
            return False
        file = self.output / "hessian.safetensors"
        if file.exists() and not self.replace:
            raise InputError(
                f"{file}: must not exist yet; got curvature of these weights. Name another output "
                "folder, or ask to replace it."
            )
        return True

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
