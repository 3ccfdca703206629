"""What a recipe has done: the folder ``steps`` of its run.

``steps/01-fine-tune.yaml`` holds a step's options, so that the step can be repeated by hand;
``steps/done.json`` the steps that are done, each with a hash of its command. A step is skipped as
long as neither it nor one before it has changed.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import lit_merge
from lit_merge.errors import InputError
from lit_merge.output import new_file
from lit_merge.recipe.steps import Step
from lit_merge.strict_json import parse_json

_STEPS = "steps"
_DONE = "done.json"


def is_run_folder(path: Path) -> bool:
    """Return whether a recipe has begun to run into a folder."""
    return (path / _STEPS / _DONE).is_file()


class RunFolder:
    """The folder that a recipe writes to.

    Args:
        path: The folder: new, empty, or that of an earlier run of a recipe.

    Raises:
        InputError: If there is something else in it, or its record cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._steps = self.path / _STEPS
        used = self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
        if used and not is_run_folder(self.path):
            raise InputError(
                f"{self.path}: must be a new or empty folder, or that of an earlier run; got one "
                "with other files. Give another with --variables.output."
            )
        self._done: dict[str, dict[str, Any]] = {}
        if (self._steps / _DONE).is_file():
            self._done = dict(_read_done(self._steps / _DONE))

    def is_done(self, step: Step) -> bool:
        """Return whether a step is done with just these options."""
        found = self._done.get(step.name)
        return found is not None and found.get("sha256") == _hash(step)

    def seconds(self, step: Step) -> float:
        """Return how long a step took that is done."""
        return float(self._done[step.name].get("seconds", 0.0))

    def begin(self, step: Step, *, replaces: bool) -> list[str]:
        """Write a step's options, clear what an earlier try of it left, and return its command.

        Args:
            step: The step.
            replaces: Whether the command has the option ``replace``.

        Returns:
            The words after ``lit-merge``.
        """
        file = self._steps / f"{step.name}.yaml"
        # Not "is in done.json": a step that was killed at its very end has left its output too.
        again = file.is_file()
        self._forget(step)
        options = dict(step.options)
        words = [step.command, *step.arguments]
        if again and replaces:
            if options:
                options["replace"] = True
            else:
                words.append("--replace")
        if again and step.command == "fit":
            self._clear_fit(options)
        if options:
            words += ["--config", str(file)]
        with new_file(file, replace=True) as partial:
            text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True) if options else ""
            partial.write_text(f"# lit-merge {shlex.join(words)}\n{text}", encoding="utf-8")
        return words

    def finish(self, step: Step, *, seconds: float) -> None:
        """Record that a step is done."""
        self._done[step.name] = {
            "command": step.command,
            "sha256": _hash(step),
            "seconds": round(seconds, 1),
            "version": lit_merge.__version__,
        }
        self._write()

    def _forget(self, step: Step) -> None:
        self._done.pop(step.name, None)
        self._write()

    def _clear_fit(self, options: Mapping[str, Any]) -> None:
        """Remove the folder of a training that is done again, where it is one of this run."""
        root = (options.get("trainer") or {}).get("default_root_dir")
        if root is None:
            return
        folder, run = Path(root).resolve(), self.path.resolve()
        if folder.is_dir() and folder != run and folder.is_relative_to(run):
            shutil.rmtree(folder)

    def _write(self) -> None:
        self._steps.mkdir(parents=True, exist_ok=True)
        with new_file(self._steps / _DONE, replace=True) as partial:
            partial.write_text(json.dumps(self._done, indent=2, ensure_ascii=False) + "\n")


def _hash(step: Step) -> str:
    content = [step.command, list(step.arguments), dict(step.options)]
    text = json.dumps(content, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_done(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken(path, str(error)) from error
    if not isinstance(content, dict) or not all(isinstance(e, dict) for e in content.values()):
        raise _broken(path, "something else")
    return content


def _broken(path: Path, what: str) -> InputError:
    return InputError(
        f"{path}: must be JSON with an object for each step; got {what}. Remove the file: all "
        "steps are then done again."
    )
