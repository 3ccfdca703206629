"""Tiny fits under ModelParallelStrategy, in forked processes as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.processes import on_ranks
from tests.tiny_fits import TinyClassifier, tiny_trainer

SIZES = {"fsdp": (2, 1), "tensor": (1, 2), "both": (2, 2)}
"""By layout, the ranks with different data and the ranks that share a layer."""


class ShardedClassifier(TinyClassifier):
    """The tiny classifier, sharded over whatever mesh the strategy has; its parts are uneven."""

    def configure_model(self) -> None:
        mesh = self.device_mesh
        assert mesh is not None
        if mesh["tensor_parallel"].size() > 1:
            plan = {"body": ColwiseParallel(), "head": RowwiseParallel()}
            parallelize_module(self.model, mesh["tensor_parallel"], plan)
        if mesh["data_parallel"].size() > 1:
            fully_shard(self.model, mesh=mesh["data_parallel"])


def sharded_trainer(
    folder: Path, layout: str, *callbacks: pl.Callback, **settings: Any
) -> pl.Trainer:
    """Return a Trainer for one of the processes that :func:`in_torchrun` has started."""
    data, tensor = SIZES[layout]
    strategy = ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor)
    return tiny_trainer(folder, *callbacks, strategy=strategy, devices=data * tensor, **settings)


def in_torchrun(function: Callable[[int], Any], *, layout: str, folder: Path) -> list[Any]:
    """Call ``function(rank)`` in as many processes as a layout needs; return the results."""
    data, tensor = SIZES[layout]
    size = data * tensor
    return on_ranks(partial(_as_torchrun, function, size), world_size=size, folder=folder)


def _as_torchrun(function: Callable[[int], Any], size: int, rank: int) -> Any:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    sizes = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in (ranks | sizes).items()}
    os.environ |= {"TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    return function(rank)
