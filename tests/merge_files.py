"""Small models on disk, as experts of one base, for the tests of merging."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_merge.expert import ExpertInfo, write_expert
from lit_merge.methods import (
    TIES,
    Average,
    FisherAverage,
    GradientMatching,
    TaskArithmetic,
    WeightedAverage,
)

SHAPES = {
    "emb.weight": (11, 4),
    "norm.weight": (4,),
    "norm.bias": (4,),
    "norm.running_mean": (4,),
    "norm.running_var": (4,),
    "linear.weight": (6, 4),
    "linear.bias": (6,),
}
TASKS = ("svhn", "dtd")
MERGED = ("emb.weight", "norm.weight", "norm.bias", "linear.weight", "linear.bias")
METHODS = [
    Average(),
    WeightedAverage([1.0, 3.0]),
    TaskArithmetic(0.4),
    TIES(0.3),
    TIES(0.3, scope="tensor"),
    FisherAverage(),
    GradientMatching({"svhn": 1.0, "dtd": 0.5}),
    GradientMatching({"svhn": 1.0, "dtd": -0.01}),
]


def weights(
    seed: int, *, classes: int = 3, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return the state dict of a small network with BatchNorm, a counter and a head."""
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES | {"head.weight": (classes, 6), "head.bias": (classes,)}
    state = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }
    state["norm.running_var"] = state["norm.running_var"].abs()
    state["norm.num_batches_tracked"] = torch.tensor(100 + seed)
    return state


def hessian(state: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return a positive Hessian for the parameters of a state dict, the head's among them."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        name: torch.rand(value.shape, generator=generator) + 0.1
        for name, value in state.items()
        if "running" not in name and "batches" not in name
    }


def tied_models() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Return three models whose decoder is tied to the embedding, and their Hessians."""
    states, curvature = [], []
    for seed in range(3):
        state = weights(seed)
        state["lm.decoder.weight"] = state["emb.weight"]
        states.append(state)
        entries = hessian(weights(seed), seed)
        curvature.append(entries)
    return states, curvature


def save_base(folder: Path, *, classes: int = 3) -> Path:
    """Write a base without curvature, and return its file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights(0, classes=classes), folder / "base.safetensors")
    return folder / "base.safetensors"


def save_expert(
    folder: Path,
    task: str,
    seed: int,
    *,
    classes: int = 3,
    changes: Mapping[str, Tensor] | None = None,
    with_hessian: bool = True,
    scale: float = 1.0,
    **info: object,
) -> Path:
    """Write an expert folder, and return it.

    Args:
        folder: Where; the expert is in a folder of its task's name.
        task: Its task.
        seed: Of its weights.
        classes: Of its head.
        changes: Tensors to put in the place of its own.
        with_hessian: Whether it has curvature.
        scale: What the Hessian is multiplied with.
        info: Entries of ``expert.json``.
    """
    state = weights(seed, classes=classes) | dict(changes or {})
    curvature = {name: scale * value for name, value in hessian(state, seed).items()}
    frozen = info.get("frozen_parameters", ())
    for name in frozen if isinstance(frozen, tuple) else ():
        del curvature[name]
    fields = {
        "head_parameters": ("head.weight", "head.bias"),
        "estimator": "exact",
        "labels": "sampled",
        "num_examples": 50,
        **info,
    }
    write_expert(
        folder / task,
        weights=state,
        info=ExpertInfo(task=task, **fields),  # type: ignore[arg-type]
        hessian=curvature if with_hessian else None,
    )
    return folder / task


def save_experts(folder: Path, **options: object) -> dict[str, Path]:
    """Write one expert per task of :data:`TASKS`."""
    return {
        task: save_expert(folder, task, seed, **options)  # type: ignore[arg-type]
        for seed, task in enumerate(TASKS, start=1)
    }


def tensors(file: Path) -> dict[str, Tensor]:
    """Return what a safetensors file holds."""
    return load_file(file)


def flat(state: Mapping[str, Tensor]) -> list[float]:
    """Return the merged tensors of a state dict, one after the other."""
    return torch.cat([state[name].double().flatten() for name in MERGED]).tolist()
