"""``lit-merge completion``: what can be completed, taken from the parsers of all commands.

The script that is printed holds the words themselves (:mod:`lit_merge.cli.completion_scripts`), so
that pressing TAB starts no Python. Printing it builds every parser once, which takes seconds.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

import lit_merge
from lit_merge.cli.commands import COMMANDS, Command
from lit_merge.cli.completion_scripts import SCRIPTS
from lit_merge.cli.json_output import add_json
from lit_merge.cli.parsing import command_parser, parse

_PARSERS = {
    "fit": "completion:fit_parser",
    "curvature": "curvature:curvature_parser",
    "align": "align:align_parser",
    "merge": "merge:merge_parser",
    "forecast": "forecast:forecast_parser",
    "correct": "correct:correct_parser",
    "evaluate": "evaluate:evaluate_parser",
    "export": "export:export_parser",
    "run": "run:run_parser",
}
# Where the classes are that a configuration may name without their modules.
_CLASSES = ("lit_merge.callbacks", "lightning.pytorch.callbacks", "lightning.pytorch.loggers")
_HELP = ("--help", "--help_all")


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge completion``.

    Raises:
        InputError: The shell is none of those that there are scripts for.
    """
    parser = command_parser("completion", "Print a script for a shell's completion.")
    parser.add_argument("shell", choices=list(SCRIPTS), help="The shell.")
    shell = parse(parser, argv).shell
    print(SCRIPTS[shell]({command.name: words_of(command) for command in COMMANDS}))
    return 0


def words_of(command: Command) -> dict[str, tuple[str, ...]]:
    """Return the options of a command, each with the values that can be listed; files have none.

    The options are those of its parser, or of its help page where it has none of its own.
    """
    shown = re.findall(r"--[a-z_]+(?:\.[a-z_]+)*", " ".join(name for name, _ in command.options))
    words: dict[str, tuple[str, ...]] = dict.fromkeys((*shown, *_HELP), ())
    if command.name == "completion":
        return dict.fromkeys(SCRIPTS, ())
    if command.name not in _PARSERS:
        return words
    module, function = _PARSERS[command.name].split(":")
    parser = getattr(importlib.import_module(f"lit_merge.cli.{module}"), function)()
    for action in parser._actions:
        names = [name for name in action.option_strings if name.startswith("--")]
        if action.help == "==SUPPRESS==" or any(name.endswith(".help") for name in names):
            continue
        typed = getattr(action, "_typehint", None)
        classes = _classes(typed)
        values = (*_listed(typed), *sorted(cls.__name__ for cls in classes))
        words |= dict.fromkeys(names, values)
        if get_origin(typed) is not dict and not any(name.endswith("+") for name in names[1:]):
            words |= {f"{names[0]}.{name}": () for cls in classes for name in _arguments(cls)}
    return dict(sorted(words.items()))


def fit_parser() -> ArgumentParser:
    """Return a parser with the options of ``fit``, whose own LightningCLI makes as it runs."""
    from lightning.pytorch import LightningDataModule, LightningModule

    from lit_merge.cli.training import training_parser

    parser = training_parser("fit", "Train an expert.", defaults={})
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    parser.add_argument("--ckpt_path", type=str | None)
    add_json(parser)
    return parser


def _listed(typed: Any) -> tuple[str, ...]:
    """Return the values of a type that has few."""
    if get_origin(typed) is Literal:
        return tuple(str(value) for value in get_args(typed))
    if typed is bool:
        return ("true", "false")
    return tuple(dict.fromkeys(word for part in get_args(typed) for word in _listed(part)))


def _classes(typed: Any) -> list[type]:
    """Return the classes that can be named by their short names where a type is asked for."""
    wanted = [one for one in _flat(typed) if _is_chosen_by_name(one)]
    found = [cls for cls in _public() if any(issubclass(cls, one) for one in wanted)]
    return [cls for cls in found if not inspect.isabstract(cls)]


def _flat(typed: Any) -> Iterable[type]:
    if isinstance(typed, type) and get_origin(typed) is None:
        yield typed
    for part in get_args(typed):
        yield from _flat(part)


def _is_chosen_by_name(cls: type) -> bool:
    """Return whether a class is one of which configurations name a subclass."""
    return cls.__module__.split(".")[0] in ("lit_merge", "lightning", "torch")


def _public() -> list[type]:
    names = [getattr(lit_merge, name) for name in lit_merge.__all__]
    for module in map(importlib.import_module, _CLASSES):
        names += [getattr(module, name) for name in getattr(module, "__all__", ())]
    return list(dict.fromkeys(name for name in names if isinstance(name, type)))


def _arguments(cls: type) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(cls).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in kinds]
