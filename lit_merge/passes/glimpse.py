"""A glimpse of the examples of a pass: enough to tell whether two processes have the same data.

Ranks share a pass out by index, so they must agree on the data set. They do not when one of them
sees another version of a file, or shuffles its list with random numbers of its own. Nothing would
fail: examples would be counted twice and others never. The same holds for a pass that is resumed.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from lit_merge.curvature.batches import tensors_in
from lit_merge.distributed import failing_together, gather, world_size
from lit_merge.errors import InputError
from lit_merge.passes.data_pass import DataPass
from lit_merge.passes.training_examples import FIX, own_random_numbers

_CLOSE = 1e-2  # share of the norm: preprocessing may round otherwise on another kind of machine
_WAVES = (2**0.5, 3**0.5, 5**0.5)  # frequencies; sums over other values or orders differ by a norm


def glimpse(data: DataPass, *, seed: int) -> dict[str, Any]:
    """Return what tells the first examples of a pass from others, as JSON primitives.

    Args:
        data: The pass.
        seed: Of the random numbers that reading them draws.

    Returns:
        By path in the batch: type, shape, and numbers that depend on values and order. Empty
        where the examples are not the same when they are read again, as with random augmentation.
    """
    first, again = (_look(data, seed) for _ in range(2))
    return first if alike(first, again) else {}


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two glimpses may be of the same examples; an empty one tells nothing."""
    if not one or not other:
        return True
    return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)


def require_same_data(data: DataPass, *, seed: int, group: Any = None) -> None:
    """Raise unless the ranks can share the pass. Collective.

    Args:
        data: This rank's share.
        seed: As for :func:`glimpse`.
        group: The process group of the ranks that share it; None for all ranks.

    Raises:
        InputError: The ranks have different data sets; or each has the same stream, which none of
            them has split.
    """
    if world_size() == 1:
        return
    with failing_together():
        own = (data.num_examples, glimpse(data, seed=seed))
    numbers, glimpses = zip(*gather(own, group=group), strict=True)
    if not data.indexed:
        _require_split(glimpses)
        return
    for rank, number in enumerate(numbers):
        if number != numbers[0]:
            raise InputError(
                "train_dataloader: must have the same examples on every rank; got "
                f"{numbers[0]} of them on rank 0 and {number} on rank {rank}. Give every rank the "
                f"same data set, in the same order; the pass shares it out by itself."
            )
    for rank, seen in enumerate(glimpses):
        if not alike(glimpses[0], seen):
            raise InputError(
                "train_dataloader: must have the same examples in the same order on every rank; "
                f"got other first examples on rank {rank} than on rank 0. Shuffle the data set "
                "with one seed on all ranks, or not at all; the pass shares it out by itself."
            )


def _require_split(glimpses: tuple[dict[str, Any], ...]) -> None:
    for rank, seen in enumerate(glimpses[1:], start=1):
        if seen and glimpses[0] and alike(glimpses[0], seen):
            raise InputError(
                "train_dataloader: must yield other examples on every rank where the data is a "
                f"stream; got the same first ones on rank 0 and rank {rank}. Split the stream by "
                f"rank in its __iter__. {FIX}"
            )


def _look(data: DataPass, seed: int) -> dict[str, Any]:
    with own_random_numbers(seed):
        return {path: _summary(tensor) for path, tensor in tensors_in(data.first_few(), "batch")}


def _summary(tensor: Tensor) -> list[Any]:
    """Return type, shape, and for floats their norm and their sums under waves."""
    kind = [str(tensor.dtype), list(tensor.shape)]
    if not tensor.is_floating_point():
        return [*kind, hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()]
    values = tensor.detach().cpu().double().nan_to_num(0.0, 0.0, 0.0).flatten()
    places = torch.arange(1, len(values) + 1, dtype=torch.float64)
    waves = [float(values @ (places * step).cos()) for step in _WAVES]
    return [*kind, [float(values.norm()), *waves]]


def _close(one: list[Any], other: list[Any]) -> bool:
    if one[:2] != other[:2] or isinstance(one[2], str):
        return bool(one == other)
    allowed = _CLOSE * max(one[2][0], other[2][0])
    return all(abs(x - y) <= allowed for x, y in zip(one[2], other[2], strict=True))
