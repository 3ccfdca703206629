"""Where a merge goes: what takes its tensors, piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lit_merge.checkpoint import TensorInfo


class Sink(Protocol):
    """What takes tensors in pieces, from several threads at once."""

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Take the flat elements from ``start`` on."""


@dataclass(frozen=True)
class Sinks:
    """Where one merge goes.

    Attributes:
        model: Takes the merged model.
        heads: Take the tensors of each task's own.
        hessian: Takes the Hessian of the merge as an expert; None to leave it out.
        masks: Take the packed bits of each task's mask; empty for methods without.
    """

    model: Sink
    heads: Mapping[str, Sink]
    hessian: Sink | None = None
    masks: Mapping[str, Sink] = field(default_factory=dict)


class StateDictSink:
    """A sink into tensors in memory.

    Args:
        infos: Shape and type of every tensor by name.
        aliases: Names of tied tensors, with the name of the tensor that they share.
    """

    def __init__(
        self, infos: Mapping[str, TensorInfo], aliases: Mapping[str, str] | None = None
    ) -> None:
        self._infos = infos
        self._aliases = {
            name: leader for name, leader in (aliases or {}).items() if leader in infos
        }
        self._tensors = {
            name: torch.empty(info.numel, dtype=info.dtype)
            for name, info in infos.items()
            if name not in self._aliases
        }

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Take the flat elements from ``start`` on."""
        if name not in self._aliases:  # an alias comes under its leader's name
            self._tensors[name][start : start + values.numel()] = values.flatten()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name, in the order of the infos; aliases share their leader's."""
        own = {name: flat.reshape(self._infos[name].shape) for name, flat in self._tensors.items()}
        return {name: own[self._aliases.get(name, name)] for name in self._infos}
