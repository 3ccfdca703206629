r"""How good an estimate of the curvature is: how far two halves of its examples are apart.

A sum over n examples says more about a weight than about another, and 200 examples may or may not
be enough. The examples are therefore dealt out to two halves, and what the halves say is compared.
With :math:`a, b` the mean of an entry over the :math:`n_a` and :math:`n_b` examples of the halves
and :math:`f = (n_a a + n_b b) / n` that over all :math:`n = n_a + n_b`, the relative error is

.. math:: e = \frac{\sqrt{n_a n_b}}{n} \frac{‖a - b‖}{‖f‖},
    \qquad e = \frac{‖a - b‖}{‖a + b‖} \text{ for halves of one size.}

For examples in random order, :math:`e^2 ‖f‖^2` has the expectation :math:`E‖f - E f‖^2`: e is the
standard error of the FULL sum, relative to it, not that of a half (which is :math:`\sqrt 2` times
as large). It falls as :math:`1/\sqrt n`. It is 0 for identical halves, and 1 for halves of one size
that share no entry. Of all N examples of a training set, the sum of squares with their own labels
is exact; e then says what another training set of that size would change.

The rank correlation is Spearman's: of what the halves say of the order of the entries.

Only some entries of every tensor are followed, :data:`MOST` at most, the same ones all the time, so
that the halves need no second accumulator. Norms and ranks over several tensors give every followed
entry the weight of those that it stands for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST = 4096
"""How many entries of a tensor are followed: rank correlations are then known to 0.02."""

POOR_ERROR = 0.5
"""A relative error above which the estimate is poor. A few examples with large gradients make most
of it: on small trained networks it is 0.5 at 200 examples, where the order is known to 0.97."""

POOR_CORRELATION = 0.7
"""A rank correlation below which the estimate is poor."""

_ROUNDING = 1e-12  # squares this small a share of the largest tensor's mean are rounding errors
_ALTERNATING = 6  # the first 2⁶ batches alternate, the later ones in blocks of a growing number
_NAMED = 5


@dataclass(frozen=True)
class Agreement:
    """How well two halves agree on some entries.

    Attributes:
        relative_error: e of the module's docstring; None where all entries are zero.
        rank_correlation: In [-1, 1]; None where one of the halves has only equal entries.
    """

    relative_error: float | None
    rank_correlation: float | None


@dataclass(frozen=True)
class Quality:
    """How well the halves of a pass agree.

    Attributes:
        num_examples: How many each half has.
        overall: Over all tensors.
        tensors: By parameter name. Left out are tensors of which there is nothing but rounding
            errors, such as the bias of attention keys.
    """

    num_examples: tuple[int, int]
    overall: Agreement
    tensors: Mapping[str, Agreement]

    @property
    def poor(self) -> bool:
        """Whether a person should be warned."""
        error, correlation = self.overall.relative_error, self.overall.rank_correlation
        return (error is not None and error > POOR_ERROR) or (
            correlation is not None and correlation < POOR_CORRELATION
        )

    def __str__(self) -> str:
        """Return the overall numbers in words."""
        return in_words(self.as_dict())

    def examples_needed(self) -> int:
        """Return how many examples would bring the relative error down to half of poor."""
        error = self.overall.relative_error or 0.0
        return math.ceil(sum(self.num_examples) * max(2.0, (2 * error / POOR_ERROR) ** 2))

    def as_dict(self) -> dict[str, Any]:
        """Return the overall numbers and those of the worst few tensors, as JSON primitives."""
        worst = sorted(self.tensors, key=lambda n: -(self.tensors[n].relative_error or 0.0))
        return {
            "num_examples": list(self.num_examples),
            **vars(self.overall),
            "worst": {name: vars(self.tensors[name]) for name in worst[:_NAMED]},
        }


def in_words(report: Mapping[str, Any]) -> str:
    """Return the overall numbers of a :meth:`Quality.as_dict` in words.

    >>> in_words({"relative_error": 0.042, "rank_correlation": 0.98, "num_examples": [100, 99]})
    'relative error 4.2 %, rank correlation 0.98 (by halves of 100 and 99 examples)'
    """
    error, correlation = report["relative_error"], report["rank_correlation"]
    parts = [] if error is None else [f"relative error {100 * error:.2g} %"]
    parts += [] if correlation is None else [f"rank correlation {correlation:.2f}"]
    first, second = report["num_examples"]
    found = ", ".join(parts) or "nothing but zeros"
    return f"{found} (by halves of {first:,} and {second:,} examples)"


class Halves:
    """Deals the batches of a pass out to two halves, and follows some entries of the sums.

    The first :math:`2^6` batches alternate, so that data that are sorted in some way do not matter
    much; later ones alternate in blocks, 32 to every doubling of the number of batches, so that
    reading costs nothing in a long pass.

    Attributes:
        positions: By parameter name, the followed entries: row-major and ascending.
        num_batches: How many batches were dealt out.
        num_examples: How many examples each half has.
        first: [k], sums of the first half over its finished blocks, of all followed entries.
        mark: [k], the sums over everything when the current block of batches began.
    """

    def __init__(self, sizes: Mapping[str, int], *, seed: int) -> None:
        """Choose the entries.

        Args:
            sizes: Number of elements of every parameter, by name.
            seed: Of the choice; it depends on nothing else but the parameter's name and size.
        """
        self.positions = {name: _chosen(name, size, seed) for name, size in sizes.items()}
        self._sizes = dict(sizes)
        count = sum(len(chosen) for chosen in self.positions.values())
        self.num_batches = 0
        self.num_examples = [0, 0]
        self.first = torch.zeros(count, dtype=torch.float64)
        self.mark = torch.zeros(count, dtype=torch.float64)

    def add(self, size: int, read: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
        """Count a batch whose examples have just been added to the sums.

        Args:
            size: Its number of examples.
            read: Returns the entries of the sums at :attr:`positions`, one after the other.
        """
        half = _half(self.num_batches)
        self.num_batches += 1
        self.num_examples[half] += size
        if _half(self.num_batches) == half:
            return
        now = read(self.positions)
        if half == 0:
            self.first += now - self.mark
        self.mark = now

    def sums(self, read: Callable[[Mapping[str, Tensor]], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the sums [k] of each half over the batches so far."""
        now = read(self.positions)
        first = self.first.clone()
        unfinished = self.num_batches and _half(self.num_batches - 1) == 0
        if unfinished and _half(self.num_batches) == 0:
            first += now - self.mark
        return first, now - first

    def compare(self, first: Tensor, second: Tensor, counts: tuple[int, int]) -> Quality | None:
        """Return how well the halves agree.

        Args:
            first: [k], sums of the first half, over all ranks.
            second: [k], those of the second.
            counts: How many examples each has, over all ranks.

        Returns:
            None if a half has no examples.
        """
        if not all(counts):
            return None
        lengths = [len(chosen) for chosen in self.positions.values()]
        means = [torch.split(x, lengths) for x in (first / counts[0], second / counts[1])]
        pairs = dict(zip(self.positions, zip(*means, strict=True), strict=True))
        overall = agreement(
            first / counts[0],
            second / counts[1],
            counts,
            weights=torch.cat(
                [
                    torch.full((k,), self._sizes[name] / max(k, 1), dtype=torch.float64)
                    for name, k in zip(self.positions, lengths, strict=True)
                ]
            ),
        )
        level = {name: float((a + b).abs().mean()) for name, (a, b) in pairs.items()}
        floor = _ROUNDING * max(level.values(), default=0.0)
        tensors = {
            name: agreement(a, b, counts) for name, (a, b) in pairs.items() if level[name] > floor
        }
        return Quality(counts, overall, tensors)


