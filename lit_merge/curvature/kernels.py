r"""Sums of squared per-example gradients, from the factors that a batched backward leaves behind.

A parameter's gradient on example n is a sum over the places t where the example used it (tokens,
pixels, calls). It comes in one of four forms:

* :class:`Outer`: a matrix, :math:`g_n = Σ_t l_{nt} r_{nt}^⊤` (linear and convolution weights);
* :class:`Rows`: a matrix of which single rows are hit (embeddings);
* :class:`PerExample`: small enough to be held for all examples (biases, norms' scales);
* :class:`OwnRows`: of a tensor with rows for every example, which each gets a gradient only in its
  own.

Only the sum over n of the squares is wanted, and no form ever holds N weight-sized gradients: one
buffer of about the weight's size is reused. A parameter that is used several times is given as
several contributions, which are summed *before* squaring.

The I axis of a convolution is (places of the kernel, channels), not torch's (channels, places), so
that patches of the input are copied in long runs.

Notation: B examples, T places, G groups (of a grouped convolution; else 1), O × I the weight's
matrix within a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lit_merge.curvature import fused
from lit_merge.curvature.estimator import widen

PAIRS_UP_TO = (
    4  # places per example up to which all T(T+1)/2 pairs cost less than a buffer's traffic
)
_SMALL_BUFFER = {"cpu": 1 << 15, "cuda": 1 << 22}  # elements: below, several examples share a GEMM


@dataclass(frozen=True)
class Outer:
    """Factors of :math:`g_n = Σ_t l_{nt} r_{nt}^⊤`.

    Attributes:
        left: [B, G, T, O].
        right: Gives examples [start, stop) of the other factor, [stop − start, G, T, I]; a
            function, because the unfolded input of a convolution is too large for a whole batch.
        at_once: How many examples it is to be asked for at a time.
    """

    left: Tensor
    right: Callable[[int, int], Tensor]
    at_once: int = 1 << 30

    def factors(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return both factors of examples [start, stop)."""
        return widen(self.left[start:stop]), widen(self.right(start, stop))


@dataclass(frozen=True)
class Rows:
    """Rows that are added to an otherwise zero gradient.

    Attributes:
        examples: [R], which example the row belongs to.
        indices: [R], which row of the parameter it is added to.
        values: [R, D].
    """

    examples: Tensor
    indices: Tensor
    values: Tensor


@dataclass(frozen=True)
class PerExample:
    """The gradients themselves, [B, *shape]."""

    values: Tensor


@dataclass(frozen=True)
class OwnRows:
    """The gradients of a tensor [k·B, …] of which example n has the rows k·n to k·(n+1).

    Attributes:
        values: [k·B, …], zero in the other examples' rows for each of them.
        repeats: k.
    """

    values: Tensor
    repeats: int


Contribution: TypeAlias = Outer | Rows | PerExample | OwnRows


def add_squares(
    total: Tensor, contributions: Sequence[Contribution], batch_size: int, *, factor: float = 1.0
) -> None:
    """Add Σ_n g_n² to a total in place, where g_n is the sum of the contributions.

    Args:
        total: What to add to, from :func:`~lit_merge.curvature.estimator.zeros_for`.
        contributions: All uses of one parameter.
        batch_size: B.
        factor: What the contributions are multiplied with before squaring.
    """
    kinds = {type(contribution) for contribution in contributions}
    square = factor**2
    if kinds == {PerExample}:
        values = [widen(c.values) for c in contributions if isinstance(c, PerExample)]
        summed = values[0] if len(values) == 1 else torch.stack(values).sum(0)
        total.add_(summed.square().sum(0).view_as(total), alpha=square)
    elif kinds == {Rows}:
        rows = _joined([c for c in contributions if isinstance(c, Rows)])
        _add_squared_rows(total, rows, square)
    elif kinds == {Outer}:
        outers = [c for c in contributions if isinstance(c, Outer)]
        if len({outer.left.shape[1] for outer in outers}) == 1:
            _add_squared_outer(total, outers, batch_size, square)
            return
        _add_one_by_one(total, contributions, batch_size, square)
    else:
        _add_one_by_one(total, contributions, batch_size, square)


def example_gradient(contributions: Sequence[Contribution], n: int, like: Tensor) -> Tensor:
    """Return g_n, the sum of the contributions of one example.

    Args:
        contributions: All uses of one tensor.
        n: Which example.
        like: A tensor of the gradient's shape and precision, from
            :func:`~lit_merge.curvature.estimator.zeros_for`.
    """
    gradient = torch.zeros_like(like)
    for contribution in contributions:
        if isinstance(contribution, Outer):
            left, right = contribution.factors(n, n + 1)
            stored = gradient.movedim(1, -1)  # a convolution's channels
            stored += torch.bmm(left[0].mT, right[0]).view(stored.shape)
        elif isinstance(contribution, Rows):
            own = contribution.examples == n
            gradient.index_add_(0, contribution.indices[own], widen(contribution.values[own]))
        elif isinstance(contribution, PerExample):
            gradient += contribution.values[n].view_as(gradient)
        else:
            own_rows = slice(n * contribution.repeats, (n + 1) * contribution.repeats)
            gradient[own_rows] += contribution.values[own_rows]
    return gradient


