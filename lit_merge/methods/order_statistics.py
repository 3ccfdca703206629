r"""Order statistics of task vectors: the k-th largest magnitude in a whole model, exactly.

A sample of the slices brackets each k-th magnitude; one pass over everything then counts what lies
above the bracket and gathers the few entries inside, among which the k-th is selected. A bracket
that missed costs another pass with a better one. The result is exact whatever the sample, so it
does not depend on how tensors are cut into slices. Memory is some 60 MB at any model size.

Magnitudes are those of float32 numbers, whose bit patterns order as the numbers do. A NaN counts
as smaller than all others.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_merge.methods.method import LookAtAll, ParameterSlice

Scope = Literal["global", "tensor"]
Ranks = Callable[[int], Sequence[int]]
"""The k that are asked for, given the number of entries; always as many."""
Thresholds = dict[str, tuple[tuple[float, ...], ...]]
"""By group: per expert, the magnitude of each rank that was asked for."""

SAMPLED = 16  # the brackets come from every 16th slice of a tensor …
_STRIDE = 4  # … and there from every fourth entry
_SAMPLE_BINS = 1 << 15  # a magnitude's sign bit is zero: 15 of the high 16 bits remain
_INFINITY = 0x7F800000  # float32's bit pattern of it
_BEYOND = _INFINITY + 1  # a NaN, which no number reaches
_COLLECTED = 1 << 18  # entries inside brackets that a group keeps before it counts them in bins
_BINS = 1 << 23  # of a group's brackets together: 32 MB


def trimmed(vector: Tensor, threshold: float) -> Tensor:
    """Return the vector with zeros for all magnitudes below a threshold, in a new tensor.

    Args:
        vector: Of float32 or float64.
        threshold: A magnitude of float32, as from :func:`kth_magnitudes`. Infinity trims all
            numbers; NaN and infinity always stay, so that they are seen in what is made of them.
    """
    return torch.nn.functional.hardshrink(vector, _largest_below(threshold, vector.dtype))


def _largest_below(threshold: float, dtype: torch.dtype) -> float:
    """Return the largest number that is less than a threshold once it is rounded to float32."""
    if threshold == 0:
        return -1.0  # below all magnitudes
    bits = struct.unpack("<i", struct.pack("<f", threshold))[0]
    below = _float(bits - 1)
    if dtype == torch.float32:
        return below
    middle = (below + (threshold if math.isfinite(threshold) else 2.0**128)) / 2
    # Half way, numbers are rounded to the even one.
    return math.nextafter(middle, 0.0) if bits % 2 == 0 else middle


def group_of(name: str, scope: Scope) -> str:
    """Return the group that a tensor belongs to: its own, or that of all."""
    return name if scope == "tensor" else ""


def kth_magnitudes(look_at_all: LookAtAll, ranks: Ranks, scope: Scope) -> Thresholds:
    r"""Return the k-th largest :math:`|τ_t|` of every group of tensors, exactly, per expert.

    Args:
        look_at_all: Starts a pass.
        ranks: The k that are asked for in a group of so many entries.
        scope: Whether all tensors are one group, or each is one.

    Returns:
        The thresholds; infinity where k is zero.
    """
    found: Thresholds = {}
    brackets = _select(
        look_at_all, ranks, scope, _sampled_brackets(look_at_all, ranks, scope), found
    )
    while brackets:
        brackets = _select(look_at_all, ranks, scope, brackets, found)
    return found


class _Bracket(NamedTuple):
    """Bit patterns between which an order statistic is believed to lie: low ≤ it < high."""

    low: int
    high: int


_ANYWHERE = _Bracket(0, _BEYOND)

_Brackets = dict[str, list[list[_Bracket]]]  # by group: per expert, per rank


def _sampled_brackets(look_at_all: LookAtAll, ranks: Ranks, scope: Scope) -> _Brackets:
    """Guess the brackets from some of the slices, each tensor's weighted by the tensor's size."""

    def look(p: ParameterSlice) -> tuple[int, list[Tensor]]:
        size = p.experts[0].numel() if p.shape is None else math.prod(p.shape)
        high = [m[::_STRIDE].view(torch.int32) >> 16 for m in _magnitudes(p)]
        return size, [bits.to(torch.int16).cpu() for bits in high]

    brackets: _Brackets = {}
    passed = look_at_all(look, every=SAMPLED)
    for group, run in groupby(passed, key=lambda entry: group_of(entry[0], scope)):
        sample = _Sample()
        for _, tensor in groupby(run, key=lambda entry: entry[0]):
            sample.add(found for _, found in tensor)
        brackets[group] = sample.brackets(ranks)
    return brackets


class _Sample:
    """Histograms of a group's sampled magnitudes, per expert."""

    def __init__(self) -> None:
        self.size = 0
        self.slices = 0
        self.entries = 0
        self.histograms: list[Tensor] = []

    def add(self, slices: Iterable[tuple[int, list[Tensor]]]) -> None:
        """Take in the sampled slices of one tensor, one after the other."""
        size = entries = 0
        counts: list[Tensor] = []
        for size, bits in slices:  # noqa: B007 (the size is the tensor's, the same in each)
            found = [torch.bincount(b.int(), minlength=_SAMPLE_BINS) for b in bits]
            counts = [c.add_(f) for c, f in zip(counts, found, strict=True)] if counts else found
            self.slices += 1
        if counts:
            entries = int(counts[0].sum())
        weighted = [c.double() * (size / max(entries, 1)) for c in counts]
        if self.histograms:
            weighted = [h.add_(w) for h, w in zip(self.histograms, weighted, strict=True)]
        self.histograms = weighted
        self.entries += entries
        self.size += size

    def brackets(self, ranks: Ranks) -> list[list[_Bracket]]:
        """Return brackets some standard errors wide."""
        found = []
        for histogram in self.histograms:
            from_the_top = histogram.flip(0).cumsum(0) / max(self.size, 1)
            shares = [rank / max(self.size, 1) for rank in ranks(self.size)]
            found.append([self._bracket(from_the_top, share) for share in shares])
        return found

    def _bracket(self, from_the_top: Tensor, share: float) -> _Bracket:
        # Magnitudes differ more between the slices of a tensor than within. With 0.3 for a slice,
        # no global threshold of a fine-tuned MiniLM was missed, and those of tensors with 2 % of
        # its entries.
        spread = math.sqrt(share * max(1 - share, 0.0))
        margin = spread * (0.3 / math.sqrt(max(self.slices, 1)) + 4 / math.sqrt(self.entries + 1))
        top, bottom = torch.searchsorted(
            from_the_top, torch.tensor([share - margin, share + margin], dtype=torch.float64)
        ).tolist()
        return _Bracket(
            low=max(_SAMPLE_BINS - 1 - bottom, 0) << 16,
            high=min((_SAMPLE_BINS - top) << 16, _BEYOND),
        )


