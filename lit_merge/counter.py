"""Random numbers that depend only on (seed, example, stream, position).

A counter-based generator: a number is a hash of its address, so that it does not matter in which
batch, in which order or on which rank an example is seen. The hash is the finaliser of splitmix64
(Steele, Lea and Flood (2014), "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def uniforms(seed: int, stream: int, indices: Sequence[int], count: int) -> Tensor:
    """Return numbers that are uniform in the open interval (0, 1).

    Args:
        seed: Any integer.
        stream: Which of several sequences per example.
        indices: The examples.
        count: How many numbers per example; the first ones do not depend on it.

    Returns:
        [len(indices), count], float64, on the CPU.
    """
    key = _key(seed, stream)
    examples = torch.tensor([_signed(_mix_int(key + (i + 1) * _GOLDEN)) for i in indices])
    positions = torch.arange(1, count + 1, dtype=torch.int64) * _signed(_GOLDEN)
    bits = _mix(examples.to(torch.int64)[:, None] + positions)
    return (_shift(bits, 12).double() + 0.5) / 2.0**52


def normals(seed: int, stream: int, indices: Sequence[int], count: int) -> Tensor:
    """Return standard normal numbers; arguments and result as for :func:`uniforms`."""
    return math.sqrt(2.0) * torch.erfinv(2 * uniforms(seed, stream, indices, count) - 1)


def signs(seed: int, stream: int, index: int, count: int, device: torch.device) -> Tensor:
    """Return Rademacher numbers, −1 and 1 with equal probability: [count], int8.

    Args:
        seed: Any integer.
        stream: Which of several sequences per index.
        index: What the sequence belongs to.
        count: How many numbers; the first ones do not depend on it.
        device: Where to make them; the numbers are the same everywhere.
    """
    key = _mix_int(_key(seed, stream) + (index + 1) * _GOLDEN)
    positions = torch.arange(1, -(-count // 64) + 1, dtype=torch.int64, device=device)
    words = _mix(positions * _signed(_GOLDEN) + _signed(key)).view(torch.uint8)
    bits = words[:, None] >> torch.arange(8, dtype=torch.uint8, device=device) & 1
    return bits.flatten()[:count].to(torch.int8) * 2 - 1


def kept(key: int, start: int, count: int, share: float, device: torch.device) -> Tensor:
    """Return which positions of a sequence are kept when each is with the same probability.

    Args:
        key: Names the sequence, as from :func:`key_of`.
        start: The first position.
        count: How many positions; what is kept of one does not depend on the others asked for.
        share: The probability, 0 to 1, which is taken to 32 bits.
        device: Where to make it; it is the same everywhere.

    Returns:
        [count], int32: 1 where a position is kept, 0 where not.
    """
    limit = round(share * 2**32) - 2**31
    if limit >= 2**31:
        return torch.ones(count, dtype=torch.int32, device=device)
    if limit <= -(2**31):
        return torch.zeros(count, dtype=torch.int32, device=device)
    # Compared in place, int32 is ten times as fast as what gives booleans.
    return _bits(key, start, count, device).lt_(limit)


def uniforms_from(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Return numbers that are uniform in [0, 1), one for each of a range of positions.

    Arguments are as for :func:`kept`.

    Returns:
        [count], float32, multiples of 2⁻²⁴.
    """
    bits = _bits(key, start, count, device) >> 8 & 0xFFFFFF
    return bits.to(torch.float32).mul_(2.0**-24)


def key_of(seed: int, *names: str) -> int:
    """Return a number for a seed and names in their order."""
    text = json.dumps([seed, *names]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def combined(numbers: Iterable[int]) -> int:
    """Return one number for a set of numbers, whatever their order."""
    key = 0
    for number in sorted(numbers):
        key = _mix_int(key * _GOLDEN + number + 1)
    return key


def _bits(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Return 32 random bits for each of a range of positions, two of which share a hash: int32."""
    first = start // 2
    words = torch.arange(first + 1, (start + count + 1) // 2 + 1, dtype=torch.int64, device=device)
    bits = _mix(words.mul_(_signed(_GOLDEN)).add_(_signed(_mix_int(key)))).view(torch.int32)
    return bits[start - 2 * first :][:count]


def _key(seed: int, stream: int) -> int:
    return _mix_int((_mix_int(seed * _GOLDEN) + (stream + 1) * _GOLDEN) & _MASK)


def _mix(z: Tensor) -> Tensor:
    """Hash int64 numbers; products wrap around."""
    z = (z ^ _shift(z, 30)) * _signed(_MULTIPLIERS[0])
    z = (z ^ _shift(z, 27)) * _signed(_MULTIPLIERS[1])
    return z ^ _shift(z, 31)


def _mix_int(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * _MULTIPLIERS[0]) & _MASK
    z = ((z ^ (z >> 27)) * _MULTIPLIERS[1]) & _MASK
    return z ^ (z >> 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right without copying the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(z: int) -> int:
    return z - (1 << 64) if z >= 1 << 63 else z
