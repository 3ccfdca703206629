r"""Models per task as one shared model and a mask each: one bit per weight and task.

Task t's weights are :math:`θ_0 + λ_t m_t ⊙ (θ - θ_0)`, with :math:`θ_0` the base and θ the shared
model. A file of masks is a safetensors file that holds, under the name of every tensor that has a
mask, its bits as a uint8 tensor [⌈n/8⌉] of the n flat entries: eight to a byte, the first in the
lowest bit, zeros after the last. Its metadata has ``"scale"``, :math:`λ_t` as text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lit_merge.checkpoint.tensor_source import Checkpoint, TensorInfo, check_range
from lit_merge.errors import InputError

_COUNTED = 2**17  # bytes that are counted at a time


def pack_bits(mask: Tensor) -> Tensor:
    """Return booleans as bits.

    Args:
        mask: [n] booleans, or of any shape, flattened; on any device.

    Returns:
        [⌈n/8⌉] uint8 on the CPU.

    Example:
        >>> pack_bits(torch.tensor([True, False, True] + [False] * 6)).tolist()
        [5, 0]
    """
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy(), axis=None, bitorder="little"))


def unpack_bits(packed: Tensor, start: int, stop: int) -> Tensor:
    """Return the bits ``start:stop`` as booleans.

    Args:
        packed: uint8 on the CPU, as from :func:`pack_bits`.
        start: The first bit.
        stop: The one after the last.

    Returns:
        [stop - start] booleans.

    Example:
        >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), 1, 4).tolist()
        [False, True, False]
    """
    bits = np.unpackbits(packed.numpy(), count=stop, bitorder="little")
    return torch.from_numpy(bits[start:].view(np.bool_))


def mask_info(info: TensorInfo) -> TensorInfo:
    """Return shape and type of the packed mask of a tensor."""
    return TensorInfo((-(-info.numel // 8),), torch.uint8)


def scale_of(masks: Checkpoint) -> float:
    r"""Return :math:`λ_t` of a file of masks.

    Raises:
        InputError: The file has none, or no finite number.
    """
    text = masks.metadata.get("scale")
    try:
        scale = float(text or "")
    except ValueError:
        scale = math.nan
    if not abs(scale) <= torch.finfo(torch.float32).max:  # nor NaN
        raise InputError(
            f'{masks.path}: must have a finite number as "scale" in its metadata; got {text!r}. '
            f"Write the masks again with the merge."
        )
    return scale


def share_of_ones(masks: Checkpoint, infos: Mapping[str, TensorInfo]) -> float:
    """Return the share of the entries of masked tensors that a mask selects.

    Args:
        masks: The bits by tensor name.
        infos: The tensors that are masked, by name.
    """
    ones = 0
    for name, info in masks.infos.items():
        for start in range(0, info.numel, _COUNTED):
            packed = masks.read(name, start, min(start + _COUNTED, info.numel))
            ones += int(np.unpackbits(packed.numpy()).sum(dtype=np.int64))
    return ones / max(sum(infos[name].numel for name in masks), 1)


class MaskedCheckpoint(Checkpoint):
    r"""One task's model, :math:`θ_0 + λ m ⊙ (θ - θ_0)`, computed as it is read.

    Tensors without a mask are the shared model's. With a scale of one, entries are the shared
    model's or the base's, bit for bit; else they are computed in float32 (float64 where one of
    the two is) and rounded once.

    Args:
        base: :math:`θ_0`.
        shared: θ, whose names, shapes and types the task's model has.
        masks: The bits of m by tensor name.
        scale: :math:`λ`.

    Raises:
        InputError: A mask fits no tensor, or has the wrong length.

    Note:
        Closing it closes the masks; base and shared model serve other tasks too.
    """

    def __init__(
        self, base: Checkpoint, shared: Checkpoint, masks: Checkpoint, scale: float
    ) -> None:
        for name, info in masks.infos.items():
            _check(name, info, base, shared, masks)
        self._base = base
        self._shared = shared
        self._masks = masks
        self._scale = scale
        self.path = masks.path
        self.source = shared.source
        self.metadata = shared.metadata
        self.infos = shared.infos

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """See :meth:`Checkpoint.read_into`."""
        if name not in self._masks:
            self._shared.read_into(name, start, out)
            return
        stop = start + out.numel()
        check_range(self.infos[name], name, start, stop)
        first = start // 8
        packed = self._masks.read(name, first, -(-stop // 8))
        mask = unpack_bits(packed, start - 8 * first, stop - 8 * first)
        base = self._base.read(name, start, stop)
        shared = self._shared.read(name, start, stop)
        if self._scale != 1:
            wide = torch.float64 if torch.float64 in (base.dtype, shared.dtype) else torch.float32
            base, shared = base.to(wide), shared.to(wide)
            shared = torch.lerp(base, shared, self._scale)
        out.copy_(torch.where(mask, shared.to(out.dtype), base.to(out.dtype)))

    def close(self) -> None:
        """Close the masks."""
        self._masks.close()


def _check(
    name: str, info: TensorInfo, base: Checkpoint, shared: Checkpoint, masks: Checkpoint
) -> None:
    for model in (shared, base):
        if name not in model:
            raise InputError(
                f"{masks.path}: must hold masks of tensors of {model.path}; got one of {name!r}, "
                f"which is not there. Give the base and the shared model that the masks were "
                f"written with."
            )
    ours, theirs = shared.infos[name], base.infos[name]
    if ours.shape != theirs.shape:
        raise InputError(
            f"{base.path}: tensor {name!r} must have the shape {list(ours.shape)} that it has in "
            f"{shared.path}; got {list(theirs.shape)}. Give the base that was merged onto."
        )
    wanted = mask_info(ours)
    if info != wanted:
        raise InputError(
            f"{masks.path}: the mask of {name!r} must be {wanted.shape[0]} bytes for "
            f"{ours.numel} entries; got {list(info.shape)} of "
            f"{str(info.dtype).removeprefix('torch.')}. Write the masks again with the merge."
        )
