"""Reading every value once, in chunks: what is NaN or infinite, and which tensors are the same."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_merge.checkpoint import Checkpoint
from lit_merge.location import RemotePath

_CHUNK = 1 << 20  # elements in memory at a time
_SAMPLE = 1 << 10  # elements whose bytes tell most tensors apart


class Reading:
    """How many bytes have been read of those that are to be read.

    Args:
        advance: Called with the bytes read so far and in all; None for nobody.
        values: Whether weights are read at all. A Hessian is, in any case.
    """

    def __init__(self, advance: Callable[[int, int], None] | None, *, values: bool) -> None:
        self._advance = advance
        self._values = values
        self._done = 0
        self._total = 0

    def expect(self, checkpoint: Checkpoint) -> None:
        """Say that the values of a checkpoint will be read."""
        self._total += sum(info.nbytes for info in checkpoint.infos.values())

    def reads(self, weights: Checkpoint) -> bool:
        """Return whether the values of weights are read: those behind a URL never are."""
        return self._values and not isinstance(weights.path, RemotePath)

    def chunks(self, checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
        """Yield the flat values of a tensor, one part after the other."""
        numel = checkpoint.infos[name].numel
        for start in range(0, numel, _CHUNK):
            values = checkpoint.read(name, start, min(start + _CHUNK, numel))
            yield values
            self._done += values.nbytes
            if self._advance is not None:
                self._advance(self._done, self._total)


@dataclass(frozen=True)
class WeightValues:
    """What the values of weights show.

    Attributes:
        not_finite: Number of NaN and infinite entries, by the name of each tensor that has some.
        equal: Groups of matrices with the same values, tied or stored twice.
    """

    not_finite: dict[str, int]
    equal: tuple[tuple[str, ...], ...]


def read_weights(weights: Checkpoint, reading: Reading) -> WeightValues:
    """Read weights once, and once more those that look like another tensor.

    Vectors are not compared: every fresh normalisation layer has the same ones and zeros.
    """
    not_finite: dict[str, int] = {}
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, info in weights.infos.items():
        bad, total, sample, constant = 0, 0.0, b"", True
        first: Tensor | None = None
        for values in reading.chunks(weights, name):
            bad += num_not_finite(values)
            if len(info.shape) < 2:
                continue
            if first is None:
                first = values[:1].clone()
                sample = hashlib.sha256(_bytes(values[:_SAMPLE])).digest()
            total += _sum(values)
            constant = constant and bool((values == first).all())
        if bad:
            not_finite[name] = bad
        elif first is not None and not constant:
            alike.setdefault((info, total, sample), []).append(name)
    groups = (_equal_groups(weights, names) for names in alike.values() if len(names) > 1)
    return WeightValues(not_finite, tuple(group for found in groups for group in found))


def num_not_finite(values: Tensor) -> int:
    """Return how many values are NaN or infinite.

    >>> num_not_finite(torch.tensor([1.0, float("nan"), float("inf"), -float("inf")]))
    3
    """
    if not (values.is_floating_point() or values.is_complex()):
        return 0
    if math.isfinite(_sum(values)):  # one infinity or NaN makes the sum neither
        return 0
    if values.dtype.itemsize == 1:  # torch has no isfinite for the types of one byte
        values = values.float()
    return int((~torch.isfinite(values)).sum())


def _sum(values: Tensor) -> float:
    if values.is_complex():
        values = torch.view_as_real(values)
    elif values.is_floating_point() and values.dtype.itemsize == 1:
        values = values.float()
    return float(values.sum(dtype=torch.float64))


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def _equal_groups(weights: Checkpoint, names: list[str]) -> list[tuple[str, ...]]:
    groups: list[list[str]] = []
    for name in names:
        for group in groups:
            if _equal(weights, group[0], name):
                group.append(name)
                break
        else:
            groups.append([name])
    return [tuple(group) for group in groups if len(group) > 1]


def _equal(weights: Checkpoint, one: str, two: str) -> bool:
    numel = weights.infos[one].numel
    ranges = ((start, min(start + _CHUNK, numel)) for start in range(0, numel, _CHUNK))
    return all(torch.equal(weights.read(one, *at), weights.read(two, *at)) for at in ranges)
