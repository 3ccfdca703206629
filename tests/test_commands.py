from __future__ import annotations

import importlib
import re
from collections.abc import Callable

import pytest
from jsonargparse import ArgumentParser

from lit_merge.cli import main
from lit_merge.cli.align import align_parser
from lit_merge.cli.commands import COMMANDS, Command
from lit_merge.cli.correct import correct_parser
from lit_merge.cli.curvature import curvature_parser
from lit_merge.cli.evaluate import evaluate_parser
from lit_merge.cli.export import export_parser
from lit_merge.cli.forecast import forecast_parser
from lit_merge.cli.merge import merge_parser

PARSERS: dict[str, Callable[[], ArgumentParser]] = {
    "curvature": curvature_parser,
    "align": align_parser,
    "merge": merge_parser,
    "forecast": forecast_parser,
    "correct": correct_parser,
    "evaluate": evaluate_parser,
    "export": export_parser,
}
_BY_NAME = {command.name: command for command in COMMANDS}


def names(command: Command) -> list[str]:
    """Return the options of a page without dashes, values and what stands for a name."""
    words = [option.split()[0] for option, _ in command.options]
    plain = [word.removeprefix("--").removesuffix("+=CLASS") for word in words]
    return [re.sub(r"(\.[A-Z]+)+$", "", word) for word in plain if not word.isupper()]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command.name))
def test_function_of_a_command_exists(command: Command) -> None:
    module, name = command.function.split(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("name", PARSERS)
def test_page_names_only_options_that_there_are(name: str) -> None:
    known = {action.dest for action in PARSERS[name]()._actions}
    prefixes = {dest.split(".")[0] for dest in known}
    assert names(_BY_NAME[name])
    assert [option for option in names(_BY_NAME[name]) if option not in known | prefixes] == []


@pytest.mark.parametrize("name", ["fit", "inspect", "report"])
def test_page_names_only_options_of_the_full_help(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help_all"]) == 0
    full = capsys.readouterr().out
    assert [option for option in names(_BY_NAME[name]) if f"--{option}" not in full] == []


@pytest.mark.parametrize("command", COMMANDS[:-1], ids=lambda command: str(command.name))
def test_page_fits_a_terminal(command: Command) -> None:
    lines = command.page().splitlines()
    assert lines[0].startswith(f"usage: lit-merge {command.name} ")
    assert max(len(line) for line in lines) <= 100
    assert command.example in command.page()
