"""A pass over training examples outside of a fit: a LightningModule around the user's.

``Trainer.predict`` is the launcher: it starts the processes, sets up the data and puts the plain
module on the devices (a fit would wrap it for training and make optimizers). Its loop has one step,
which is the whole pass, because ranks may have different numbers of batches, even none, and what
they find meets at the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_merge.callbacks.expert_callback import stop_progress_bar
from lit_merge.distributed import is_dtensor, sharded_parameters
from lit_merge.errors import InputError
from lit_merge.passes.data_pass import DataPass, curvature_loader, data_pass
from lit_merge.passes.data_ranks import DataRanks


class Measurement(ABC):
    """What is done to a module in a pass.

    Attributes:
        takes_shards: Whether parameters may be sharded with FSDP2 or tensor parallelism.
    """

    takes_shards: ClassVar[bool] = False

    @abstractmethod
    def load(self, module: pl.LightningModule) -> None:
        """Give the module the weights that are to be measured; called once it is built."""

    @abstractmethod
    def run(self, step: CurvaturePass) -> None:
        """Measure the module, which is on its device, on every rank. Collective."""


class CurvaturePass(pl.LightningModule):
    """A module around the user's whose only prediction step is the whole pass."""

    def __init__(
        self,
        module: pl.LightningModule,
        datamodule: pl.LightningDataModule | None,
        measurement: Measurement,
    ) -> None:
        """Wrap the user's module.

        Args:
            module: The module; it gets the weights of the measurement.
            datamodule: Its data; None for the module's own.
            measurement: What is done.
        """
        super().__init__()
        self.module = module
        self._datamodule = datamodule
        self._measurement = measurement
        self._late = False
        self.prepare_data_per_node = self._data.prepare_data_per_node

    def launch(self, trainer: pl.Trainer) -> None:
        """Run the measurement on all processes of a Trainer."""
        trainer.predict(self, dataloaders=_Once(), return_predictions=False)

    def examples(self, *, max_examples: int | None, batch_size: int | None, seed: int) -> DataPass:
        """Return this rank's share of the training examples.

        Args:
            max_examples: A random subset of so many at most; None for all.
            batch_size: Examples per batch; None takes the training loader's.
            seed: Chooses the subset.

        Raises:
            InputError: There are none, or their loader cannot be taken apart.
        """
        loader, _ = curvature_loader(self._datamodule, self.module, otherwise=self._training_loader)
        ranks = DataRanks.of(self.trainer)
        return data_pass(
            loader,
            rank=ranks.rank,
            world_size=ranks.size,
            max_examples=max_examples,
            batch_size=batch_size,
            seed=seed,
        )

    def prepare_data(self) -> None:
        """Prepare the data as a fit would."""
        self._data.prepare_data()
        if self._data is not self.module:
            self.module.prepare_data()

    def setup(self, stage: str) -> None:
        """Set up data and module as a fit would."""
        if self._datamodule is not None:
            self._datamodule.trainer = self.trainer
            self._datamodule.setup("fit")
        self.module.setup("fit")

    def teardown(self, stage: str) -> None:
        """Take down what :meth:`setup` has set up."""
        if self._datamodule is not None:
            self._datamodule.teardown("fit")
        self.module.teardown("fit")

    def configure_model(self) -> None:
        """Build what the module builds late, and give it the weights."""
        self.module._device_mesh = self._device_mesh
        if is_overridden("configure_model", self.module):
            self.module.configure_model()
        # Parameters without memory get some from the strategy, and their values only then.
        self._late = any(parameter.is_meta for parameter in self.module.parameters())
        if not self._late:
            self._measurement.load(self.module)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Call the user's hook."""
        return self._hook("on_before_batch_transfer", batch, dataloader_idx)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Call the user's hook."""
        return self._hook("transfer_batch_to_device", batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Call the user's hook."""
        return self._hook("on_after_batch_transfer", batch, dataloader_idx)

    def predict_step(self, batch: Any) -> bool:
        """Make the pass. Collective.

        Raises:
            InputError: On every rank, when one of them cannot go on.
        """
        self._check_shards()
        stop_progress_bar(self.trainer)
        # A step of predict runs without gradients and with the Trainer's autocast; the loss enters
        # the autocast again by itself, and what is made of its gradients must not be under it.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):
            if self._late:
                self._measurement.load(self.module)
            self._measurement.run(self)
        return True

    def _check_shards(self) -> None:
        sharded = sharded_parameters(self.module)
        parameters = dict(self.module.named_parameters())
        if self._measurement.takes_shards:
            sharded = tuple(name for name in sharded if not is_dtensor(parameters[name]))
        if sharded:
            taken = " or shard them with FSDP2" if self._measurement.takes_shards else ""
            raise InputError(
                f"strategy: must leave parameters whole{taken}; got {sharded[0]!r} and others "
                'sharded. Use strategy="ddp" or a single device.'
            )

    @property
    def _data(self) -> pl.LightningDataModule | pl.LightningModule:
        return self.module if self._datamodule is None else self._datamodule

    def _hook(self, name: str, batch: Any, *rest: Any) -> Any:
        if batch is _NOTHING:
            return batch
        owner = self._data if is_overridden(name, self._data) else self.module
        return getattr(owner, name)(batch, *rest)

    def _training_loader(self) -> Any:
        if not is_overridden("train_dataloader", self._data):
            raise InputError(
                f"{type(self._data).__name__}: must define train_dataloader() or "
                "curvature_dataloader(); got neither. Give a data module with the training "
                "examples."
            )
        return self._data.train_dataloader()


_NOTHING = "no batch: the pass has its own"


class _Once:
    """A loader of one batch, which is none: Lightning leaves such a loader alone on every rank."""

    def __iter__(self) -> Iterator[str]:
        return iter([_NOTHING])

    def __len__(self) -> int:
        return 1
