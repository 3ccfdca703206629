"""``lit-merge evaluate``: the function :func:`lit_merge.evaluate` with its arguments from YAML."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace

from jsonargparse import ArgumentParser
from torch import nn

from lit_merge.cli.json_output import add_json, json_result
from lit_merge.cli.parsing import add_switch, given_options, instantiate, parse
from lit_merge.cli.training import add_tasks, make_trainer, quiet, training_parser
from lit_merge.evaluation.file import write_evaluation
from lit_merge.evaluation.measurement import evaluate
from lit_merge.evaluation.model_entry import ModelEntry
from lit_merge.output import require_free_file
from lit_merge.terminal import print_evaluation

TRAINER = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
"""The command's own defaults for the Trainer: it leaves nothing behind but evaluation.json."""


def evaluate_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = training_parser("evaluate", "Test models on every task.", defaults=TRAINER)
    parser.add_subclass_arguments(nn.Module, "model", fail_untyped=False, required=True)
    parser.add_argument(
        "--models",
        type=dict[str, str | ModelEntry],
        required=True,
        help="Base, experts, merged and corrected models: a path or {path, kind, task} by name.",
    )
    add_tasks(parser)
    skipped: set[str | int] = {"trainer", "model", "models", "tasks", "probe", "variance", "seed"}
    parser.add_function_arguments(evaluate, skip=skipped)
    add_switch(
        parser,
        "linear_probe",
        "Add the control: a linear head on the base's features, fitted on `examples` examples.",
    )
    add_switch(parser, "variance", "Measure the activations' variance by site.")
    parser.add_argument(
        "--output", type=str, default="evaluation.json", help="The evaluation.json to write."
    )
    add_switch(parser, "replace", "Replace an existing output.")
    add_json(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge evaluate``.

    Raises:
        InputError: As :func:`lit_merge.evaluate`, and for a configuration that does not fit it.
    """
    quiet()
    parser = evaluate_parser()
    config = parse(parser, argv)
    require_free_file(config.output, replace=config.replace)
    options = instantiate(parser, config)
    with json_result("evaluate", asked=options.json) as result:
        with redirect_stdout(sys.stderr):  # Lightning's progress bars; our output is the table
            trainer = make_trainer(options)
            evaluation = evaluate(
                trainer,
                options.model,
                options.models,
                options.tasks,
                probe=options.linear_probe,
                variance=options.variance,
                seed=options.seed_everything,
                batch_size=options.batch_size,
                examples=options.examples,
                sites=options.sites,
                policy=options.policy,
            )
        if not trainer.is_global_zero:
            return 0
        command = shlex.join(["lit-merge", "evaluate", *argv])
        made = {"command": command, "configuration": given_options(parser, config)}
        evaluation = replace(evaluation, provenance={**evaluation.provenance, **made})
        path = write_evaluation(config.output, evaluation, replace=config.replace)
        if result.asked:
            result.show(evaluation.as_dict(), output=path)
        else:
            print_evaluation(evaluation)
            print(f"evaluation: {path}")
    return 0
