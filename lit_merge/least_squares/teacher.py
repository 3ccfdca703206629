"""The experts that a merged model learns from, and whether their layers are its own."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lit_merge.correction.forward import module_at
from lit_merge.errors import InputError


@dataclass(frozen=True)
class Teacher:
    """An expert that a merged model learns from.

    Attributes:
        model: Its network; modules have the names of the merged model's.
        forward: Runs it on a batch.
        around: Makes a context that its forwards run in.
    """

    model: nn.Module
    forward: Callable[[nn.Module, Any], Any]
    around: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)


def check_architecture(teacher: Teacher, layers: Mapping[str, nn.Module], *, task: int) -> None:
    """Raise unless an expert has these modules, with weights of the same shapes.

    Args:
        teacher: The expert.
        layers: The merged model's modules by name.
        task: The expert's task, for the message.

    Raises:
        InputError: It has not; names the module.
    """
    for name, module in layers.items():
        try:
            own = module_at(teacher.model, name)
        except InputError:
            known = [known for known, _ in teacher.model.named_modules() if known]
            near = difflib.get_close_matches(name, known, n=3) or known[:3]
            raise InputError(
                f"expert of task {task}: must have the merged model's {name!r}; got a "
                f"{type(teacher.model).__name__} without it. Near it are: {', '.join(near)}."
            ) from None
        ours, theirs = _shape(module), _shape(own)
        if ours is not None and ours != theirs:  # a router of heads has none
            raise InputError(
                f"expert of task {task}: the weight of {name!r} must have the merged model's "
                f"shape {ours}; got {theirs}. Merge experts of one architecture."
            )


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, nn.Parameter) else None
