"""The loss of a LightningModule as a plain function of a batch, outside its training loop.

It is ``curvature_loss(batch)`` where the module defines that, and otherwise what ``training_step``
returns. It runs on the plain module, never through a DDP wrapper, which would average gradients
over ranks before anyone could square them. Nothing that it does is seen from outside: log calls and
loggers are silent while it runs, and torchmetrics keep their states.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lit_merge.distributed import failing_together
from lit_merge.errors import InputError
from lit_merge.passes.training_examples import own_random_numbers

_WITH_MODES = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
_LABELS = ("label", "labels", "target", "targets", "y")
_BATCH_IDX = 1  # not 0: on their first batch training steps like to log images and histograms


class TrainingLoss:
    """The mean loss over a batch, callable as ``loss(module, batch)``.

    Under ``precision="16-mixed"`` the loss runs in full precision instead: half-precision gradients
    vanish without the scaler that training has, and the curvature would be silently too small. All
    other precisions run as in training.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, *, own: bool = True
    ) -> None:
        """Check that the module has a loss that can be called on its own.

        Args:
            trainer: The Trainer whose precision and loggers are in use.
            module: The user's module.
            own: Whether its ``curvature_loss`` goes before its ``training_step``.

        Raises:
            InputError: The module optimises by hand, or its training step takes the data iterator,
                and it does not define ``curvature_loss``.
        """
        self._trainer = trainer
        self._own = own and getattr(module, "curvature_loss", None) is not None
        parameters = inspect.signature(module.training_step).parameters
        self._takes_index = "batch_idx" in parameters or len(parameters) >= 2
        name = type(module).__name__
        if self._own:
            return
        if not module.automatic_optimization:
            raise InputError(
                f"{name}: must have a loss that can be called on its own; got manual optimization, "
                f"where training_step makes the steps itself. {_define(name)}"
            )
        if "dataloader_iter" in parameters:
            raise InputError(
                f"{name}.training_step: must take a batch; got a step that takes dataloader_iter. "
                f"{_define(name)}"
            )

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss over a batch.

        Args:
            model: The module given at the start.
            batch: A batch on the module's device.

        Raises:
            InputError: The step returned no loss, or one that is not a scalar; it found no labels,
                or put layers into train mode.
        """
        assert isinstance(model, pl.LightningModule)
        step = "curvature_loss" if self._own else "training_step"
        name = type(model).__name__
        with (
            _unheard(self._trainer, model),
            _precision(self._trainer, model),
            _judged(model, f"{name}.{step}"),
        ):
            if self._own:
                output = model.curvature_loss(batch)  # type: ignore[operator]
            else:
                output = model.training_step(*([batch, _BATCH_IDX][: 1 + self._takes_index]))
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise InputError(
                f"{name}.{step}: must return the mean loss over the batch, as a tensor or under "
                f"'loss'; got {type(loss).__name__}. Models of transformers return none for a "
                f"batch without labels. {_define(name)}"
            )
        if loss.numel() != 1:
            raise InputError(
                f"{name}.{step}: must return one number, the mean loss over the batch; got shape "
                f"{tuple(loss.shape)}. Return loss.mean(), or define curvature_loss(self, batch)."
            )
        return loss.squeeze()


@contextmanager
def without_trace(module: nn.Module, *, seed: int) -> Iterator[None]:
    """Measure a module so that nobody can tell afterwards: training goes on bit by bit as it would.

    Random numbers are the block's own, buffers are put back, compiled code is passed over (hooks do
    not fire in it), and what goes wrong on one rank is raised on all of them. Collective at the
    end; the block itself must not be.

    Args:
        module: What is run in the block.
        seed: Of the block's random numbers.
    """
    kept = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    eager = torch.compiler.set_stance("force_eager")
    with failing_together(), own_random_numbers(seed), eager:
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)


def _define(name: str) -> str:
    return f"Define {name}.curvature_loss(self, batch): it returns the mean loss over the batch."


@contextmanager
def _judged(model: nn.Module, step: str) -> Iterator[None]:
    """Say what is wrong with a step that changes the model's mode, or misses labels."""
    in_eval = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _WITH_MODES) and not module.training
    ]
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # batch statistics of one example fail by themselves
        error = caught
    for name, module in in_eval:
        if module.training:
            raise InputError(
                f"{step}: must leave the model in the mode that it is in, because curvature is "
                f"measured in eval mode; got {name!r} ({type(module).__name__}) put into train "
                "mode, where examples depend on each other or on chance. Call train() outside of "
                f"{step}, or define curvature_loss(self, batch) without it."
            ) from error
    if error is None:
        return
    if _misses_labels(error):
        raise InputError(
            f"{step}: must find labels in the batch; got {type(error).__name__}: {error}. For data "
            'without labels use labels="sampled" and define curvature_loss(self, batch), which '
            "calls torch's loss function with the target None; or define curvature_dataloader() "
            "with labelled batches."
        ) from error
    raise error


def _misses_labels(error: Exception) -> bool:
    if isinstance(error, KeyError):
        return error.args[0] in _LABELS
    return isinstance(error, (TypeError, AttributeError)) and "NoneType" in str(error)


@contextmanager
def _unheard(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    with ExitStack() as stack:
        for child in module.modules():
            if isinstance(child, pl.LightningModule):
                stack.enter_context(_without_logging(child))
            if isinstance(child, (Metric, MetricCollection)):
                stack.enter_context(_metric_kept(child))
        loggers = trainer.loggers
        stack.callback(setattr, trainer, "loggers", loggers)
        trainer.loggers = [DummyLogger() for _ in loggers]
        yield


@contextmanager
def _without_logging(module: pl.LightningModule) -> Iterator[None]:
    """Shadow ``log`` and ``log_dict``, which raise outside of the Trainer's loops."""
    shadowed: dict[str, Any] = {
        name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)
    }
    vars(module).update(log=_ignore, log_dict=_ignore)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del vars(module)[name]
        vars(module).update(shadowed)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Take what ``log`` takes, and do nothing with it."""


@contextmanager
def _metric_kept(metric: Metric | MetricCollection) -> Iterator[None]:
    """Keep a metric's state, and let it talk to no other rank, which may have fewer batches."""
    if isinstance(metric, MetricCollection):
        names: tuple[str, ...] = ("_groups", "_groups_checked", "_state_is_copy")
    else:
        names = ("_update_count", "_computed", "_is_synced", "_to_sync", "dist_sync_on_step")
        names += tuple(metric.metric_state)
    kept = {name: getattr(metric, name) for name in names}
    for name, value in kept.items():  # the originals are set aside; the block works on copies
        setattr(metric, name, _copy(value))
    if isinstance(metric, Metric):
        metric.dist_sync_on_step = False
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(metric, name, value)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else deepcopy(value)


def _precision(trainer: pl.Trainer, module: pl.LightningModule) -> AbstractContextManager[Any]:
    plugin = trainer.precision_plugin
    if isinstance(plugin, MixedPrecision) and plugin.precision == "16-mixed":
        return torch.autocast(module.device.type, enabled=False)
    return plugin.train_step_context()
