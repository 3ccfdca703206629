"""Several processes with a gloo group between them, for tests of what ranks do together."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

_TIMEOUT = timedelta(minutes=2)
"""After which a rank that waits for one that never comes is an error."""


def on_ranks(function: Callable[[int], Any], *, world_size: int, folder: Path) -> list[Any]:
    """Call ``function(rank)`` in forked processes of one group; return the results by rank.

    An exception in a rank is its result, as text.
    """
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    store = folder / f"store-{os.urandom(4).hex()}"
    processes = [
        context.Process(target=_run, args=(function, rank, world_size, store, results))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found = {}
    for rank, process in enumerate(processes):
        while process.is_alive() or not results.empty():
            if results.empty():
                process.join(0.01)
            else:
                found |= [results.get()]
        found.setdefault(rank, f"ended with exit code {process.exitcode}")
    return [found[rank] for rank in range(world_size)]


def _run(function: Any, rank: int, world_size: int, store: Path, results: Any) -> None:
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
        )
        result = function(rank)
    except Exception as error:
        if os.environ.get("LIT_MERGE_TRACEBACK"):
            traceback.print_exc()
        result = f"{type(error).__name__}: {error}"
    results.put((rank, result))
