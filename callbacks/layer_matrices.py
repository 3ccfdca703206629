"""What the callbacks that gather matrices per layer have in common: settings, and the pass."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_merge.callbacks.expert_callback import (
    ExpertCallback,
    require_one_of,
    require_positive,
)
from lit_merge.callbacks.expert_folder import describe, plain_names_of, with_details
from lit_merge.callbacks.pass_settings import chosen_parameters
from lit_merge.callbacks.training_loss import TrainingLoss, without_trace
from lit_merge.correction.forward import attention_mask_of
from lit_merge.curvature.layer_matrices import LayerMatrices
from lit_merge.distributed import gather, sum_number, sum_over_ranks
from lit_merge.passes.data_pass import DataPass, require_seen
from lit_merge.passes.glimpse import require_same_data
from lit_merge.passes.on_device import on_device, to_device

Padding = Literal["skip", "count"]
Precision = Literal["float32", "float64"]

_NAMED = 3


class MatricesCallback(ExpertCallback):
    """Gathers matrices of the inputs, and perhaps of the gradients, of the trained linear layers.

    Parameters must be whole on every rank; each rank takes its own examples, without padding or
    repeats, and their sums are added up once, at the end.

    Attributes:
        artifact: What is written into the expert folder.
    """

    artifact: ClassVar[Literal["gram", "kronecker"]]

    def __init__(
        self,
        *,
        parameters: list[str] | None,
        padding: Padding,
        precision: Precision,
        largest: int,
        **settings: Any,
    ) -> None:
        """See the subclasses."""
        super().__init__(**settings)
        require_one_of("padding", padding, get_args(Padding))
        require_one_of("precision", precision, get_args(Precision))
        require_positive("largest", largest)
        self.parameters = parameters
        self.padding = padding
        self.precision = precision
        self.largest = largest

    @abstractmethod
    def estimator(self, trainer: pl.Trainer, module: pl.LightningModule) -> LayerMatrices:
        """Return a new estimator of the module."""

    def more_details(self) -> dict[str, Any]:
        """Return what ``expert.json`` says of the settings of one kind alone."""
        return {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check what can be checked.

        Raises:
            InputError: The fit could not end with these matrices.
        """
        super().on_fit_start(trainer, pl_module)
        TrainingLoss(trainer, pl_module)
        chosen_parameters(pl_module, self.parameters)

    def look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Run a few examples.

        Raises:
            InputError: They cannot be measured, or no layer that is wanted is run.
        """
        with without_trace(module, seed=self.seed):
            measured = self.estimator(trainer, module)
            measured.update(to_device(trainer, self.examples(trainer, module).first_few()))
            measured.matrices()

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Gather on every rank, add up, and write on the first."""
        data = self.examples(trainer, module)
        measured = self.estimator(trainer, module)
        matrices, details = matrices_of(
            trainer, module, data, measured, type(self).__name__, seed=self.seed
        )
        details |= {
            "max_examples": self.max_examples,
            "parameters": self.parameters,
            "padding": self.padding,
            "seed": self.seed,
            **self.more_details(),
        }
        info = with_details(describe(module), **self.details(trainer), **{self.artifact: details})
        self.save(trainer, module, info, **{self.artifact: matrices})

    def of_estimator(self, module: pl.LightningModule) -> dict[str, Any]:
        """Return the settings of the estimator of a module that both kinds have."""
        return {
            "parameters": chosen_parameters(module, self.parameters),
            "mask": attention_mask_of if self.padding == "skip" else None,
            "dtype": torch.float64 if self.precision == "float64" else torch.float32,
            "largest": self.largest,
        }


def matrices_of(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: DataPass,
    measured: LayerMatrices,
    description: str,
    *,
    seed: int,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the matrices over the examples of all ranks. Collective.

    Args:
        trainer: Whose device, precision and progress bar are used.
        module: The module, in whatever mode.
        data: This rank's share of the examples; it may have none.
        measured: The estimator of the module, without examples yet.
        description: What the progress bar says.
        seed: For random numbers of the data set (augmentations).

    Returns:
        The matrices as they stand in an expert folder, scaled to the whole training set from the
        examples seen, and what ``expert.json`` says of the pass, as JSON primitives.

    Raises:
        InputError: On every rank, when one cannot go on, a value is not finite, or there are no
            examples or no layers at all.
    """
    require_same_data(data, seed=seed)
    with without_trace(module, seed=seed):
        for indices, batch in on_device(trainer, data, description):
            measured.update(batch, indices=indices)
    seen = sum_number(measured.num_examples)
    require_seen(seen)
    refused: dict[str, str] = {}
    for reasons in gather(measured.refused):
        refused |= reasons
    totals = sum_over_ranks(measured.totals, device=module.device)
    measured.replace(totals, num_examples=seen, refused=refused)
    total = max(seen, data.num_examples or 0)
    plain = plain_names_of(module)
    left_out = {plain[name]: why for name, why in measured.left_out.items()}
    matrices = measured.matrices(total / seen)
    if left_out:
        some = "; ".join(f"{name}: {why}" for name, why in list(left_out.items())[:_NAMED])
        rank_zero_info(
            f"{description}: {len(left_out)} weights have no matrix ({some}"
            f"{'; …' if len(left_out) > _NAMED else ''})."
        )
    details = {
        "num_examples": total,
        "num_seen": seen,
        "precision": str(trainer.precision),
        "left_out": left_out,
    }
    return matrices, details
