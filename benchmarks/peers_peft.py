"""PEFT's merge_utils, tensor by tensor on task vectors, as its adapters' merging calls them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from peers_cases import Case, Inputs, State


def by_tensor(function: str, **settings: Any) -> Callable[[Inputs], State]:
    """Return the call of a function of merge_utils on every tensor, the base added again."""

    def call(inputs: Inputs) -> State:
        from peft.utils import merge_utils

        merged = {}
        for name, base in inputs.base.items():
            vectors = [expert[name] - base for expert in inputs.experts]
            ones = torch.ones(len(vectors), dtype=base.dtype)
            merged[name] = base + getattr(merge_utils, function)(vectors, ones, **settings)
        return merged

    return call


def cases() -> tuple[Case, ...]:
    """Return its functions beside ours."""
    peer = f"PEFT {version('peft')}"
    return (
        Case(peer, "task_arithmetic", by_tensor("task_arithmetic"), "TaskArithmetic", rounds=3),
        Case(
            peer,
            "magnitude_prune, 0.2",
            by_tensor("magnitude_prune", density=0.2),
            "MagnitudePrune",
            {"density": 0.2, "scope": "tensor"},
        ),
        Case(
            peer,
            "ties, 0.2",
            by_tensor("ties", density=0.2),
            "TIES",
            {"density": 0.2, "scope": "tensor", "divide": "count", "weigh": "values"},
        ),
        Case(
            peer,
            "dare_linear, 0.5",
            by_tensor("dare_linear", density=0.5),
            "DARE",
            {"density": 0.5},
            equal=False,
        ),
        Case(
            peer,
            "dare_ties, 0.5",
            by_tensor("dare_ties", density=0.5),
            "DARE",
            {"density": 0.5, "combine": "ties"},
            equal=False,
        ),
    )
