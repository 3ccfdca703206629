"""What an estimator has found out, however it did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Curvature:
    """The diagonal curvature of an expert.

    Attributes:
        hessian: Σ over the N training examples, by parameter name; scaled to them from those seen.
        num_examples: N.
        num_seen: Examples that went into it, over all ranks and epochs.
        notes: More for ``expert.json``.
    """

    hessian: dict[str, Tensor]
    num_examples: int
    num_seen: int
    notes: dict[str, Any] = field(default_factory=dict)