def _select(
    look_at_all: LookAtAll, ranks: Ranks, scope: Scope, brackets: _Brackets, found: Thresholds
) -> _Brackets:
    """Add the groups to ``found`` whose brackets held; return the better brackets of the others."""
    done = frozenset(found)

    def look(p: ParameterSlice) -> tuple[int, list[list[tuple[int, Tensor]]]] | None:
        group = group_of(p.name, scope)
        if group in done:
            return None
        mine = brackets.get(group) or [[_ANYWHERE] * len(ranks(0))] * len(p.experts)
        split = [
            [_split(m, _float(low), _float(high)) for low, high in expert]
            for m, expert in zip(_magnitudes(p), mine, strict=True)
        ]
        return p.experts[0].numel(), split

    better: _Brackets = {}
    passed = look_at_all(look)
    for group, run in groupby(passed, key=lambda entry: group_of(entry[0], scope)):
        size = 0
        tallies: list[list[_Tally]] = []
        for _, seen in run:
            if seen is None:
                continue
            count, split = seen
            size += count
            if not tallies:
                tallies = _tallies(brackets.get(group), split)
            for mine, entries in zip(tallies, split, strict=True):
                for tally, (above, inside) in zip(mine, entries, strict=True):
                    tally.add(above, inside)
        narrowed = [
            [tally.narrowed(rank) for tally, rank in zip(mine, ranks(size), strict=True)]
            for mine in tallies
        ]
        if all(low + 1 == high for expert in narrowed for low, high in expert):
            if narrowed:
                found[group] = tuple(tuple(_float(b.low) for b in expert) for expert in narrowed)
        else:
            better[group] = narrowed
    return better


