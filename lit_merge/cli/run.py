"""``lit-merge run``: the commands of a recipe, one after the other, in this process."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_merge.cli.commands import COMMANDS
from lit_merge.cli.json_output import JsonResult, json_result
from lit_merge.errors import InputError
from lit_merge.recipe import RunFolder, Step, fill, plan

OUTPUT = "output"
"""The variable that every recipe has: the folder of the run."""


def run_parser() -> argparse.ArgumentParser:
    """Return the parser of the command.

    It is a plain one: in a recipe the classes' arguments may be variables, which jsonargparse would
    take for wrong values.
    """
    parser = argparse.ArgumentParser(
        prog="lit-merge run", description="Run the commands of a recipe.", allow_abbrev=False
    )
    parser.add_argument("-c", "--config", required=True, help="YAML file with variables and steps.")
    parser.add_argument(
        "--variables",
        metavar="MAPPING",
        type=_mapping,
        default={},
        help="Other values for the recipe's variables; --variables.NAME VALUE for one.",
    )
    parser.add_argument(
        "--list", action="store_true", help="Say what would be done, and do nothing."
    )
    parser.add_argument(
        "--json", action="store_true", help="Print one JSON object instead of text, with the steps."
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge run``.

    Raises:
        InputError: If the recipe is not as it should be, the folder holds something else, or a
            launcher has started several processes.
    """
    parser = run_parser()
    options, rest = parser.parse_known_args(list(argv))
    steps, variables = read_recipe(options.config)
    given = {**variables, **options.variables, **_given(rest)}
    with json_result("run", asked=options.json) as result:
        ran = run_recipe(steps, given, list_only=options.list)
        if result.asked:
            ran.show(result)
    return ran.status


@dataclass(frozen=True)
class RecipeRun:
    """What :func:`run_recipe` has done.

    Attributes:
        status: The exit status: that of the first step that fails, or 0.
        output: The folder of the run.
        steps: Of each step that was reached: its number, title, command line, whether it is
            ``done``, ``skipped`` as done before, ``failed`` or, of a list, ``planned``, and the
            seconds that it took, null where it did not run to its end.
    """

    status: int
    output: Path
    steps: tuple[Mapping[str, Any], ...]

    def show(self, result: JsonResult) -> None:
        """Print it as JSON."""
        result.show({"status": self.status, "steps": self.steps}, output=self.output)


def read_recipe(path: str) -> tuple[list[Any], dict[str, Any]]:
    """Return the steps and the variables of a recipe's file.

    Raises:
        InputError: If it is no YAML, or has something else in it.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise InputError(
            f"{path}: must be a YAML file; got {reason}. Name a recipe: configs/run_text.yaml."
        ) from error
    if not isinstance(content, dict) or set(content) - {"variables", "steps"}:
        names = ", ".join(map(str, content)) if isinstance(content, dict) else repr(content)
        raise InputError(
            f"{path}: must be a recipe, with variables and steps alone; got {names[:200]}. Run "
            "other files with their own command."
        )
    steps, variables = content.get("steps"), content.get("variables") or {}
    if not isinstance(steps, list) or not isinstance(variables, dict):
        raise InputError(
            f"{path}: steps must be a list, and variables a mapping; got "
            f"{type(steps).__name__} and {type(variables).__name__}. Correct the recipe."
        )
    return steps, variables


def _mapping(text: str) -> dict[str, Any]:
    value = yaml.safe_load(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a mapping; got {text!r}")
    return value


def _given(words: Sequence[str]) -> dict[str, Any]:
    """Return the variables of a command line: ``--variables.NAME VALUE`` or ``…=VALUE``."""
    given: dict[str, Any] = {}
    rest = list(words)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        name = option.removeprefix("--variables.")
        if name == option or not name or not (equals or rest):
            raise InputError(
                f"{option}: must be --variables.NAME VALUE; got something else. Run "
                '"lit-merge run --help" for the options.'
            )
        text = value if equals else rest.pop(0)
        try:
            given[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(
                f"variables.{name}: must be a value in YAML; got {text!r}. Put it in quotes."
            ) from error
    return given


def run_recipe(
    steps: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, list_only: bool = False
) -> RecipeRun:
    """Do what a recipe says, but for the steps that are done.

    Args:
        steps: The recipe's steps.
        variables: Its variables.
        list_only: Whether to print the steps and do nothing.

    Raises:
        InputError: As :func:`main`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "run: must be started as one process; got several from a launcher. Start lit-merge run "
            "by itself, and give devices to the Trainers in its steps."
        )
    commands = {command.name: command for command in COMMANDS if command.name != "run"}
    planned = plan(steps, variables)
    for step in planned:
        if step.command not in commands:
            raise InputError(
                f"{step.title}: command must be one of {', '.join(commands)}; got "
                f"{step.command!r}. Correct the step."
            )
    folder = RunFolder(_output(variables))

    from rich.console import Console

    console = Console()
    begun = False
    start = time.perf_counter()
    reached: list[dict[str, Any]] = []
    for step in planned:
        begun = begun or not folder.is_done(step)
        console.rule(f"[bold]{step.number}/{len(planned)} {step.title}", align="left")
        words, state, status, seconds = [step.command, *step.arguments], "planned", 0, None
        if not begun:
            state, seconds = "skipped", folder.seconds(step)
            console.print(f"done before, in {seconds:.1f} s", style="dim")
        elif list_only:
            console.print(f"lit-merge {shlex.join(words)}", style="dim")
        else:
            replaces = any(option == "--replace" for option, _ in commands[step.command].options)
            words = folder.begin(step, replaces=replaces)
            status = _run(step, words, folder, console)
            state, seconds = ("failed", None) if status else ("done", folder.seconds(step))
        reached.append(
            {
                "number": step.number,
                "title": step.title,
                "command": f"lit-merge {shlex.join(words)}",
                "state": state,
                "seconds": seconds,
            }
        )
        if status:
            return RecipeRun(status, folder.path, tuple(reached))
    console.rule(align="left")
    if not list_only:
        console.print(f"Done in {time.perf_counter() - start:.0f} s: {folder.path}")
    return RecipeRun(0, folder.path, tuple(reached))


def _run(step: Step, words: list[str], folder: RunFolder, console: Any) -> int:
    from lit_merge.cli import main as run_command

    console.print(f"$ lit-merge {shlex.join(words)}", style="dim", soft_wrap=True)
    began = time.perf_counter()
    with _as_command_line(words):
        status = run_command(words)
    seconds = time.perf_counter() - began
    if status:
        console.print(f"stopped: step {step.number} has ended with {status}", style="bold red")
        return status
    folder.finish(step, seconds=seconds)
    console.print(f"{seconds:.1f} s", style="dim")
    return 0


@contextmanager
def _as_command_line(words: Sequence[str]) -> Iterator[None]:
    """Let a step look like a command of its own.

    Lightning starts the other processes of a Trainer with several devices by this process's
    command line: they must do the step, not the recipe.
    """
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before


def _output(variables: Mapping[str, Any]) -> str:
    output = fill(variables.get(OUTPUT), variables)
    if not isinstance(output, str) or not output:
        raise InputError(
            f"variables.{OUTPUT}: must be the folder of the run; got {output!r}. Give "
            f"--variables.{OUTPUT} runs/mine."
        )
    return output
