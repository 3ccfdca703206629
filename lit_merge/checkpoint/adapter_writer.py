"""Writing what a merge has changed as a PEFT LoRA adapter: ΔW = θ̂ − θ₀, truncated to a rank.

The folder is one that ``PeftModel.from_pretrained`` takes: ``adapter_config.json``,
``adapter_model.safetensors``, and beside them ``truncation.json`` with what was lost: the norm of
ΔW and the relative error of B·A by weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lit_merge.checkpoint.adapter import WEIGHTS, AdaptedWeight, AdapterCheckpoint
from lit_merge.checkpoint.adapter_config import CONFIG
from lit_merge.checkpoint.low_rank import LowRank, truncated
from lit_merge.checkpoint.safetensors_writer import save_tensors
from lit_merge.checkpoint.tensor_source import Checkpoint
from lit_merge.errors import InputError

RECORD = "truncation.json"

_CHUNK = 1 << 20  # elements compared at a time
# PEFT's types of models for which it wants a head in every adapter; there is none in ours.
_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True)
class WrittenAdapter:
    """An adapter that was written.

    Attributes:
        path: The folder.
        errors: The relative error ‖ΔW − B·A‖ / ‖ΔW‖ by weight.
        relative_error: That of all weights together.
        lost: Names of other tensors that differ from the base's, which the adapter does not have.
    """

    path: Path
    errors: Mapping[str, float]
    relative_error: float
    lost: tuple[str, ...]


def adapted_weights(checkpoints: Iterable[Checkpoint]) -> dict[str, AdaptedWeight]:
    """Return the weights that some adapter among checkpoints adapts, by the base's names.

    Raises:
        InputError: Two adapters store a weight in different ways.
    """
    found: dict[str, AdaptedWeight] = {}
    for checkpoint in checkpoints:
        if not isinstance(checkpoint, AdapterCheckpoint):
            continue
        for name, update in checkpoint.updates.items():
            if found.setdefault(name, update.weight) != update.weight:
                raise InputError(
                    f"{checkpoint.path}: must adapt tensor {name!r} as the other adapters do, as "
                    f"{found[name]}; got {update.weight}. Train the adapters on one model class."
                )
    return found


def largest_rank(checkpoints: Iterable[Checkpoint]) -> int:
    """Return the largest rank of the adapters among checkpoints, 0 where there is none."""
    adapters = [c for c in checkpoints if isinstance(c, AdapterCheckpoint)]
    modules = ((a.config, u.weight.module) for a in adapters for u in a.updates.values())
    return max((config.rank_of(module) for config, module in modules), default=0)


def write_adapter(
    folder: Path,
    base: Checkpoint,
    merged: Checkpoint,
    *,
    rank: int,
    weights: Mapping[str, AdaptedWeight],
    alpha: float | None = None,
    others: Literal["refuse", "drop"] = "refuse",
    base_model: str = "",
    task_type: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> WrittenAdapter:
    """Write the difference of two models as a LoRA adapter.

    One weight at a time is in memory, and all factors. Nothing is written before all is computed.

    Args:
        folder: Where; it must exist. Existing files are overwritten: write inside
            :func:`lit_merge.output.new_folder`.
        base: θ₀.
        merged: θ̂ under the base's names. In the base's bfloat16 it holds ΔW only up to the rounding
            of θ̂, which no low rank has: merge in float32.
        rank: r of every weight.
        weights: Which to adapt, such as :func:`adapted_weights` of a merge's experts.
        alpha: ``lora_alpha``; None for r, that is a scaling of 1.
        others: What to do when other tensors differ: "refuse", or "drop" their differences.
        base_model: What PEFT shall load as the base: a path or a name on the hub.
        task_type: PEFT's name of the kind of model, such as "CAUSAL_LM". Those with a head of their
            own are left out, for a head is no part of ΔW.
        advance: Called with the size in bytes of each weight that is done.

    Raises:
        InputError: The models do not fit each other, a value is NaN or infinite, other tensors
            differ, or PEFT has no such layer.
    """
    if rank < 1:
        raise InputError(f"rank: must be at least 1; got {rank}. Give the rank of the adapter.")
    alpha = float(rank) if alpha is None else alpha
    if not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"alpha: must be positive and finite; got {alpha}. Leave it out for r.")
    if others not in ("refuse", "drop"):
        raise InputError(f'others: must be "refuse" or "drop"; got {others!r}. Choose one of them.')
    if not weights:
        raise InputError("weights: must be at least one; got none. Name the weights to adapt.")
    for name in weights:
        _require_adaptable(name, weights[name], base, merged)
    lost = tuple(name for name in dict.fromkeys((*base, *merged)) if name not in weights)
    lost = tuple(name for name in lost if not _same(name, base, merged))
    if lost and others == "refuse":
        raise InputError(
            f"{merged.path}: must differ from {base.path} only in the weights to adapt; got other "
            f"values for {', '.join(map(repr, lost[:3]))} ({len(lost)} in all), which a LoRA "
            'adapter has no place for. Write a whole model, or drop them: others="drop".'
        )
    factors: dict[str, Tensor] = {}
    found: dict[str, LowRank] = {}
    for name, weight in weights.items():
        near = truncated(_difference(name, base, merged).flatten(1), rank)
        found[name] = near
        factors |= _named_factors(weight, near, base.infos[name].shape, math.sqrt(alpha / rank))
        if advance is not None:
            advance(base.infos[name].nbytes)
    config = {
        "peft_type": "LORA",
        "task_type": None if task_type in _WITH_HEAD else task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(weight.kind == "transposed" for weight in weights.values()),
        "target_modules": sorted({weight.module for weight in weights.values()}),
        "inference_mode": True,
    }
    record = {
        name: {"norm": near.norm, "relative_error": near.relative_error}
        for name, near in found.items()
    }
    save_tensors(folder / WEIGHTS[0], factors, {"format": "pt"})
    _write_json(folder / CONFIG, config)
    _write_json(folder / RECORD, {"rank": rank, "weights": record, "lost": list(lost)})
    norm = math.hypot(*(near.norm for near in found.values()))
    distance = math.hypot(*(near.distance for near in found.values()))
    return WrittenAdapter(
        folder,
        {name: near.relative_error for name, near in found.items()},
        distance / norm if norm else 0.0,
        lost,
    )


def _require_adaptable(
    name: str, weight: AdaptedWeight, base: Checkpoint, merged: Checkpoint
) -> None:
    for checkpoint in (base, merged):
        if name not in checkpoint:
            raise InputError(
                f"{checkpoint.path}: must have tensor {name!r} to adapt it; got none of this name. "
                "Name weights of the base."
            )
    shape, dtype = base.infos[name].shape, base.infos[name].dtype
    if merged.infos[name].shape != shape or not dtype.is_floating_point:
        raise InputError(
            f"{merged.file_of(name)}: tensor {name!r} must have the shape {list(shape)} of the "
            f"base, of a floating type; got {list(merged.infos[name].shape)} beside {dtype}. Give "
            "a merge of this base."
        )
    axes = len(shape)
    if not name.endswith(".weight") or (axes < 3 if weight.kind == "convolution" else axes != 2):
        raise InputError(
            f"{base.file_of(name)}: tensor {name!r} {list(shape)} must be the weight of a "
            f"{weight.kind} layer; got another tensor. PEFT adapts Linear, Conv1D, Embedding and "
            "convolutions only."
        )
    attention = weight.module.rpartition(".")[0]
    if f"{attention}.in_proj_weight" in base:
        raise InputError(
            f"{base.file_of(name)}: tensor {name!r} must be of a layer that PEFT adapts alone; got "
            "a part of nn.MultiheadAttention. Write a whole model."
        )


def _same(name: str, base: Checkpoint, merged: Checkpoint) -> bool:
    """Return whether a tensor is the base's, in the type in which the merge was written."""
    if name not in base or name not in merged or base.infos[name].shape != merged.infos[name].shape:
        return False
    numel = base.infos[name].numel
    for start in range(0, numel, _CHUNK):
        values = merged.read(name, start, min(start + _CHUNK, numel))
        expected = base.read(name, start, start + values.numel())
        if not torch.equal(expected.to(values.dtype), values):
            return False
    return True


