"""Kronecker factors of the trained expert's curvature: what MaTS merges with."""

from __future__ import annotations

from typing import Any, Literal, get_args

import lightning.pytorch as pl

from lit_merge.callbacks.expert_callback import require_one_of, require_positive
from lit_merge.callbacks.layer_matrices import MatricesCallback, Padding, Precision
from lit_merge.callbacks.training_loss import TrainingLoss
from lit_merge.curvature.kronecker import KroneckerFisher
from lit_merge.curvature.layer_matrices import LARGEST, LayerMatrices
from lit_merge.curvature.losses import Reduction
from lit_merge.curvature.objective import Labels
from lit_merge.errors import InputError


class KroneckerFactors(MatricesCallback):
    """Gather the Kronecker factors of every linear layer and convolution when training ends.

    One pass over the training examples, forward and backward, in evaluation mode. The loss is that
    of :class:`DiagonalHessian`, and must be the mean over the examples of a batch as well. Scale,
    and which weights have no factors, are in :mod:`lit_merge.curvature.kronecker`.

    The result is ``kronecker.safetensors`` in the expert folder, beside what the other callbacks
    write into the same folder, in any order: n² + m² numbers per weight [m, n].

    Example::

        trainer = L.Trainer(callbacks=[KroneckerFactors(max_examples=2000)])
    """

    artifact = "kronecker"

    def __init__(
        self,
        *,
        labels: Labels = "sampled",
        samples: int = 1,
        reduction: Reduction = "loss",
        parameters: list[str] | None = None,
        padding: Padding = "skip",
        precision: Precision = "float32",
        largest: int = LARGEST,
        max_examples: int | None = None,
        weights: Literal["last", "best"] = "last",
        output: str | None = None,
        replace: bool = False,
        task: str | None = None,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        """Configure the callback; all of it can stand in a YAML file.

        Args:
            labels: "sampled" from the model's predictions (the Fisher information), "expected" over
                all labels, at a pass per class, or "observed" in the data (the empirical Fisher).
            samples: Labels drawn per example, each at the cost of a pass.
            reduction: "loss" takes the loss as it is; "mean" and "sum" put the terms of each
                example together first, for losses that are means over the tokens of texts of
                different lengths.
            parameters: Patterns over the names of the weights wanted; None for all that are
                trained.
            padding: Whether tokens that the batch's ``attention_mask`` leaves out "count", or are
                to be "skip"ped.
            precision: What is summed in, "float32" or "float64"; the file is float32.
            largest: Weights with larger n or m are left out, and named in ``expert.json``.
            max_examples: A random subset of so many training examples, on all ranks together; sums
                are scaled from it to all of them. None takes all.
            weights: "last", or "best" for those of the ``ModelCheckpoint``'s best checkpoint.
            output: The expert folder; None is ``expert`` in the folder of the checkpoints.
            replace: Whether an existing folder may be replaced.
            task: Name of the task, for ``expert.json``.
            seed: Chooses examples and samples labels.
            batch_size: Examples per batch and rank; None takes the training loader's.

        Raises:
            InputError: A value cannot be, or does not go with another one.
        """
        super().__init__(
            parameters=parameters,
            padding=padding,
            precision=precision,
            largest=largest,
            weights=weights,
            max_examples=max_examples,
            batch_size=batch_size,
            output=output,
            replace=replace,
            task=task,
            seed=seed,
        )
        require_one_of("labels", labels, get_args(Labels))
        require_one_of("reduction", reduction, get_args(Reduction))
        require_positive("samples", samples)
        if samples > 1 and labels != "sampled":
            raise InputError(
                f'samples: must be 1 without labels "sampled"; got {samples} with labels '
                f'"{labels}", which are not drawn. Leave samples out.'
            )
        self.labels = labels
        self.samples = samples
        self.reduction = reduction

    def estimator(self, trainer: pl.Trainer, module: pl.LightningModule) -> LayerMatrices:
        """Return the Kronecker factors of a module."""
        return KroneckerFisher(
            module,
            TrainingLoss(trainer, module),
            labels=self.labels,
            samples=self.samples,
            reduction=self.reduction,
            seed=self.seed,
            **self.of_estimator(module),
        )

    def more_details(self) -> dict[str, Any]:
        """Return the settings of the labels."""
        return {"labels": self.labels, "samples": self.samples, "reduction": self.reduction}
