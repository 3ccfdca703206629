"""Pruning by magnitude: keep the largest entries of each task vector, and add them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lit_merge.methods.method import (
    LookAtAll,
    MergeMethod,
    ParameterSlice,
    add_task_vectors,
    looking_at,
)
from lit_merge.methods.order_statistics import (
    Scope,
    Thresholds,
    group_of,
    kth_magnitudes,
    trimmed,
)
from lit_merge.methods.settings import check_choice, check_number, check_scale, per_task


@dataclass(frozen=True)
class MagnitudePrune(MergeMethod):
    r"""The base plus the scaled sum of the largest entries of every task vector.

    .. math:: θ = θ_0 + \sum_t α_t \, [\,|τ_t| ≥ c_t\,] ⊙ τ_t

    Args:
        density: The share of each task vector's entries to keep, the largest in magnitude: 0 to 1.
        scale: :math:`α_t`: one number for all tasks, or one per task name.
        scope: Whether that share is of the whole task vector over all merged tensors
            (``"global"``) or of every tensor on its own (``"tensor"``).

    Raises:
        InputError: A number is out of its range or a word unknown.

    Note:
        ⌊density·n⌋ entries are kept, and those that equal the smallest kept one.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    carries_nan: ClassVar[bool] = True
    linear_in_scale: ClassVar[bool] = True

    density: float = 0.2
    scale: float | Mapping[str, float] = 1.0
    scope: Scope = "global"

    def __post_init__(self) -> None:
        check_number("MagnitudePrune.density", self.density, low=0, high=1)
        check_scale("MagnitudePrune.scale", self.scale)
        check_choice("MagnitudePrune.scope", self.scope, ("global", "tensor"))

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there is a scale for every task."""
        per_task("MagnitudePrune.scale", self.scale, tasks)

    def survey(self, look_at_all: LookAtAll) -> Thresholds:
        """Find every expert's threshold: a sample, and a pass or two."""
        return kth_magnitudes(look_at_all, lambda size: (int(self.density * size),), self.scope)

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice."""
        base = p.require_base()
        scales = per_task("MagnitudePrune.scale", self.scale, p.tasks)
        fact: Thresholds = self.survey(looking_at([p])) if p.fact is None else p.fact
        shares = [
            trimmed(expert - base, threshold).sgn_().abs_().mul_(scale)
            for expert, (threshold,), scale in zip(
                p.experts, fact[group_of(p.name, self.scope)], scales, strict=True
            )
        ]
        return add_task_vectors(base, p.experts, shares)
