"""The folder of a timeline: every expert so far, and what was deployed at each time step.

========================= =========================================================================
``base/``                 the weights that the first fit began with, as an expert folder
``01-<task>/expert/``     the expert of the first time step
``01-<task>/deployed/``   the model to use after it: a merged folder
``01-<task>/average/``    the running average, where fits start from it and it is not deployed
``timeline.json``         rules and fingerprints; a step that it does not name has not happened
========================= =========================================================================

Jobs that are weeks apart go on with one folder, one job at a time. ``timeline.json`` is written
last, in one rename: of a step that was killed halfway nothing is left but a folder that the next
fit removes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_merge.callbacks.temporal_rules import first_difference
from lit_merge.checkpoint import fingerprint
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from lit_merge.expert.info import current_versions
from lit_merge.output import new_file
from lit_merge.strict_json import parse_json

FORMAT_VERSION = 1

_RECORD = "timeline.json"
_PARTS = {"expert", "deployed", "average"}


@dataclass(frozen=True)
class TimeStep:
    """One step of a timeline.

    Attributes:
        task: Its name, which no other step has.
        expert: Fingerprint of the expert.
        deployed: Fingerprint of the deployed model.
        average: Fingerprint of the running average, where it is kept.
    """

    task: str
    expert: str
    deployed: str
    average: str | None = None


@dataclass(frozen=True)
class Timeline:
    """A timeline as it is on the disk.

    Attributes:
        folder: Where it is.
        rules: :meth:`~lit_merge.callbacks.temporal_rules.Rules.settings`.
        base: Fingerprint of the base; None before the first fit.
        steps: The steps that have happened.
    """

    folder: Path
    rules: Mapping[str, Any]
    base: str | None = None
    steps: tuple[TimeStep, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, the oldest first."""
        return tuple(step.task for step in self.steps)

    @property
    def base_folder(self) -> Path:
        """Where the base is."""
        return self.folder / "base"

    def step_folder(self, task: str) -> Path:
        """Return the folder of a task's step; of a new task, the next one's."""
        tasks = [*self.tasks, task]
        return self.folder / f"{tasks.index(task) + 1:02}-{task}"

    def before(self, task: str) -> Timeline:
        """Return the timeline without the step of a task and all that came after it."""
        return dataclasses.replace(self, steps=self.steps[: self.tasks.index(task)])

    def start(self, init: str) -> Path:
        """Return the folder of the weights that the next fit starts from."""
        if init == "fresh" or not self.steps:
            return self.base_folder
        last = self.steps[-1]
        if init == "last":
            return self.step_folder(last.task) / "expert"
        return self.step_folder(last.task) / ("deployed" if last.average is None else "average")

    def experts(self) -> dict[str, str]:
        """Return the folders of the experts by task."""
        return {task: str(self.step_folder(task) / "expert") for task in self.tasks}

    def check_files(self, start: Path) -> None:
        """Check that what the next step needs is there, and is what it was.

        Args:
            start: The folder that the next fit starts from.

        Raises:
            InputError: Weights are gone, broken, or others than those recorded.
        """
        wanted = {self.base_folder: self.base}
        for step in self.steps:
            folder = self.step_folder(step.task)
            wanted[folder / "expert"] = step.expert
            average = folder / ("deployed" if step.average is None else "average")
            if average == start:
                wanted[average] = step.average or step.deployed
        for folder, recorded in wanted.items():
            found = weights_fingerprint(folder)
            if found != recorded:
                raise InputError(
                    f"{folder}: must hold the weights that {self.folder / _RECORD} names, "
                    f"{str(recorded)[:8]}…; got {found[:8]}…. Restore the folder, or begin another "
                    "timeline."
                )

    def remove_later(self) -> None:
        """Remove the folders of steps that are not, or no longer, part of the timeline."""
        kept = {self.step_folder(task) for task in self.tasks}
        for path in self.folder.glob("[0-9][0-9]*-*/"):
            parts = {part.name for part in path.iterdir() if not part.name.startswith(".")}
            if path not in kept and parts <= _PARTS:
                shutil.rmtree(path)

    def write(self) -> None:
        """Write ``timeline.json``."""
        content = {
            "format_version": FORMAT_VERSION,
            "rules": self.rules,
            "base": self.base,
            "steps": [dataclasses.asdict(step) for step in self.steps],
            "versions": current_versions(),
        }
        with new_file(self.folder / _RECORD, replace=True) as file:
            file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_timeline(folder: Path, rules: Mapping[str, Any]) -> Timeline:
    """Return a timeline, or an empty one where there is none yet.

    Args:
        folder: The folder.
        rules: What it must have been made with.

    Raises:
        InputError: The folder holds something else, its record is broken, or it has other rules.
    """
    record = folder / _RECORD
    if not record.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(
                f"{folder}: must be the folder of a timeline, or an empty or new one; got one "
                f"without {_RECORD}. Name another folder."
            )
        return Timeline(folder, rules)
    try:
        content = parse_json(record.read_bytes())
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise InputError(
                f"{record}: must have format_version {FORMAT_VERSION}; got {version!r}. Use the "
                "lit-merge that wrote it."
            )
        found = Timeline(
            folder,
            dict(content["rules"]),
            content["base"],
            tuple(TimeStep(**step) for step in content["steps"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{record}: must hold the record of a timeline; got a damaged one "
            f"({type(error).__name__}: {error}). Restore the file, or begin another timeline."
        ) from error
    key = first_difference(found.rules, rules)
    if key is not None:
        raise InputError(
            f"{key}: must be {found.rules.get(key)!r} as in {record}; got {rules.get(key)!r}. "
            "Keep the rules of a timeline, or begin another one."
        )
    return found


def weights_fingerprint(folder: Path) -> str:
    """Return the fingerprint of the weights in a folder.

    Raises:
        InputError: There are none that can be read.
    """
    expert = open_expert(folder)
    try:
        return fingerprint(expert.weights)
    finally:
        expert.close()
