"""TIES: trim small changes, elect a sign per entry, average those that agree with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lit_merge.methods.method import (
    LookAtAll,
    MergeMethod,
    ParameterSlice,
    add_task_vectors,
    looking_at,
)
from lit_merge.methods.settings import check_choice, check_number

_HIGH_BINS = 1 << 15  # a magnitude's sign bit is zero: 15 of the high 16 bits remain
_LOW_BINS = 1 << 16


def elect_and_merge(
    base: Tensor,
    experts: Sequence[Tensor],
    thresholds: Sequence[float],
    *,
    scale: float,
    sign: Literal["total", "frequency"],
) -> Tensor:
    r"""Return the base plus the scaled disjoint mean of the trimmed task vectors.

    Entries :math:`|τ_t|` below the expert's threshold count as zero. The elected sign of an entry
    is that of the sum of what is left (``"total"``), or of most experts (``"frequency"``); where
    both are even, plus. The mean is over the experts whose entry has the elected sign.

    Args:
        base: :math:`θ_0`.
        experts: :math:`θ_t`, of the base's shape and dtype.
        thresholds: The least magnitude that is kept, per expert.
        scale: What the mean is multiplied with.
        sign: How the sign is elected.
    """
    trimmed = []
    for expert, threshold in zip(experts, thresholds, strict=True):
        vector = expert - base
        trimmed.append(torch.where(_magnitude(vector) >= threshold, vector, 0))
    votes = torch.stack(trimmed)
    if sign == "frequency":
        votes = votes.sign()
    elected = torch.where(votes.sum(dim=0) >= 0, 1.0, -1.0).to(base.dtype)
    agree = [(vector.sign() == elected).to(base.dtype) for vector in trimmed]
    share = scale / torch.stack(agree).sum(dim=0).clamp(min=1)
    return add_task_vectors(base, experts, [share * kept for kept in agree])


def magnitude_thresholds(
    look_at_all: LookAtAll, density: float, group: Callable[[str], str]
) -> dict[str, tuple[float, ...]]:
    r"""Return the k-th largest :math:`|τ_t|` of every group of tensors, exactly, per expert.

    k is ⌊density·n⌋ of the group's n entries. Two passes of radix selection over the bit patterns
    of the float32 magnitudes, which order as the numbers do: the first counts the high 16 bits,
    the second the low 16 bits within the bin that the k-th falls into. Memory is a few histograms
    per group at any model size.

    Args:
        look_at_all: Starts a pass.
        density: The share to keep, 0 to 1.
        group: Names the group of a tensor.

    Returns:
        Thresholds per expert by group: entries of at least that magnitude are kept. Infinity
        where k is zero. Magnitudes that equal the k-th are all kept, so that the result does not
        depend on any order.
    """

    def high_bits(p: ParameterSlice) -> list[Tensor]:
        return [
            torch.bincount(bits >> 16, minlength=_HIGH_BINS).cpu() for bits in _bit_patterns(p)
        ]

    bins = {
        name: [_from_the_top(counts, int(density * int(counts.sum()))) for counts in histograms]
        for name, histograms in _totals(look_at_all(high_bits), group).items()
    }

    def low_bits(p: ParameterSlice) -> list[Tensor]:
        return [
            torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=_LOW_BINS).cpu()
            for bits, (high, _) in zip(_bit_patterns(p), bins[group(p.name)], strict=True)
        ]

    thresholds: dict[str, tuple[float, ...]] = {}
    for name, histograms in _totals(look_at_all(low_bits), group).items():
        found = [
            (high << 16) + _from_the_top(counts, rank)[0] if rank else _INFINITY
            for counts, (high, rank) in zip(histograms, bins[name], strict=True)
        ]
        thresholds[name] = tuple(
            torch.tensor(found, dtype=torch.int32).view(torch.float32).tolist()
        )
    return thresholds


_INFINITY = 0x7F800000  # float32's bit pattern of it


def _magnitude(vector: Tensor) -> Tensor:
    # float32 also for float64 slices: the survey and the merge must order entries alike.
    return vector.abs().to(torch.float32)


def _bit_patterns(p: ParameterSlice) -> list[Tensor]:
    base = p.require_base()
    return [_magnitude(expert - base).view(torch.int32).flatten() for expert in p.experts]


def _totals(
    found: Iterable[tuple[str, list[Tensor]]], group: Callable[[str], str]
) -> dict[str, list[Tensor]]:
    """Return the sums of the slices' histograms, per expert by group."""
    totals: dict[str, list[Tensor]] = {}
    for name, histograms in found:
        mine = totals.setdefault(group(name), [torch.zeros_like(counts) for counts in histograms])
        for total, counts in zip(mine, histograms, strict=True):
            total += counts
    return totals


def _from_the_top(histogram: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin that holds the rank-th largest entry and its rank within that bin."""
    if rank == 0:
        return len(histogram) - 1, 0
    above = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(above, rank))
    before = int(above[position - 1]) if position else 0
    return len(histogram) - 1 - position, rank - before


@dataclass(frozen=True)
class TIES(MergeMethod):
    """Trim, elect sign, and merge.

    Args:
        density: The share of each task vector's entries to keep, the largest in magnitude: 0 to 1.
        scale: What the merged task vector is multiplied with before it is added to the base.
        scope: Whether that share is of the whole task vector over all merged tensors
            (``"global"``, as in the paper) or of every tensor on its own (``"tensor"``).
        sign: Whether entries elect their sign by their sum (``"total"``, as in the paper) or by
            one vote each (``"frequency"``).

    Raises:
        InputError: A number is out of its range or a word unknown.

    References:
        Yadav et al. (2023), arXiv:2306.01708.

    Note:
        ⌊density·n⌋ entries are kept, plus those that equal the smallest kept one; the authors'
        code keeps one more. Which those are is a fact of whole tensors, found by a survey before
        the merge, so that chunks and shards can be merged in either scope. A slice merged without
        a survey counts as the whole task vector. Magnitudes are compared in float32.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"base"})

    density: float = 0.2
    scale: float = 1.0
    scope: Literal["global", "tensor"] = "global"
    sign: Literal["total", "frequency"] = "total"

    def __post_init__(self) -> None:
        check_number("TIES.density", self.density, low=0, high=1)
        check_number("TIES.scale", self.scale)
        check_choice("TIES.scope", self.scope, ("global", "tensor"))
        check_choice("TIES.sign", self.sign, ("total", "frequency"))

    def survey(self, look_at_all: LookAtAll) -> Mapping[str, tuple[float, ...]]:
        """Find every expert's thresholds, in two passes."""
        return magnitude_thresholds(look_at_all, self.density, self._group)

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice."""
        fact = self.survey(looking_at([p])) if p.fact is None else p.fact
        return elect_and_merge(
            p.require_base(),
            p.experts,
            fact[self._group(p.name)],
            scale=self.scale,
            sign=self.sign,
        )

    def _group(self, name: str) -> str:
        return name if self.scope == "tensor" else ""
