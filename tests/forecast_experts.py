"""Three small experts with curvature, in memory, and what their merges cost by loops."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from lit_merge.forecast import Forecast
from lit_merge.methods import MergeMethod
from lit_merge.streaming import merge_state_dicts
from lit_merge.streaming.inputs import MergeInputs
from lit_merge.streaming.open_inputs import inputs_in_memory

State = dict[str, Tensor]
SHAPES = {"emb.weight": (7, 3), "blocks.0.weight": (5, 3), "blocks.0.bias": (5,), "top": ()}
TASKS = ("svhn", "dtd", "cars")
COUNTS = {"svhn": 10, "dtd": 100, "cars": 30}


def state(seed: int, *, spread: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: spread * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


BASE = state(0)
EXPERTS = {
    task: {name: BASE[name] + value for name, value in state(seed, spread=0.3).items()}
    for seed, task in enumerate(TASKS, start=1)
}
HESSIANS = {
    task: {name: value.abs() * COUNTS[task] for name, value in state(10 + seed).items()}
    for seed, task in enumerate(TASKS)
}


def inputs_of(
    experts: Mapping[str, State] = EXPERTS,
    hessians: Mapping[str, State] = HESSIANS,
    *,
    base: State | None = BASE,
    counts: Mapping[str, int | None] = COUNTS,
) -> MergeInputs:
    """Return inputs in memory that know how many examples the Hessians are sums over."""
    inputs = inputs_in_memory(base, experts, hessians, None)
    infos = {
        task: dataclasses.replace(info, num_examples=counts.get(task))
        for task, info in inputs.infos.items()
    }
    return dataclasses.replace(inputs, infos=infos)


def loop_increase(merged: State, expert: State, hessian: State) -> dict[str, float]:
    """Return ½ Σ h (θ − θ_t)² by tensor, in Python numbers."""
    return {
        name: 0.5
        * sum(
            h * (m - e) ** 2
            for h, m, e in zip(
                hessian[name].flatten().tolist(),
                merged[name].flatten().tolist(),
                expert[name].flatten().tolist(),
                strict=True,
            )
        )
        for name in merged
    }


def merged_by(method: MergeMethod, base: State | None = BASE) -> State:
    needs_hessians = "hessian" in method.needs
    return merge_state_dicts(base, EXPERTS, method, hessians=HESSIANS if needs_hessians else None)


def total_of(method: MergeMethod, weights: Mapping[str, float]) -> float:
    """Return the weighted total of the loops over all that a merge gives."""
    merged = merged_by(method)
    return sum(
        weights[task] * sum(loop_increase(merged, EXPERTS[task], HESSIANS[task]).values())
        for task in TASKS
    )


def best_of(forecast: Forecast) -> float:
    assert forecast.best is not None
    return forecast.best.scale
