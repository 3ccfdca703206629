r"""Sums of squared per-example gradients, from the factors that a batched backward leaves behind.

A parameter's gradient on example n is a sum over the places t where the example used it (tokens,
pixels, calls). It comes in one of three forms:

* :class:`Outer`: a matrix, :math:`g_n = Σ_t l_{nt} r_{nt}^⊤` (linear and convolution weights);
* :class:`Rows`: a matrix of which single rows are hit (embeddings);
* :class:`PerExample`: small enough to be held for all examples (biases, norms' scales).

Only the sum over n of the squares is wanted, and no form ever holds N weight-sized gradients: one
buffer of about the weight's size is reused. A parameter that is used several times is given as
several contributions, which are summed *before* squaring.

The I axis of a convolution is (places of the kernel, channels), not torch's (channels, places), so
that patches of the input are copied in long runs.

Notation: B examples, T places, G groups (of a grouped convolution; else 1), O × I the weight's
matrix within a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

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
    """

    left: Tensor
    right: Callable[[int, int], Tensor]

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


Contribution: TypeAlias = Outer | Rows | PerExample


def add_squares(total: Tensor, contributions: Sequence[Contribution], batch_size: int) -> None:
    """Add Σ_n g_n² to a total in place, where g_n is the sum of the contributions.

    Args:
        total: What to add to, from :func:`~lit_merge.curvature.estimator.zeros_for`.
        contributions: All uses of one parameter. Either all :class:`PerExample`, or matrix-like:
            any mix of :class:`Rows` and ungrouped :class:`Outer` (a tied embedding and head), or
            :class:`Outer` of the same number of groups.
        batch_size: B.
    """
    outers = [c for c in contributions if isinstance(c, Outer)]
    rows = [c for c in contributions if isinstance(c, Rows)]
    values = [widen(c.values) for c in contributions if isinstance(c, PerExample)]
    assert not (values and (outers or rows)), "per-example gradients mixed with factors"
    if values:
        summed = values[0] if len(values) == 1 else torch.stack(values).sum(0)
        total += summed.square().sum(0).view_as(total)
    if outers:
        groups = outers[0].left.shape[1]
        last = total.movedim(1, -1)  # a convolution's channels
        matrices = last.view(groups, outers[0].left.shape[3], -1)
        if rows:
            _add_squared_mixture(matrices[0], outers, _joined(rows), batch_size)
        else:
            _add_squared_outer(matrices, outers, batch_size)
    elif rows:
        _add_squared_rows(total, _joined(rows), batch_size)


def _add_squared_outer(total: Tensor, outers: Sequence[Outer], batch_size: int) -> None:
    """Add Σ_n (Σ_t l rᵀ)² to ``total`` [G, O, I]."""
    if sum(outer.left.shape[2] for outer in outers) <= PAIRS_UP_TO:
        _add_by_pairs(total, *_factors(outers, 0, batch_size))
    else:
        _add_by_buffer(total, outers, batch_size)


def _add_by_pairs(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Multiply the square out: Σ_n Σ_{s≤t} (2 if s<t) (l_s l_t)(r_s r_t)ᵀ is one GEMM.

    Args:
        total: [G, O, I].
        left: [B, G, T, O].
        right: [B, G, T, I].
    """
    s, t = torch.triu_indices(left.shape[2], left.shape[2], device=left.device)
    lefts = left[:, :, s] * left[:, :, t] * torch.where(s == t, 1.0, 2.0).to(left.dtype)[:, None]
    rights = right[:, :, s] * right[:, :, t]
    lefts = lefts.transpose(0, 1).flatten(1, 2)  # [G, B·pairs, O]
    rights = rights.transpose(0, 1).flatten(1, 2)
    if len(s) == 1:
        total.baddbmm_(lefts.mT, rights)
    else:  # differences of products: rounding must not make a square negative
        total += torch.bmm(lefts.mT, rights).clamp_(min=0)


def _add_by_buffer(total: Tensor, outers: Sequence[Outer], batch_size: int) -> None:
    """Form the gradients of a few examples at a time (of one, if the weight is large)."""
    at_once = max(1, _SMALL_BUFFER.get(total.device.type, 1 << 15) // total.numel())
    if at_once > 1:
        for start in range(0, batch_size, at_once):
            left, right = _factors(outers, start, min(start + at_once, batch_size))
            total += torch.matmul(left.mT, right).square_().sum(0)
        return
    buffer = torch.empty_like(total)
    for n in range(batch_size):
        left, right = _factors(outers, n, n + 1)
        if len(total) == 1:
            torch.mm(left[0, 0].mT, right[0, 0], out=buffer[0])
        else:
            torch.bmm(left[0].mT, right[0], out=buffer)
        total.addcmul_(buffer, buffer)


def _add_squared_rows(total: Tensor, rows: Rows, batch_size: int) -> None:
    """Sum rows over equal (example, index) pairs, square, and add to ``total`` [V, D]."""
    keys, inverse = (rows.examples * len(total) + rows.indices).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    summed = total.new_zeros(len(keys), total.shape[1])
    summed.index_add_(0, inverse, widen(rows.values))
    total.index_add_(0, keys % len(total), summed.square_())


def _add_squared_mixture(
    total: Tensor, outers: Sequence[Outer], rows: Rows, batch_size: int
) -> None:
    """Add Σ_n (Σ_t l rᵀ + rows)² to ``total`` [O, I]."""
    buffer = torch.empty_like(total)
    for n in range(batch_size):
        left, right = _factors(outers, n, n + 1)
        torch.mm(left[0, 0].mT, right[0, 0], out=buffer)
        own = rows.examples == n
        buffer.index_add_(0, rows.indices[own], widen(rows.values[own]))
        total.addcmul_(buffer, buffer)


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
