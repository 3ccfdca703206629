"""What the callbacks have in common: when they look, and when and where they write.

Errors come before hours of training, not after: at the start of a fit the output folder, the loss
and the order of the callbacks are checked. The pass over the data is in ``on_train_end``, the last
hook before the strategy takes the model down, and it sees what the callbacks before it left there:
the averaged weights of a ``WeightAveraging``, for instance. An interrupted fit writes nothing.
"""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_merge.callbacks.expert_folder import fingerprint_of, run_of, save_expert, weights_of
from lit_merge.checkpoint import load_into, open_checkpoint
from lit_merge.distributed import (
    broadcast,
    failing_together,
    is_dtensor,
    sharded_parameters,
)
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo
from lit_merge.output import require_free
from lit_merge.passes.data_pass import DataPass, curvature_loader, data_pass
from lit_merge.passes.data_ranks import DataRanks
from lit_merge.passes.training_examples import own_random_numbers


class ExpertCallback(pl.Callback):
    """A callback that measures the trained weights in one pass and writes into an expert folder."""

    def __init__(
        self,
        *,
        weights: Literal["last", "best"],
        max_examples: int | None,
        batch_size: int | None,
        output: str | None,
        replace: bool,
        task: str | None,
        seed: int,
    ) -> None:
        """See the subclasses."""
        require_one_of("weights", weights, ("last", "best"))
        require_positive("max_examples", max_examples)
        require_positive("batch_size", batch_size)
        self.weights = weights
        self.max_examples = max_examples
        self.batch_size = batch_size
        self.output = output
        self.replace = replace
        self.task = task
        self.seed = seed
        self.written: Path | None = None
        self._folder: Path | None = None
        self.run: str | None = None
        self._base_fingerprint: str | None = None
        self._resumed = False
        self._training = False

    @property
    def takes_shards(self) -> bool:
        """Whether parameters may be sharded with FSDP2 or tensor parallelism."""
        return False

    @abstractmethod
    def look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check on the first examples that the pass at the end will work; leave no trace."""

    @abstractmethod
    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure the weights that the module now has, and write."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that weight averaging comes first, whose ``on_train_end`` changes the weights.

        Raises:
            InputError: It comes after this callback.
        """
        if stage != "fit":
            return
        self._resumed = self._training = False
        self._folder = self.written = None
        name = type(self).__name__
        callbacks = callbacks_of(trainer)
        for other in callbacks[callbacks.index(self) + 1 :]:
            if isinstance(other, (WeightAveraging, StochasticWeightAveraging)):
                averaging = type(other).__name__
                raise InputError(
                    f"callbacks: must have {averaging} before {name}, because it changes the "
                    f"weights when training ends; got it after. Put {name} after {averaging}."
                )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check module, output folder and the other callbacks, and remember the base.

        Raises:
            InputError: The fit could not end with an expert folder.
        """
        name = type(self).__name__
        model = trainer.strategy.model or pl_module
        sharded = sharded_parameters(model)
        if self.takes_shards:
            parameters = dict(model.named_parameters())
            sharded = tuple(n for n in sharded if not is_dtensor(parameters[n]))
        if sharded:
            raise InputError(
                f"{name}: must have whole parameters on every rank; got {len(sharded)} sharded "
                f'ones, {sharded[0]!r} the first. Train with strategy="ddp", or run "lit-merge '
                'curvature" on the consolidated checkpoint.'
            )
        if self.weights == "best" and sharded_parameters(model):
            raise InputError(
                'weights: must be "last" where parameters are sharded; got "best". Run "lit-merge '
                'curvature" on the best checkpoint afterwards.'
            )
        self._folder = self._resolve_output(trainer)
        self._check_peers(trainer)
        self._check_best(trainer)
        if not _restores_late(trainer):
            self._begin(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Try out on a few examples what will happen at the end."""
        if _restores_late(trainer):
            self._begin(trainer, pl_module)
        self.look(trainer, pl_module)
        self._training = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and write, unless this was a ``fast_dev_run``."""
        if is_rehearsal(trainer):
            rank_zero_info(f"{type(self).__name__}: nothing is written after a fast_dev_run.")
            self._training = False
            return
        stop_progress_bar(trainer)
        with self._chosen_weights(trainer, pl_module):
            self.finish(trainer, pl_module)
        self._training = False

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Say that nothing was written, and how to get it from a checkpoint."""
        if self._training:
            rank_zero_info(
                f"{type(self).__name__}: the fit was interrupted ({type(exception).__name__}), so "
                f'nothing was written to {self._folder}. "lit-merge curvature" measures any '
                "checkpoint of this run later."
            )
        self._training = False

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit must know: whose run it is, and where it began."""
        return {"run": self.run, "base_fingerprint": self._base_fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the run of a checkpoint."""
        self.run = state_dict["run"]
        self._base_fingerprint = state_dict["base_fingerprint"]
        self._resumed = True

    @property
    def folder(self) -> Path:
        """The expert folder of the current fit."""
        assert self._folder is not None, "known since on_fit_start"
        return self._folder

    def save(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        info: ExpertInfo,
        *,
        hessian: Mapping[str, Tensor] | None = None,
        activations: Mapping[str, Tensor] | None = None,
        gram: Mapping[str, Tensor] | None = None,
        kronecker: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write what was measured into the expert folder, on the first rank. Collective."""
        own = trainer.is_global_zero and run_of(self.folder) == self.run
        save_expert(
            self.folder,
            module=module,
            info=replace(info, task=self.task, base_fingerprint=self._base_fingerprint),
            join=any(peer.written == self.folder for peer in self._peers(trainer)),
            replace_folder=self.replace or own,
            hessian=hessian,
            activations=activations,
            gram=gram,
            kronecker=kronecker,
        )
        self.written = self.folder
        rank_zero_info(f"{type(self).__name__}: wrote {self.folder}")

    def take_base(self, module: pl.LightningModule) -> None:
        """Remember the weights of a module as the base: another callback has just loaded them."""
        self._base_fingerprint = fingerprint_of(module)

    def examples(self, trainer: pl.Trainer, module: pl.LightningModule) -> DataPass:
        """Return this rank's share of the pass over the training examples."""
        owners = (getattr(trainer, "datamodule", None), module)
        ranks = DataRanks.of(trainer)
        with own_random_numbers(self.seed):  # making a loader may draw some
            loader, its_own = curvature_loader(*owners, otherwise=lambda: trainer.train_dataloader)
            return data_pass(
                loader,
                rank=ranks.rank,
                world_size=ranks.size,
                max_examples=self.max_examples,
                batch_size=self.batch_size,
                epoch_batches=float("inf") if its_own else trainer.num_training_batches,
                seed=self.seed,
            )

    def details(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return where in which run the weights come from."""
        return {"run": self.run, "weights": self.weights, "global_step": trainer.global_step}

    def _peers(self, trainer: pl.Trainer) -> list[ExpertCallback]:
        return [c for c in callbacks_of(trainer) if isinstance(c, ExpertCallback) and c is not self]

    def checkpoint_folder(self, trainer: pl.Trainer) -> Path:
        """Return the local folder beside whose checkpoints things are written."""
        folder = str(getattr(trainer.checkpoint_callback, "dirpath", None) or "")
        return Path(folder) if folder and "://" not in folder else self.folder.parent

    def _resolve_output(self, trainer: pl.Trainer) -> Path:
        log_dir = trainer.log_dir or trainer.default_root_dir  # collective: asked for everywhere
        beside = getattr(trainer.checkpoint_callback, "dirpath", None) or log_dir
        folder = self.output or f"{beside}/expert"
        if "://" in folder:
            raise InputError(
                f"output: must be a local folder; got {folder}. Give {type(self).__name__} an "
                "output on a local disk, and copy it afterwards."
            )
        return Path(folder)

    def _check_peers(self, trainer: pl.Trainer) -> None:
        for peer in self._peers(trainer):
            if peer._folder != self._folder:  # also a peer that has not started yet
                continue
            if type(peer) is type(self):
                raise InputError(
                    f"output: must be another folder for each {type(self).__name__}; got "
                    f"{self._folder} twice. Give each its own output."
                )
            if peer.weights != self.weights:
                raise InputError(
                    f"weights: must be the same for all callbacks that write {self._folder}; got "
                    f"{peer.weights!r} and {self.weights!r}. Choose one, or another output."
                )

    def _check_best(self, trainer: pl.Trainer) -> None:
        monitor = getattr(trainer.checkpoint_callback, "monitor", None)
        if self.weights == "best" and monitor is None and not is_rehearsal(trainer):
            raise InputError(
                'weights: must be "last" where no checkpoint is the best; got "best" without a '
                "ModelCheckpoint that monitors something. Add ModelCheckpoint(monitor=...)."
            )

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Find out whose run this is, and whether the folder is free for it."""
        self._continue_or_begin(trainer, module)
        with failing_together():
            if trainer.is_global_zero and not is_rehearsal(trainer):
                own = run_of(self.folder) == self.run
                require_free(self.folder, replace=self.replace or own)

    def _continue_or_begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._resumed or (trainer.global_step > 0 and self.run is not None):
            return
        shared = [peer.run for peer in self._peers(trainer) if peer._folder == self._folder]
        self.run = next((run for run in shared if run is not None), None) or uuid.uuid4().hex
        self._base_fingerprint = None
        if trainer.ckpt_path is not None:
            rank_zero_warn(
                f"{type(self).__name__}: the checkpoint of this fit was written without this "
                "callback, so the base that the training began with is not known."
            )
        else:
            self._base_fingerprint = fingerprint_of(module)

    @contextmanager
    def _chosen_weights(self, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
        """Put the best weights into the module for the block, and the last ones back."""
        if self.weights == "last":
            yield
            return
        best = broadcast(getattr(trainer.checkpoint_callback, "best_model_path", ""))
        if not best:
            raise InputError(
                'weights: must be "last" where no checkpoint was written; got "best". Run '
                '"lit-merge curvature" on the checkpoint that you want.'
            )
        last = {
            name: value.detach().to("cpu", copy=True) for name, value in weights_of(module).items()
        }
        try:
            with failing_together(), open_checkpoint(best) as checkpoint:
                load_into(module, checkpoint)
            yield
        finally:
            with torch.no_grad():
                for name, value in weights_of(module).items():
                    value.copy_(last[name])


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the callbacks of a Trainer, in the order in which their hooks are called."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def is_rehearsal(trainer: pl.Trainer) -> bool:
    """Return whether the fit is only tried out, with ``fast_dev_run``."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _restores_late(trainer: pl.Trainer) -> bool:
    """Return whether a checkpoint would be loaded only after ``on_fit_start``, as by shards."""
    return bool(trainer.strategy.restore_checkpoint_after_setup)


def stop_progress_bar(trainer: pl.Trainer) -> None:
    """Stop the Trainer's own bar, where it is one of rich, which draws only one at a time."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.progress is not None:
        bar.progress.stop()


def require_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise unless a setting has one of its values.

    Raises:
        InputError: It has not.
    """
    if value not in allowed:
        raise InputError(
            f"{name}: must be one of {', '.join(allowed)}; got {value!r}. Choose one of these."
        )


def require_positive(name: str, value: int | None) -> None:
    """Raise unless a setting is a positive integer or None.

    Raises:
        InputError: It is not.
    """
    if value is not None and (type(value) is not int or value < 1):
        raise InputError(
            f"{name}: must be a positive integer, or None for the default; got {value!r}."
            " Correct it, or leave it out."
        )
