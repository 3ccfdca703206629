"""Groups of experts by the base that they were fine-tuned from, opened and checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_merge.checkpoint import alignment, is_inside
from lit_merge.errors import InputError
from lit_merge.expert import Expert, open_expert

BASE = "base"
"""Name of the folder of the merged bases, and so of no task."""


@dataclass(frozen=True)
class ExpertGroup:
    """Experts that were fine-tuned from one base.

    Attributes:
        base: Path of the base: a folder or a checkpoint.
        experts: Path of each expert, by task.
    """

    base: str
    experts: dict[str, str]


@dataclass(frozen=True)
class OpenGroup:
    """An opened group.

    Attributes:
        base: The base.
        experts: The experts by task.
    """

    base: Expert
    experts: Mapping[str, Expert]


def check_groups(groups: Mapping[str, ExpertGroup]) -> None:
    """Check what can be told without a file.

    Raises:
        InputError: There are fewer than two groups, one has no experts, a task has two experts, or
            a name cannot be that of a folder.
    """
    if len(groups) < 2:
        raise InputError(
            f"groups: must be at least two, of different bases; got {list(groups)}. Experts of one "
            "base need no alignment: merge them."
        )
    owners: dict[str, str] = {}
    for name, group in groups.items():
        if not group.experts:
            raise InputError(
                f"groups: {name!r} must have at least one expert; got none. Name one, or leave the "
                "group out."
            )
        for task in group.experts:
            if task in owners:
                raise InputError(
                    f"groups: every task must have one expert; got {task!r} in {owners[task]!r} "
                    f"and in {name!r}. Give one of them another name."
                )
            if task == BASE or not task or not is_inside(task) or set(task) & set("/\\"):
                raise InputError(
                    f"groups: a task must be able to name a folder beside {BASE!r}; got {task!r}. "
                    "Give it another name."
                )
            owners[task] = name


@contextmanager
def open_groups(groups: Mapping[str, ExpertGroup]) -> Iterator[dict[str, OpenGroup]]:
    """Open groups, and close their files at the end of the block.

    Raises:
        InputError: A path is no expert or checkpoint.
    """
    with ExitStack() as stack:
        opened = {}
        for name, group in groups.items():
            base = open_expert(group.base)
            stack.callback(base.close)
            experts = {}
            for task, path in group.experts.items():
                experts[task] = open_expert(path, base=base.weights)
                stack.callback(experts[task].close)
            opened[name] = OpenGroup(base, experts)
        yield opened


def head_names(groups: Mapping[str, OpenGroup], parameters: Iterable[str]) -> tuple[str, ...]:
    """Return what the experts call the parameters of their heads, under the model's names."""
    known = tuple(parameters)
    found: dict[str, None] = {}
    for group in groups.values():
        for expert in (group.base, *group.experts.values()):
            names = alignment(expert.weights, known)
            found |= dict.fromkeys(names[name] for name in expert.info.head_parameters)
    return tuple(found)


def midpoint(bases: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of bases, in the names and types of the first.

    Tensors that another base lacks or has in another shape (a head), and those that are not of a
    floating type, are the first's.

    Args:
        bases: Tensors by name, already aligned with the first.
    """
    every = list(bases)
    found = {}
    for name, first in every[0].items():
        same = [base[name] for base in every if name in base and base[name].shape == first.shape]
        if first.is_floating_point() and len(same) == len(every):
            mean = torch.stack([value.to(torch.float64) for value in same]).mean(0)
            found[name] = mean.to(first.dtype)
        else:
            found[name] = first
    return found
