"""Which processes of a Trainer see different data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl


@dataclass(frozen=True)
class DataRanks:
    """The place of this process among those that see different data.

    Under tensor parallelism several processes work on the same examples, and count once.

    Attributes:
        rank: Which share of the data this process takes.
        size: How many shares there are.
        group: The process group of the processes that take the other shares for the same part of
            the model; None when these are all processes.
    """

    rank: int
    size: int
    group: Any = None

    @classmethod
    def of(cls, trainer: pl.Trainer) -> DataRanks:
        """Return those of a Trainer whose processes run."""
        sampler = trainer.distributed_sampler_kwargs
        if sampler is None or trainer.world_size == 1:
            return cls(rank=0, size=1)
        rank, size = sampler["rank"], sampler["num_replicas"]
        if size == trainer.world_size:
            return cls(rank, size)
        return cls(rank, size, trainer.strategy.device_mesh["data_parallel"].get_group())  # type: ignore[attr-defined]