def agreement(
    first: Tensor, second: Tensor, counts: tuple[int, int], *, weights: Tensor | None = None
) -> Agreement:
    """Return how well the means of two halves agree.

    Args:
        first: [k], means over the first half.
        second: [k], means over the second.
        counts: How many examples each has.
        weights: [k], how many entries each stands for; None for one.

    >>> agreement(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0]), (5, 5))
    Agreement(relative_error=0.5, rank_correlation=1.0)
    """
    a, b = first.double(), second.double()
    w = torch.ones_like(a) if weights is None else weights.double()
    n_a, n_b = counts
    n = n_a + n_b
    norm = float((w * ((n_a * a + n_b * b) / n).square()).sum().sqrt())
    distance = float((w * (a - b).square()).sum().sqrt())
    error = math.sqrt(n_a * n_b) / n * distance / norm if norm > 0 else None
    return Agreement(error, _correlation(_ranks(a, w), _ranks(b, w), w))


def _correlation(x: Tensor, y: Tensor, weights: Tensor) -> float | None:
    """Return Pearson's correlation of weighted values, None where one of them is constant."""
    share = weights / weights.sum()
    x, y = x - (share * x).sum(), y - (share * y).sum()
    squares = float((share * x * x).sum()) * float((share * y * y).sum())
    if any(len(ranks) == 0 or bool(ranks.min() == ranks.max()) for ranks in (x, y)):
        return None
    return max(-1.0, min(1.0, float((share * x * y).sum()) / math.sqrt(squares)))


def _ranks(values: Tensor, weights: Tensor) -> Tensor:
    """Return the mean rank of each value among the entries that all of them stand for."""
    order = values.argsort()
    changes = values[order].diff() != 0
    which = torch.zeros(len(values), dtype=torch.long)  # of the distinct values, in their order
    which[order[1:]] = changes.cumsum(0)
    held = torch.zeros(len(values), dtype=torch.float64).index_add(0, which, weights)
    return (held.cumsum(0) - held / 2)[which]


def _half(batch: int) -> int:
    """Return which half a batch belongs to, 0 or 1."""
    return (batch >> max(0, batch.bit_length() - _ALTERNATING)) % 2


def _chosen(name: str, size: int, seed: int) -> Tensor:
    if size <= MOST:
        return torch.arange(size)
    digest = hashlib.sha256(f"{seed}/{name}/{size}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    drawn = torch.randint(size, (MOST,), generator=generator)  # a permutation would be as large
    return torch.tensor(sorted(set(drawn.tolist())))  # a few were drawn twice
