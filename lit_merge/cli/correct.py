"""``lit-merge correct``: a Trainer fits a MergeModule.

It starts from a merged folder, or merges experts in memory: of one base, or in ``groups`` by base,
which are aligned first. With ``trainer.max_steps: 0`` all stays as the closed form has set it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Trainer
from torch import nn

from lit_merge.cli.groups import add_groups, align_groups, aligned_folder, require_alone
from lit_merge.cli.json_output import add_json, json_result
from lit_merge.cli.parsing import add_switch, given_options, instantiate, parse
from lit_merge.cli.training import (
    add_tasks,
    log_learning_rates,
    make_trainer,
    measured,
    quiet,
    training_parser,
)
from lit_merge.correction import RescaleShift
from lit_merge.errors import InputError
from lit_merge.module import MergeModule
from lit_merge.output import require_free
from lit_merge.tasks import MultiTaskDataModule

TRAINER = {
    "max_steps": 300,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 5,  # of a short fit; a divisor of holdout_every, whose losses it logs
}
"""The command's own defaults for the Trainer."""

# Arguments that are no options of the same name, or given apart.
_APART: dict[type, frozenset[str]] = {
    MergeModule: frozenset(
        {
            *("model", "base", "merged", "experts", "correction", "seed"),
        }
    ),
    MultiTaskDataModule: frozenset({"tasks", "seed"}),
}


def correct_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = training_parser("correct", "Repair a merged model.", defaults=TRAINER)
    parser.add_subclass_arguments(nn.Module, "model", fail_untyped=False, required=True)
    parser.add_argument(
        "--merged", type=str | None, help='What "lit-merge merge" has written, to start from.'
    )
    parser.add_argument(
        "--experts",
        type=dict[str, str],
        default={},
        help="The experts by task, which teach; without merged they are merged first.",
    )
    parser.add_argument(
        "--base", type=str | None, help="What the experts were fine-tuned from, without merged."
    )
    add_groups(parser)
    add_tasks(parser)
    parser.add_argument(
        "--correction",
        type=type[nn.Module],
        default=RescaleShift,
        help="A class of corrections, made from (number of tasks, number of channels).",
    )
    for kind, left_out in _APART.items():
        parser.add_class_arguments(kind, skip=set(left_out))
    parser.add_argument("--output", type=str, required=True, help="The corrected folder to write.")
    add_switch(parser, "replace", "Replace an existing output.")
    add_json(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge correct``.

    Raises:
        InputError: If the configuration does not fit, the output is not free, or
            :class:`~lit_merge.module.MergeModule` refuses its input.
    """
    quiet()
    parser = correct_parser()
    config = parse(parser, argv)
    require_free(config.output, replace=config.replace)
    _require_start(config)
    folder = aligned_folder(config) if config.groups else None
    options = instantiate(parser, config)
    with json_result("correct", asked=options.json) as result:
        trainer, path = _correct(options, folder, given_options(parser, config))
        if trainer.is_global_zero and result.asked:
            told = {"tasks": list(options.tasks), "steps": trainer.global_step}
            result.show({**told, "metrics": measured(trainer)}, output=path)
        elif trainer.is_global_zero:
            print(f"corrected: {path}")
    return 0


def _correct(options: Namespace, folder: Path | None, configuration: str) -> tuple[Trainer, Path]:
    """Correct, into the output; return the Trainer that did and the folder.

    Args:
        options: The options, instantiated.
        folder: Where experts of several bases are aligned to; None for one base.
        configuration: The options as YAML, to be recorded.
    """
    trainer = make_trainer(options)
    log_learning_rates(trainer)
    base, experts = options.base, options.experts
    if folder is not None:
        base, experts = align_groups(options, folder, model=options.model, tasks=options.tasks)
    module = MergeModule(
        options.model,
        merged=options.merged,
        base=base,
        experts=experts,
        correction=options.correction,
        seed=options.seed_everything,
        **_settings(options, MergeModule),
    )
    data = MultiTaskDataModule(
        options.tasks, seed=options.seed_everything, **_settings(options, MultiTaskDataModule)
    )
    trainer.fit(module, datamodule=data)
    path = module.save_corrected(
        options.output, replace=options.replace, configuration=configuration
    )
    return trainer, path


def _require_start(config: Namespace) -> None:
    """Check that there is one thing to start from.

    Raises:
        InputError: Groups are given together with what they stand in place of, or there is neither
            a merged folder nor anything to merge.
    """
    if config.groups:
        require_alone(config, "merged", "base", "experts")
    elif config.aligned:
        raise InputError(
            f"aligned: must be left out without groups; got {config.aligned!r}. Give groups."
        )
    elif not config.merged and not config.experts:
        raise InputError(
            "merged: must be given, or experts, or groups of experts, to merge; got none of them. "
            'Give the folder that "lit-merge merge" wrote.'
        )


def _settings(options: Namespace, kind: type) -> dict[str, Any]:
    """Return the options that are arguments of a class."""
    names = set(inspect.signature(kind).parameters) - _APART[kind]
    return {name: options[name] for name in names}
