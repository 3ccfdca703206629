"""Options of merge and correct for experts of several bases: ``groups``, ``align``, ``aligned``.

Groups are aligned before anything is merged. The aligned folder stays: its base is what is merged
onto, and its experts teach a later correction.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace
from torch import nn

from lit_merge.alignment.groups import BASE, ExpertGroup
from lit_merge.alignment.settings import AlignSettings
from lit_merge.errors import InputError
from lit_merge.output import require_free
from lit_merge.streaming.unfinished import Process

if TYPE_CHECKING:  # a merge of one base needs no Lightning, which takes seconds to import
    from lit_merge.tasks.task import Task


def add_groups(parser: ArgumentParser) -> None:
    """Add the options ``groups``, ``align`` and ``aligned``."""
    parser.add_argument(
        "--groups",
        type=dict[str, ExpertGroup] | None,
        help="Base and experts by group, for experts of different bases; the first group is the "
        "reference.",
    )
    parser.add_argument(
        "--align",
        type=bool | AlignSettings,
        default=True,
        help="How to align the groups: true for the defaults, false to take their midpoint as they "
        "are, or options: {by: weights}.",
    )
    parser.add_argument(
        "--aligned",
        type=str | None,
        help='The folder for the aligned experts; the output and "-aligned" when left out.',
    )


def aligned_folder(options: Namespace) -> Path:
    """Return where the aligned experts go.

    Args:
        options: With ``aligned``, ``output`` and ``replace``.

    Raises:
        InputError: It is not free, or several processes were started, of which each would align.
    """
    if Process.from_environment().count > 1 or int(os.environ.get("NODE_RANK", "0")) > 0:
        raise InputError(
            "groups: must be aligned by one process; got several, started by a launcher. Run "
            '"lit-merge align" first, and give its folder: base: aligned/base, experts: '
            "{task: aligned/task}."
        )
    if options.aligned is None and "://" in options.output:
        raise InputError(
            f"aligned: must be given where the output is a URL; got output {options.output!r}. "
            "Name a folder of this machine."
        )
    folder = Path(options.aligned or f"{options.output.rstrip('/')}-aligned")
    if not _started_by_another():
        require_free(folder, replace=options.replace)
    return folder


def align_groups(
    options: Namespace, folder: Path, *, model: nn.Module, tasks: Mapping[str, Task] | None
) -> tuple[str, dict[str, str]]:
    """Align groups into a folder, say what was done, and return its base and experts by task.

    A process that Lightning started finds the folder of the one that started it.

    Args:
        options: With ``groups``, ``align`` and ``replace``.
        folder: Where to, as :func:`aligned_folder` gives it.
        model: The architecture.
        tasks: Where unlabelled examples come from.

    Raises:
        InputError: As :func:`lit_merge.align.align`.
    """
    from lit_merge.align import align
    from lit_merge.cli.align import print_alignment

    if not _started_by_another():
        chosen = options.align
        if isinstance(chosen, bool):
            chosen = AlignSettings(by="auto" if chosen else "none")
        print_alignment(
            align(
                model,
                options.groups,
                folder,
                tasks=tasks,
                replace=options.replace,
                **asdict(chosen),
            )
        )
    names = [task for group in options.groups.values() for task in group.experts]
    return str(folder / BASE), {task: str(folder / task) for task in names}


def require_alone(options: Namespace, *others: str) -> None:
    """Refuse options that groups stand in place of.

    Raises:
        InputError: One of them is given together with groups.
    """
    for name in others:
        if options[name]:
            raise InputError(
                f"{name}: must be left out where groups are given; got {options[name]!r}. The "
                "groups name the bases and the experts."
            )


def _started_by_another() -> bool:
    """Return whether Lightning started this process from one that runs the same command."""
    return int(os.environ.get("LOCAL_RANK", "0")) > 0
