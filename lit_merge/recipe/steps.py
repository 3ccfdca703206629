"""The commands of a recipe, in their order, with all variables filled in.

A step is a mapping with

* ``command``: a ``lit-merge`` command,
* ``title``: what it does, for people; the command's name without it,
* ``options``: what would stand in that command's YAML file,
* ``arguments``: words of its command line, for what is no option (the files of ``report``),
* ``each``: variables and their values, for each of which the step is repeated,
* ``when``: the step is left out where this is false;

or, in place of a command, ``steps``: further steps, which makes a loop of ``each``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_merge.errors import InputError
from lit_merge.recipe.filling import Scope, fill, repeat

_KEYS = {"command", "title", "options", "arguments", "each", "when", "steps"}


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        number: Its place in the recipe, from 1.
        title: What it does.
        command: The name of the ``lit-merge`` command.
        options: The content of its YAML file; empty where it needs none.
        arguments: Further words of its command line.
    """

    number: int
    title: str
    command: str
    options: Mapping[str, Any]
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """Number and title as the name of a file."""
        words = re.sub(r"[^a-z0-9=.]+", "-", self.title.lower()).strip("-.")
        return f"{self.number:02}-{words[:60].rstrip('-.')}"


def plan(steps: Sequence[Mapping[str, Any]], variables: Scope) -> tuple[Step, ...]:
    """Return the commands of a recipe.

    Args:
        steps: The recipe's steps.
        variables: Its variables.

    Raises:
        InputError: If a step is not as it should be, or a variable is not known.
    """
    return tuple(
        Step(number, title, command, options, arguments)
        for number, (title, command, options, arguments) in enumerate(
            _commands(steps, variables, place=""), start=1
        )
    )


def _commands(
    steps: Sequence[Mapping[str, Any]], scope: Scope, *, place: str
) -> Iterator[tuple[str, str, dict[str, Any], tuple[str, ...]]]:
    for index, step in enumerate(steps, start=1):
        here = f"steps {place}{index}"
        try:
            _check(step)
            for own in repeat(step, scope):
                if not fill(step.get("when", True), own):
                    continue
                if "steps" in step:
                    yield from _commands(step["steps"], own, place=f"{place}{index}.")
                    continue
                command = str(fill(step["command"], own))
                options = fill(step.get("options", {}), own)
                if not isinstance(options, dict):
                    raise InputError(
                        f"options: must be a mapping; got {options!r}. Write what stands in the "
                        f'YAML of "lit-merge {command}".'
                    )
                arguments = tuple(str(word) for word in fill(step.get("arguments", []), own))
                yield str(fill(step.get("title", command), own)), command, options, arguments
        except InputError as error:
            if str(error).startswith("steps "):
                raise
            raise InputError(f"{here}: {error}") from error


def _check(step: Mapping[str, Any]) -> None:
    unknown = sorted(set(step) - _KEYS)
    if unknown:
        raise InputError(
            f"a step must consist of {', '.join(sorted(_KEYS))}; got {', '.join(unknown)}. Options "
            "of the command stand under options."
        )
    if ("command" in step) == ("steps" in step):
        raise InputError(
            "a step must have a command, or steps of its own; got "
            f"{'both' if 'command' in step else 'neither'}. Name a lit-merge command."
        )
    others = sorted({"options", "arguments", "title"} & set(step))
    if "steps" in step and others:
        raise InputError(
            f"a step with steps must have no {others[0]}; got one. Give it to those steps."
        )
    for key, kind in (("steps", list), ("arguments", list)):
        if not isinstance(step.get(key, []), kind):
            raise InputError(f"{key}: must be a list; got {step[key]!r}. Put it in brackets.")
