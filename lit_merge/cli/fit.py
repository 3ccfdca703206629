"""``lit-merge fit``: LightningCLI with our modules, data modules and callbacks at hand.

Any LightningModule and LightningDataModule can be trained, by the path of its class; those of
lit-merge and of Lightning by their names alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)

from lit_merge.cli.json_output import add_json, json_result
from lit_merge.cli.parsing import missing_package, parse, parser_settings
from lit_merge.cli.training import (
    DEFAULT_SEED,
    check_world_size,
    log_learning_rates,
    measured,
    quiet,
    trainer_defaults,
)


class SaveConfigBesideCheckpoints(SaveConfigCallback):
    """Write ``config.yaml`` to the log folder, without a logger to the folder of the checkpoints.

    Lightning's own callback would leave it in the working folder of a run without a logger, for
    the next run to overwrite.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing yet: the folder of the checkpoints is not known."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        folder: str | Path | None = trainer.log_dir  # on every rank: it is a broadcast
        checkpoint = trainer.checkpoint_callback
        if not trainer.loggers and isinstance(checkpoint, ModelCheckpoint):
            folder = checkpoint.dirpath
        if trainer.is_global_zero and folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.parser.save(
                self.config, Path(folder) / self.config_filename, skip_unset=False, overwrite=True
            )


class FitCLI(LightningCLI):
    """LightningCLI for one command, whose errors are :class:`~lit_merge.errors.InputError`.

    Args:
        argv: The arguments after the command's name.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            SaveConfigBesideCheckpoints,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_defaults=trainer_defaults(),
            seed_everything_default=DEFAULT_SEED,
            parser_kwargs=parser_settings("fit", "Train an expert."),
            auto_configure_optimizers=False,  # our modules and most others bring their own
            args=list(argv),
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what ``Trainer.fit`` takes beside model and data."""
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            help="Lightning checkpoint to resume from; 'last' for the newest.",
        )
        add_json(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; without LightningCLI's warning about arguments that are not from sys.argv."""
        assert isinstance(args, list)
        self.config = parse(parser, args)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Make the Trainer and hold it against the processes that were started."""
        trainer = super().instantiate_trainer(**kwargs)
        check_world_size(trainer)
        log_learning_rates(trainer)
        return trainer

    def instantiate_classes(self) -> None:
        """Make the classes, of which one may need a package that is not installed."""
        try:
            super().instantiate_classes()
        except (ModuleNotFoundError, ValueError) as error:
            if missing := missing_package(error):
                raise missing from error
            raise


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge fit``.

    Raises:
        InputError: If the configuration does not fit the classes, or a class, callback or file
            refuses its input.
    """
    quiet()
    cli = FitCLI(argv)
    with json_result("fit", asked=cli.config.json) as result:
        trainer = cli.trainer
        trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path)
        if result.asked and trainer.is_global_zero:
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            folders = (getattr(callback, "written", None) for callback in callbacks)
            experts = [folder for folder in folders if folder is not None]
            checkpoint = trainer.checkpoint_callback
            best = getattr(checkpoint, "best_model_path", "") or None
            told = {"checkpoint": best, "epochs": trainer.current_epoch}
            told |= {"steps": trainer.global_step, "metrics": measured(trainer)}
            result.show(told, output=next(iter(experts), None))
    return 0
