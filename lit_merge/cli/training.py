"""What the commands with a Trainer share: its options, defaults, and a check of its processes."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser

# Imported for their classes: a configuration may name those that exist by their short names.
import lit_merge.callbacks
import lit_merge.tasks  # noqa: F401
from lit_merge.cli.parsing import add_config, parser_settings
from lit_merge.errors import InputError
from lit_merge.tasks.task import Task

DEFAULT_SEED = 0

_FROM_FABRIC = {
    "LT_ACCELERATOR": "accelerator",
    "LT_STRATEGY": "strategy",
    "LT_DEVICES": "devices",
    "LT_NUM_NODES": "num_nodes",
    "LT_PRECISION": "precision",
}


def training_parser(
    command: str, description: str, *, defaults: Mapping[str, Any]
) -> LightningArgumentParser:
    """Return a parser with the Trainer's options under ``trainer``, and ``seed_everything``.

    Args:
        command: The command's name.
        description: The first sentence of its help.
        defaults: The command's own defaults for the Trainer.
    """
    parser = LightningArgumentParser(**parser_settings(command, description))
    add_config(parser)
    parser.add_argument(
        "--seed_everything", type=int, default=DEFAULT_SEED, help="Seed of all random numbers."
    )
    parser.add_lightning_class_args(Trainer, "trainer")
    chosen = {**defaults, **trainer_defaults()}
    parser.set_defaults({f"trainer.{name}": value for name, value in chosen.items()})
    return parser


def add_tasks(parser: ArgumentParser, *, required: bool = True) -> None:
    """Add the option ``tasks``: tasks by name, or a YAML file with them."""
    parser.add_argument(
        "--tasks",
        type=dict[str, Task] if required else dict[str, Task] | None,
        required=required,
        sub_configs=True,
        help="A Task per name, or a YAML file with them; the names are those of the experts.",
    )


def trainer_defaults() -> dict[str, Any]:
    """Return the Trainer's options that ``fabric run`` was given, which it passes in LT_… .

    Without them a run that fabric started several times over would be as many runs of one process.
    """
    if os.environ.get("LT_CLI_USED") != "1":
        return {}
    found = {name: os.environ[key] for key, name in _FROM_FABRIC.items() if key in os.environ}
    return {name: int(value) if value.isdecimal() else value for name, value in found.items()}


def make_trainer(options: Namespace, **overrides: Any) -> Trainer:
    """Return the Trainer that a command's options describe.

    Args:
        options: The command's options, instantiated.
        overrides: Options of the Trainer that the command does not leave to the user.

    Raises:
        InputError: If the Trainer would not use all processes that a launcher started.
    """
    seed_everything(options.seed_everything, workers=True, verbose=False)
    trainer = Trainer(**{**options.trainer.as_dict(), **overrides})
    check_world_size(trainer)
    return trainer


def log_learning_rates(trainer: Trainer) -> None:
    """Log the learning rate of every step, where there is a logger."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if trainer.loggers and not any(isinstance(one, LearningRateMonitor) for one in callbacks):
        callbacks.append(LearningRateMonitor(logging_interval="step"))


def measured(trainer: Trainer) -> dict[str, float]:
    """Return the last value of everything that a fit has logged."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def check_world_size(trainer: Trainer) -> None:
    """Refuse to run as one of several processes that know nothing of each other.

    Raises:
        InputError: If torchrun or fabric started another number of processes than the Trainer uses.
    """
    started = int(os.environ.get("WORLD_SIZE", trainer.world_size))
    if started != trainer.world_size:
        raise InputError(
            f"trainer.devices: must use all processes that the launcher started; got {started} "
            f"processes for a Trainer of {trainer.world_size}. Add --trainer.devices "
            f"{os.environ.get('LOCAL_WORLD_SIZE', started)} --trainer.strategy ddp (and "
            "--trainer.num_nodes), or start one process."
        )


def quiet() -> None:
    """Leave out Lightning's advertisements, and warnings of what lit-merge does on purpose."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    for message in (
        ".*does not have many workers",  # the data are in memory
        ".*Total length of `list` across ranks is zero",  # a task without validation examples
        ".*number of training batches .* is smaller than the logging interval",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # inside Lightning
    ):
        warnings.filterwarnings("ignore", message=message)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
