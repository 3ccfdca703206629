"""``lit-merge correct``: a Trainer fits a MergeModule that starts from a merged folder.

With ``trainer.max_steps: 0`` the corrections stay as the closed form has set them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch import nn

from lit_merge.cli.parsing import add_switch, instantiate, parse
from lit_merge.cli.training import add_tasks, make_trainer, quiet, training_parser
from lit_merge.module import MergeModule
from lit_merge.output import require_free
from lit_merge.tasks import MultiTaskDataModule

TRAINER = {
    "max_steps": 300,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
"""The command's own defaults for the Trainer."""

# Arguments that are no options of the same name: given apart, or settled by "lit-merge merge".
_APART: dict[type, frozenset[str]] = {
    MergeModule: frozenset(
        {
            *("model", "merged", "experts", "seed", "correction"),
            *("base", "base_hessian", "method", "policy"),
        }
    ),
    MultiTaskDataModule: frozenset({"tasks", "seed"}),
}


def correct_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = training_parser("correct", "Repair a merged model.", defaults=TRAINER)
    parser.add_subclass_arguments(nn.Module, "model", fail_untyped=False, required=True)
    parser.add_argument(
        "--merged", type=str, required=True, help='What "lit-merge merge" has written.'
    )
    parser.add_argument(
        "--experts", type=dict[str, str], default={}, help="The experts, which teach, by task."
    )
    add_tasks(parser)
    for kind, left_out in _APART.items():
        parser.add_class_arguments(kind, skip=set(left_out))
    parser.add_argument("--output", type=str, required=True, help="The corrected folder to write.")
    add_switch(parser, "replace", "Replace an existing output.")
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
    options = instantiate(parser, config)
    module = MergeModule(
        options.model,
        merged=options.merged,
        experts=options.experts,
        seed=options.seed_everything,
        **_settings(options, MergeModule),
    )
    data = MultiTaskDataModule(
        options.tasks, seed=options.seed_everything, **_settings(options, MultiTaskDataModule)
    )
    trainer = make_trainer(options)
    trainer.fit(module, datamodule=data)
    path = module.save_corrected(options.output, replace=options.replace)
    if trainer.is_global_zero:
        print(f"corrected: {path}")
    return 0


def _settings(options: Namespace, kind: type) -> dict[str, Any]:
    """Return the options that are arguments of a class."""
    names = set(inspect.signature(kind).parameters) - _APART[kind]
    return {name: options[name] for name in names}
