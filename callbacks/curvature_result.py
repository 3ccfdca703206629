"""What an estimator has found out, however it did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lit_merge.curvature.quality import Quality


@dataclass(frozen=True)
class Curvature:
    """The diagonal curvature of an expert.

    Attributes:
        hessian: Σ over the N training examples, by parameter name; scaled to them from those seen.
        num_examples: N.
        num_seen: Examples that went into it, over all ranks and epochs.
        notes: More for ``expert.json``.
        quality: How well two halves of the examples agree; None where there are none.
    """

    hessian: dict[str, Tensor]
    num_examples: int
    num_seen: int
    notes: dict[str, Any] = field(default_factory=dict)
    quality: Quality | None = None

    def details(self) -> dict[str, Any]:
        """Return what ``expert.json`` says about it, as JSON primitives."""
        quality = {} if self.quality is None else {"quality": self.quality.as_dict()}
        return {"num_seen": self.num_seen, **self.notes, **quality}
