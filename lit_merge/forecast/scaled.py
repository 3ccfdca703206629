"""A method at other scales than its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_merge.methods import MergeMethod


@dataclass(frozen=True)
class ScaledMethod:
    """A method, and what its scale is.

    Attributes:
        method: The method as it was configured.
        scale: The planned scale; None where there is none.
        unit: The method's scales at ``scale`` 1, where it has one per task; None otherwise.
        has_scale: Whether there is a scale.
    """

    method: MergeMethod
    scale: float | None
    unit: Mapping[str, float] | None
    has_scale: bool

    @classmethod
    def of(cls, method: MergeMethod) -> ScaledMethod:
        """Return what a method's setting ``scale`` says."""
        value = getattr(method, "scale", None)
        if isinstance(value, Mapping):
            return cls(method, 1.0, dict(value), has_scale=True)
        if value is None:
            return cls(method, None, None, has_scale=False)
        return cls(method, float(value), None, has_scale=True)

    @property
    def linear(self) -> bool:
        """Whether every task's model is the base plus the scale times what has no scale in it."""
        return self.has_scale and self.method.linear_in_scale and not self.method.masks

    def at(self, scale: float) -> MergeMethod:
        """Return the method at a scale."""
        value = scale if self.unit is None else {t: scale * unit for t, unit in self.unit.items()}
        made: Any = self.method
        changed: MergeMethod = dataclasses.replace(made, scale=value)
        return changed