def _add_one_by_one(
    total: Tensor, contributions: Sequence[Contribution], batch_size: int, square: float
) -> None:
    """Add the squares of any mixture (a tied embedding and head), one example after the other."""
    for n in range(batch_size):
        gradient = example_gradient(contributions, n, total)
        total.addcmul_(gradient, gradient, value=square)


def _add_squared_outer(
    total: Tensor, outers: Sequence[Outer], batch_size: int, square: float
) -> None:
    """Add Σ_n (Σ_t l rᵀ)² to ``total``."""
    _, groups, _, width = outers[0].left.shape
    matrices = total.movedim(1, -1).view(groups, width, -1)  # the channels of a convolution last
    places = sum(outer.left.shape[2] for outer in outers)
    if places > 1 and matrices.dtype == torch.float32 and fused.is_usable(matrices.device):
        for left, right in _in_chunks(outers, batch_size):
            fused.add_squared_outer(matrices, left, right, square=square)
    elif places <= PAIRS_UP_TO:
        _add_by_pairs(matrices, *_factors(outers, 0, batch_size), square)
    else:
        _add_by_buffer(matrices, outers, batch_size, square)


def _add_by_pairs(total: Tensor, left: Tensor, right: Tensor, square: float) -> None:
    """Multiply the square out: Σ_n Σ_{s≤t} (2 if s<t) (l_s l_t)(r_s r_t)ᵀ is one GEMM.

    Args:
        total: [G, O, I].
        left: [B, G, T, O].
        right: [B, G, T, I].
        square: What the squares are multiplied with.
    """
    s, t = torch.triu_indices(left.shape[2], left.shape[2], device=left.device)
    lefts = left[:, :, s] * left[:, :, t] * torch.where(s == t, 1.0, 2.0).to(left.dtype)[:, None]
    rights = right[:, :, s] * right[:, :, t]
    lefts = lefts.transpose(0, 1).flatten(1, 2)  # [G, B·pairs, O]
    rights = rights.transpose(0, 1).flatten(1, 2)
    if len(s) == 1:
        total.baddbmm_(lefts.mT, rights, alpha=square)
    else:  # differences of products: rounding must not make a square negative
        total.add_(torch.bmm(lefts.mT, rights).clamp_(min=0), alpha=square)


def _add_by_buffer(total: Tensor, outers: Sequence[Outer], batch_size: int, square: float) -> None:
    """Form the gradients of a few examples at a time (of one, if the weight is large)."""
    at_once = max(1, _SMALL_BUFFER.get(total.device.type, 1 << 15) // total.numel())
    if at_once > 1:
        for start in range(0, batch_size, at_once):
            left, right = _factors(outers, start, min(start + at_once, batch_size))
            total.add_(torch.matmul(left.mT, right).square_().sum(0), alpha=square)
        return
    buffer = torch.empty_like(total)
    for left, right in _in_chunks(outers, batch_size):
        # Views of all examples at once: making them one by one costs as much as squaring.
        if len(total) == 1:
            whole, own = total[0], buffer[0]
            for a, b in zip(left[:, 0].mT.unbind(), right[:, 0].unbind(), strict=True):
                torch.mm(a, b, out=own)
                whole.addcmul_(own, own, value=square)
        else:
            for a, b in zip(left.mT.unbind(), right.unbind(), strict=True):
                torch.bmm(a, b, out=buffer)
                total.addcmul_(buffer, buffer, value=square)


def _in_chunks(outers: Sequence[Outer], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the factors of as many examples at a time as their patches have room for."""
    step = min(outer.at_once for outer in outers)
    for start in range(0, batch_size, step):
        yield _factors(outers, start, min(start + step, batch_size))


def _add_squared_rows(total: Tensor, rows: Rows, square: float) -> None:
    """Sum rows over equal (example, index) pairs, square, and add to ``total`` [V, D]."""
    keys, inverse = (rows.examples * len(total) + rows.indices).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    summed = total.new_zeros(len(keys), total.shape[1])
    summed.index_add_(0, inverse, widen(rows.values))
    total.index_add_(0, keys % len(total), summed.square_(), alpha=square)


def _factors(outers: Sequence[Outer], start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return the factors of some examples, all uses one after the other along T."""
    pairs = [outer.factors(start, stop) for outer in outers]
    if len(pairs) == 1:
        return pairs[0]
    lefts, rights = zip(*pairs, strict=True)
    return torch.cat(lefts, 2), torch.cat(rights, 2)


def _joined(rows: Sequence[Rows]) -> Rows:
    return Rows(
        torch.cat([r.examples for r in rows]),
        torch.cat([r.indices for r in rows]),
        torch.cat([r.values for r in rows]),
    )
