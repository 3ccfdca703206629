from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from lit_merge.passes.on_device import to_device


def test_a_batch_goes_through_all_the_modules_hooks(tmp_path) -> None:
    class Hooked(pl.LightningModule):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch + 1

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            return batch * 10

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch + 0.5

    trainer = pl.Trainer(
        accelerator="cpu", precision="64-true", logger=False, default_root_dir=tmp_path
    )
    module = Hooked()
    trainer.strategy.connect(module)
    trainer._data_connector.attach_data(module, train_dataloaders=[])
    batch = to_device(trainer, torch.tensor([1.0]))
    assert batch.tolist() == [20.5]
    assert batch.dtype == torch.float64