def _tallies(
    brackets: list[list[_Bracket]] | None, split: list[list[tuple[int, Tensor]]]
) -> list[list[_Tally]]:
    count = sum(len(entries) for entries in split)
    bins = 1 << max(_BINS // count, 1 << 10).bit_length() - 1
    if brackets is None:
        return [[_Tally(_ANYWHERE, bins) for _ in entries] for entries in split]
    return [[_Tally(bracket, bins) for bracket in mine] for mine in brackets]


class _Tally:
    """What is seen of one group of one expert while its slices go by, around one bracket."""

    def __init__(self, bracket: _Bracket, bins: int) -> None:
        self._bracket = bracket
        self._above = 0
        # One piece of memory: many small ones among the stream's large ones would scatter it.
        self._inside = torch.empty(_COLLECTED)
        self._collected = 0
        # The fewest bit patterns per bin, a power of two, with which the bracket has enough bins.
        self._shift = max((bracket.high - bracket.low - 1).bit_length() - bins.bit_length() + 1, 0)
        self._bins = bins
        self._histogram: Tensor | None = None

    def add(self, above: int, inside: Tensor) -> None:
        """Take in the count above and the magnitudes inside of one slice."""
        self._above += above
        before, self._collected = self._collected, self._collected + inside.numel()
        if self._collected <= _COLLECTED:
            self._inside[before : self._collected] = inside
        else:
            if self._histogram is None:
                self._count(self._inside[:before])
            self._count(inside)

    def narrowed(self, rank: int) -> _Bracket:
        """Return where the rank-th largest lies: one bit pattern where that is known."""
        low, high = self._bracket
        if rank == 0:
            return _Bracket(_INFINITY, _INFINITY + 1)
        if rank <= self._above:
            return _Bracket(high, _BEYOND)
        inside = rank - self._above
        if inside > self._collected:
            return _Bracket(0, max(low, 1))  # 0 itself where only NaN is left
        if self._histogram is None:
            values = self._inside[: self._collected]
            bits = int(values.view(torch.int32).kthvalue(values.numel() + 1 - inside).values)
            return _Bracket(bits, bits + 1)
        from_the_top = self._histogram.flip(0).cumsum(0)  # int64
        position = len(from_the_top) - 1 - int(torch.searchsorted(from_the_top, inside))
        start = low + (position << self._shift)
        return _Bracket(start, min(start + (1 << self._shift), high))

    def _count(self, inside: Tensor) -> None:
        """Turn entries into counts, for which memory does not grow."""
        bins = (inside.view(torch.int32) - self._bracket.low) >> self._shift
        if self._histogram is None:
            self._histogram = torch.zeros(self._bins, dtype=torch.int32)
        self._histogram.index_add_(0, bins, torch.ones_like(bins))


def _magnitudes(p: ParameterSlice) -> Iterable[Tensor]:
    base = p.require_base()
    return ((expert - base).abs_().to(torch.float32).flatten() for expert in p.experts)


def _split(magnitudes: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """Return how many are at least ``high``, and those that are at least ``low`` but not that."""
    if magnitudes.device.type != "cpu":
        return _split_on_device(magnitudes, low, high)
    values = magnitudes.numpy()  # five times as fast as torch at comparing, counting and finding
    top, inside = values >= high, values >= low
    inside ^= top
    return int(np.count_nonzero(top)), torch.from_numpy(values[np.flatnonzero(inside)])


def _split_on_device(magnitudes: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    top = magnitudes >= high
    return int(top.count_nonzero()), magnitudes[(magnitudes >= low) & ~top].cpu()


def _float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<i", bits))[0])
