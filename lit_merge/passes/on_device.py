"""The batches of a pass as the training step would get them, on the Trainer's device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl

from lit_merge.passes.data_pass import DataPass
from lit_merge.passes.progress import with_progress


def to_device(trainer: pl.Trainer, batch: Any) -> Any:
    """Return a batch as the training step would get it: converted, moved, through all its hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def on_device(
    trainer: pl.Trainer, batches: DataPass, description: str, *, start: int = 0, done: int = 0
) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield from a pass, batches on the device, with a progress bar where the Trainer draws one.

    Args:
        trainer: The Trainer.
        batches: This rank's share of the pass.
        description: What is being done.
        start: How many batches are skipped; an earlier run has done them.
        done: How many examples these were.
    """
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    for indices, batch in with_progress(batches, description, shown=shown, start=start, done=done):
        yield indices, to_device(trainer, batch)
