"""Activation statistics of the trained expert: what a correction aims at after a merge."""

from __future__ import annotations

from itertools import chain
from typing import Literal

import lightning.pytorch as pl

from lit_merge.callbacks.expert_callback import ExpertCallback
from lit_merge.callbacks.expert_folder import describe, with_details
from lit_merge.callbacks.training_loss import TrainingLoss, without_trace
from lit_merge.correction.sites import Site, find_sites
from lit_merge.correction.statistics import (
    ChannelStatistics,
    from_tensors,
    gather_statistics,
    to_tensors,
)
from lit_merge.distributed import gather
from lit_merge.parameters import detect_heads
from lit_merge.passes.data_pass import DataPass, require_seen
from lit_merge.passes.on_device import on_device, to_device


class ActivationStatistics(ExpertCallback):
    """Gather count, mean and M2 of every channel at every site when training ends.

    One pass without gradients, in evaluation mode, over a random subset of the training examples:
    the forward of ``training_step`` (or of ``curvature_loss``, where the module defines it) runs,
    and what it returns is not used. Labels do not matter. Tokens that an ``attention_mask`` leaves
    out do not count. Ranks take different examples, and their statistics are combined exactly.

    The result is ``activations.safetensors`` in the expert folder, beside what
    :class:`DiagonalHessian` writes into the same folder, in either order.

    Example::

        trainer = L.Trainer(callbacks=[DiagonalHessian(), ActivationStatistics()])
    """

    def __init__(
        self,
        *,
        sites: str | list[str] = "auto",
        max_examples: int | None = 512,
        weights: Literal["last", "best"] = "last",
        output: str | None = None,
        replace: bool = False,
        task: str | None = None,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        """Configure the callback; all of it can stand in a YAML file.

        Args:
            sites: Where to measure: "auto", "linear", "norm", or patterns over module names. Heads
                are left out.
            max_examples: How many training examples to run at most, on all ranks together; None
                runs all.
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
            weights=weights,
            max_examples=max_examples,
            batch_size=batch_size,
            output=output,
            replace=replace,
            task=task,
            seed=seed,
        )
        self.sites = sites

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check what can be checked.

        Raises:
            InputError: The fit could not end with activation statistics.
        """
        super().on_fit_start(trainer, pl_module)
        TrainingLoss(trainer, pl_module)

    def look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Find the sites and run a few examples through them.

        Raises:
            InputError: There are no sites, or none of them is run.
        """
        sites = self._sites(module)
        with without_trace(module, seed=self.seed):
            few = to_device(trainer, self.examples(trainer, module).first_few())
            gather_statistics(module, [few], sites, forward=TrainingLoss(trainer, module))

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Gather the statistics on every rank, combine them, and write them on the first."""
        data = self.examples(trainer, module)
        statistics = gather_over_ranks(
            trainer,
            module,
            data,
            self._sites(module),
            loss=TrainingLoss(trainer, module),
            seed=self.seed,
        )
        info = with_details(
            describe(module),
            **self.details(trainer),
            activations={"sites": self.sites, "max_examples": self.max_examples, "seed": self.seed},
        )
        self.save(trainer, module, info, activations=to_tensors(statistics))

    def _sites(self, module: pl.LightningModule) -> tuple[Site, ...]:
        return find_sites(module, where=self.sites, exclude=detect_heads(module))


def gather_over_ranks(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: DataPass,
    sites: tuple[Site, ...],
    *,
    loss: TrainingLoss,
    seed: int,
) -> dict[str, ChannelStatistics]:
    """Return the statistics over the examples of all ranks, on every rank. Collective.

    Args:
        trainer: Whose device, precision and progress bar are used.
        module: The module, in whatever mode.
        data: This rank's share of the examples; it may have none.
        sites: Where to measure.
        loss: What runs the module on a batch.
        seed: For random numbers of the data set (augmentations).

    Raises:
        InputError: On every rank, when one finds NaN or infinity, or no examples at all.
    """
    local: dict[str, ChannelStatistics] = {}
    with without_trace(module, seed=seed):
        batches = (batch for _, batch in on_device(trainer, data, "Activation statistics"))
        first = next(batches, None)
        if first is not None:
            local = gather_statistics(module, chain([first], batches), sites, forward=loss)
    merged: dict[str, ChannelStatistics] = {}
    for tensors in gather(to_tensors(local)):
        for name, one in from_tensors(tensors).items():
            merged[name] = merged[name].merge(one) if name in merged else one
    require_seen(len(merged))
    return {site.name: merged[site.name] for site in sites if site.name in merged}
