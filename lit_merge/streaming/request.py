"""What is asked of a merge of files: the arguments of :func:`lit_merge.merge`, in one piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lit_merge.errors import InputError
from lit_merge.methods import MergeMethod
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming.overrides import Override
from lit_merge.streaming.plan import MergePlan

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Format = Literal["safetensors", "lightning", "distributed", "adapter"]
Number = Literal["float32", "float64"]


@dataclass(frozen=True)
class Request:
    """What was asked for, beside the methods and outputs: the arguments of :func:`lit_merge.merge`.

    Attributes:
        base: Path of the base, or None.
        experts: Paths of the experts by task.
        base_hessian: Path of the base's Hessian, or None.
        policy: What is done with tensors that are no ordinary weights.
        overrides: What is different for some tensors.
        dtype: The floating type to write, by name; None for the base's.
        accumulate: The least type to compute in, by name.
        replace: Whether existing folders may be replaced.
        hessian: Whether to write the result's own Hessian.
        format: In what form the weights are written.
        rank: Of adapters that are written.
        shard_bytes: Size of a file of weights.
    """

    base: str | Path | None
    experts: Mapping[str, str | Path]
    base_hessian: str | Path | None
    policy: ParametersPolicy
    overrides: Mapping[str, Override]
    dtype: str | None
    accumulate: Number
    replace: bool
    hessian: bool
    format: Format
    rank: int | None
    shard_bytes: int


@dataclass(frozen=True)
class Output:
    """One of the merges.

    Attributes:
        path: The folder to write.
        method: How to merge.
        plan: What is done with each tensor.
    """

    path: str | Path
    method: MergeMethod
    plan: MergePlan


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the type of a name, None for None.

    Raises:
        InputError: No type to write has that name.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise InputError(
            f"dtype: must be one of {', '.join(DTYPES)}, or None for the base's; got {name!r}. "
            f"Correct it."
        )
    return DTYPES[name]
