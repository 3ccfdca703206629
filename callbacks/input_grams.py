"""Gram matrices of the inputs of the trained expert's layers: what RegMean averages with."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl

from lit_merge.callbacks.layer_matrices import MatricesCallback, Padding, Precision
from lit_merge.callbacks.training_loss import TrainingLoss
from lit_merge.curvature.input_grams import LayerGrams
from lit_merge.curvature.layer_matrices import LARGEST, LayerMatrices


class InputGrams(MatricesCallback):
    """Gather Σ x xᵀ of the inputs x of every linear layer and convolution when training ends.

    One pass without gradients, in evaluation mode, over the training examples: the forward of
    ``training_step`` (or of ``curvature_loss``, where the module defines it) runs, and what it
    returns is not used. Labels do not matter. What counts as an input, and which weights have no
    Gram, is in :mod:`lit_merge.curvature.input_grams`.

    The result is ``gram.safetensors`` in the expert folder, beside what the other callbacks write
    into the same folder, in any order. It has n² numbers per weight [m, n]: of a small ViT 1.6
    times as many as the model has parameters, of a ResNet-18, with n = 9 m, 8 times as many. The
    pass costs about 2 forwards of the ViT, and 7 of the ResNet.

    Example::

        trainer = L.Trainer(callbacks=[InputGrams(max_examples=2000)])
    """

    artifact = "gram"

    def __init__(
        self,
        *,
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
            parameters: Patterns over the names of the weights wanted; None for all that are
                trained. A merge averages the others.
            padding: Whether tokens that the batch's ``attention_mask`` leaves out "count", as they
                do in programs that only hook modules, or are to be "skip"ped.
            precision: What is summed in, "float32" or "float64"; the file is float32.
            largest: Weights with larger n are left out, and named in ``expert.json``.
            max_examples: A random subset of so many training examples, on all ranks together; the
                sum is scaled from it to all of them. None takes all.
            weights: "last", or "best" for those of the ``ModelCheckpoint``'s best checkpoint.
            output: The expert folder; None is ``expert`` in the folder of the checkpoints.
            replace: Whether an existing folder may be replaced.
            task: Name of the task, for ``expert.json``.
            seed: Chooses the examples.
            batch_size: Examples per batch and rank; None takes the training loader's.

        Raises:
            InputError: A value cannot be.
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

    def estimator(self, trainer: pl.Trainer, module: pl.LightningModule) -> LayerMatrices:
        """Return the Grams of a module."""
        return LayerGrams(module, TrainingLoss(trainer, module), **self.of_estimator(module))
