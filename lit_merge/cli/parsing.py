"""Parsers of the subcommands: jsonargparse, with errors that are :class:`InputError`.

Every command takes ``--config FILE`` (several times), dotted overrides and ``--print_config``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
from argparse import ArgumentError
from collections.abc import Collection, Sequence
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]

import lit_merge
from lit_merge.errors import InputError


def command_parser(command: str, description: str) -> ArgumentParser:
    """Return a parser for one command that knows ``--config`` and ``--print_config``.

    Args:
        command: The command's name.
        description: The first sentence of its help.
    """
    parser = ArgumentParser(**parser_settings(command, description))
    add_config(parser)
    return parser


def parser_settings(command: str, description: str) -> dict[str, Any]:
    """Return the arguments with which a command's parser is made."""
    return {
        "prog": f"lit-merge {command}",
        "description": description,
        "exit_on_error": False,
        "default_env": False,
        "allow_abbrev": False,
    }


def add_config(parser: ArgumentParser) -> None:
    """Add ``--config``, and with it ``--print_config``."""
    parser.add_argument(
        "-c", "--config", action=ActionConfigFile, help="YAML file with any of the options."
    )


def add_switch(parser: ArgumentParser, name: str, text: str) -> None:
    """Add an option that is off by default and takes ``true`` and ``false``, or nothing for on."""
    parser.add_argument(f"--{name}", type=bool, nargs="?", const=True, default=False, help=text)


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse a command's arguments.

    Raises:
        InputError: If an option is unknown or missing, or a value is none that it takes.
    """
    try:
        config: Namespace = parser.parse_args(list(argv))
        return config
    except ArgumentError as error:
        raise InputError(_message(parser, str(error))) from error
    except ModuleNotFoundError as error:  # of the path of a class
        raise InputError(
            f"{error.name}: must be a module that can be imported; got none of that name. Name a "
            "class by its path, my_package.MyClass, and run this where my_package is, or put that "
            "folder on PYTHONPATH."
        ) from error


def instantiate(parser: ArgumentParser, config: Namespace) -> Namespace:
    """Make the objects that a configuration names.

    Raises:
        InputError: If a class does not take the arguments that it was given.
    """
    try:
        made: Namespace = parser.instantiate(config)
        return made
    except ArgumentError as error:
        raise InputError(_message(parser, str(error))) from error
    except InputError:
        raise
    except (ModuleNotFoundError, ValueError) as error:
        # A ValueError is of a value of several types, with a message for each.
        if missing := missing_package(error):
            raise missing from error
        own = re.search(r"^\s*- (\S+: must .*)", str(error), re.MULTILINE)
        raise InputError(own[1] if own else _message(parser, str(error))) from error


def missing_package(error: BaseException) -> InputError | None:
    """Return the error for a class that needs a package which is not installed; None for others.

    Args:
        error: What was raised; jsonargparse wraps what a class raises in errors of its own.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ModuleNotFoundError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    reason = (str(cause).splitlines() or ["no such package"])[0].rstrip(".")
    named = re.search(r"`([\w.-]+)`", reason)
    package = cause.name or (named[1] if named else "PACKAGE")
    return InputError(
        f"configuration: must name classes whose packages are installed; got {reason!r}. Install "
        f"it (pip install {package}), or name another class."
    )


def given_options(parser: ArgumentParser, config: Namespace) -> str:
    """Return the configuration of a run as YAML, for its provenance."""
    return str(parser.dump(config))


def is_first_process() -> bool:
    """Return whether this process is the first that a launcher started, or the only one."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def _message(parser: ArgumentParser, text: str) -> str:
    """Return jsonargparse's message in one line, with what was probably meant."""
    text = re.sub(r"\s*\n\s*", " ", text.strip())
    text = re.sub(r"<class '([^']*)'>", r"\1", text)
    text = re.sub(r'Parser key "([^"]*)":', r"\1:", text)
    text = re.sub(
        r"Expected a typing\.Literal\[(.*?)\]\. Got value:", r"must be one of \1; got", text
    )
    text = re.sub(r"Expected an? (.*?)\. Got value:", r"must be of type \1; got", text)
    fix = f'Run "{parser.prog} --help_all" for the options.'
    options = {action.dest for action in parser._actions} - {"help", "print_config"}
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        word = found[1]
        if word.startswith("-"):
            fix = _near(word.lstrip("-").split("=")[0], options, "--") or fix
        else:
            fix = "Give files before the options, and a value to each option."
    elif found := re.search(r"Option '([^']*)' is not accepted", text):
        owner = re.search(r"given class_path '([^']*)'", text)
        known = _parameters(owner[1]) if owner else options
        fix = _near(found[1], known, "") or fix
    elif found := re.search(r"Expected a dot import path string: (\S+)", text):
        text = text.replace(found[0], f"must be the name of a class; got {found[1]}.")
        fix = _near(found[1], lit_merge.__all__, "") or (
            "Name a class of lit_merge, or the path of your own: my_package.MyClass."
        )
    return f"{text.rstrip('.')}. {fix}"


def _near(word: str, known: Collection[str], prefix: str) -> str:
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f'Did you mean "{prefix}{near[0]}"?' if near else ""


def _parameters(class_path: str) -> set[str]:
    module, _, name = class_path.rpartition(".")
    return set(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
