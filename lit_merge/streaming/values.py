"""Looking at values: what cannot be merged is refused by file, tensor and index."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_merge.checkpoint import Checkpoint, TensorInfo
from lit_merge.errors import InputError


def check_values(values: Tensor, checkpoint: Checkpoint, name: str, start: int) -> None:
    """Check that what was read of a tensor is finite.

    Args:
        values: Flat elements, of a floating type.
        checkpoint: Where they come from.
        name: The tensor there.
        start: The flat position of the first.

    Raises:
        InputError: One is NaN or infinite; names file, tensor and index.
    """
    if not all_finite(values):
        fix = "Take a checkpoint from before the training diverged."
        raise _refused(values, first_not_finite(values), checkpoint, name, start, fix)


def check_hessian(
    values: Tensor, checkpoint: Checkpoint, name: str, start: int, *, finite: bool
) -> None:
    """Check what was read of a Hessian: no NaN, nothing negative.

    Args:
        values: As for :func:`check_values`.
        checkpoint: As for :func:`check_values`.
        name: As for :func:`check_values`.
        start: As for :func:`check_values`.
        finite: Whether to look for infinities too.

    Raises:
        InputError: One cannot be a sum of squares; names file, tensor and index.
    """
    if not values.numel() or (bool(values.amin() >= 0) and not (finite and not all_finite(values))):
        return
    fix = "Check the loss on the training data, and compute sums of squared gradients again."
    if all_finite(values):
        first = int((values < 0).nonzero()[0])
        raise _refused(values, first, checkpoint, name, start, fix, "must not be negative")
    raise _refused(values, first_not_finite(values), checkpoint, name, start, fix)


def _refused(
    values: Tensor,
    first: int,
    checkpoint: Checkpoint,
    name: str,
    start: int,
    fix: str,
    must: str = "must be finite",
) -> InputError:
    index = unravel(start + first, checkpoint.infos[name].shape)
    return InputError(
        f"{checkpoint.file_of(name)}: tensor {name!r} {must}; got {values[first].item():g} at "
        f"{index}. {fix}"
    )


def all_finite(values: Tensor) -> bool:
    """Return whether there is no NaN and no infinity, for the cost of a sum."""
    wide = values if values.dtype in (torch.float32, torch.float64) else values.float()
    # Sums carry NaN and infinity; only one that overflows has to be looked at entry by entry.
    return math.isfinite(wide.sum().item()) or bool(torch.isfinite(wide).all())


def equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one type have the same values, of float8 too."""
    if one.dtype.is_floating_point and one.dtype.itemsize == 1:  # torch compares none of these
        one, other = one.float(), other.float()
    return torch.equal(one, other)


def first_not_finite(values: Tensor) -> int:
    """Return the flat position of the first NaN or infinity."""
    return int((~torch.isfinite(values.double())).flatten().nonzero()[0])


def rounded(values: Tensor, name: str, info: TensorInfo, start: int) -> Tensor:
    """Return finite values in the type to write.

    Args:
        values: Of float32 or float64.
        name: The tensor, for messages.
        info: Of what is written.
        start: The flat position of the first value.

    Raises:
        InputError: They are not finite, or do not fit that type.
    """
    if fits(values, info.dtype):
        return values.to(info.dtype)
    flat, stored = values.flatten(), values.to(info.dtype).flatten()
    at = "at {} of tensor {!r}"
    if not all_finite(flat):
        first = first_not_finite(flat)
        at = at.format(unravel(start + first, info.shape), name)
        raise InputError(
            f"method: must give finite values; got {flat[first].item():g} {at} from finite inputs. "
            f"Take smaller scales, or Hessians of smaller sums."
        )
    first = int(flat.abs().argmax())
    at = at.format(unravel(start + first, info.shape), name)
    raise InputError(
        f"dtype: must hold the merged values; got {flat[first].item():g} {at}, which is "
        f"{stored[first].item():g} in {str(info.dtype).removeprefix('torch.')}. Write a wider "
        f"type, or take smaller scales."
    )


def fits(values: Tensor, dtype: torch.dtype) -> bool:
    """Return whether values are finite and within the range of a type."""
    if not values.numel():
        return True
    if not dtype.is_floating_point or torch.finfo(dtype).max >= torch.finfo(values.dtype).max:
        return all_finite(values)
    low, high = torch.aminmax(values)  # carries NaN
    return bool(high <= torch.finfo(dtype).max) and bool(low >= torch.finfo(dtype).min)


def unravel(position: int, shape: Sequence[int]) -> list[int]:
    """Return the index of a flat position.

    >>> unravel(7, (2, 3, 4))
    [0, 1, 3]
    """
    index: list[int] = []
    for size in reversed(shape):
        index.insert(0, position % size)
        position //= size
    return index
