"""Merging task vectors whose signs disagree: elect a sign per entry, merge those that have it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

Sign = Literal["total", "frequency"]
Weigh = Literal["values", "votes"]
Divide = Literal["count", "weights", "none"]


def elected_task_vector(
    vectors: Iterable[Tensor],
    weights: Sequence[float],
    *,
    sign: Sign = "total",
    weigh: Weigh = "values",
    divide: Divide = "count",
) -> Tensor:
    r"""Return, entry by entry, the mean of the vectors that have the elected sign there.

    Args:
        vectors: :math:`\hat τ_t`, sparse: a zero has no sign. At least one, of one shape and
            dtype; asked for one after the other, so that they need not be there at once.
        weights: :math:`w_t`, which the vectors are multiplied with.
        sign: The elected sign is that of the vectors' sum (``"total"``), or of most of them
            (``"frequency"``); where both are even, plus.
        weigh: Whether the weights come after the election (``"values"``), or before it, so that
            they count in the votes as well (``"votes"``).
        divide: What the sum of the elected is divided by: their number (``"count"``), the sum of
            their weights (``"weights"``) or nothing (``"none"``). Zero counts as one.

    Returns:
        A new tensor. A NaN or an infinity in any vector makes the same entry NaN or infinite.

    Note:
        The sums of the elected are had without a mask: with :math:`s = \sum x_t` and
        :math:`a = \sum |x_t|`, the positive ones sum to :math:`(s + a)/2` and the negative ones
        to :math:`(s - a)/2`. With weights of one sign that costs an error of a few units in the
        last place, as a plain sum does. Masks would take twice the time.
    """
    total = mass = balance = number = votes = part = None
    # With one weight for all, the weighted sum has the sign of the sum.
    sum_votes = sign == "total" and weigh == "values" and not 0 < min(weights) == max(weights)
    for vector, weight in zip(vectors, weights, strict=True):
        values, factor = (vector * weight, 1.0) if weigh == "votes" else (vector, weight)
        share = weight if divide == "weights" else 1.0
        total = _added(total, values, factor)
        # One tensor for all parts in turn, so that few have to stay in the cache.
        part = torch.empty_like(values) if part is None else part
        mass = _added(mass, torch.abs(values, out=part), factor)
        if sum_votes:
            votes = _added(votes, values, 1.0)
        if sign == "frequency" or divide != "none":
            torch.sgn(values, out=part)
        if sign == "frequency":
            votes = _added(votes, part, 1.0)
        if divide != "none":
            balance = _added(balance, part, share)
            number = _added(number, part.abs_(), share)
    assert total is not None
    assert mass is not None
    # Opposite votes sum to plus zero, and where all are minus zero there is nothing to merge.
    elected = torch.copysign(torch.ones_like(total), total if votes is None else votes)
    merged = total.addcmul_(mass, elected)
    if balance is None or number is None:
        return merged.mul_(0.5)
    divisor = number.addcmul_(balance, elected)
    if divide == "count":
        divisor.clamp_(min=2)  # five times as fast as masked_fill_, which weights need
    else:
        divisor.masked_fill_(divisor == 0, 2.0)
    return merged.div_(divisor)


def _added(total: Tensor | None, values: Tensor, factor: float) -> Tensor:
    return values * factor if total is None else total.add_(values, alpha=factor)