def _difference(name: str, base: Checkpoint, merged: Checkpoint) -> Tensor:
    """Return θ̂ − θ₀ of one weight, in float32, in float64 where one of the two is float64."""
    types = {base.infos[name].dtype, merged.infos[name].dtype}
    dtype = torch.float64 if torch.float64 in types else torch.float32
    delta = merged.tensor(name).to(dtype) - base.tensor(name).to(dtype)
    if not bool(torch.isfinite(delta).all()):
        raise InputError(
            f"{merged.file_of(name)}: tensor {name!r} must be finite, as must be its difference to "
            f"{base.file_of(name)}; got NaN or infinity. Merge finite models."
        )
    return delta


def _named_factors(
    weight: AdaptedWeight, near: LowRank, shape: tuple[int, ...], root: float
) -> dict[str, Tensor]:
    """Return A and B under PEFT's names; each is divided by the root of the scaling."""
    up, down = near.left / root, near.right / root
    if weight.is_transposed:
        up, down = down.T, up.T
    if weight.kind == "convolution":
        up = up.reshape(*up.shape, *(1 for _ in shape[2:]))
        down = down.reshape(-1, *shape[1:])
    middle, suffix = ("embedding_", "") if weight.kind == "embedding" else ("", ".weight")
    stem = f"base_model.model.{weight.module}.lora_{middle}"
    return {f"{stem}A{suffix}": down, f"{stem}B{suffix}": up}


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
