"""Breadcrumbs: drop the smallest and the largest entries of the task vectors, add up the rest."""

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
class Breadcrumbs(MergeMethod):
    r"""The base plus the scaled sum of the task vectors without their largest and smallest entries.

    .. math:: θ = θ_0 + \sum_t α_t \, [\,c_t ≤ |τ_t| < C_t\,] ⊙ τ_t

    Args:
        density: The share of each task vector's entries that stays: 0 to 1.
        outliers: :math:`γ`, the share of the largest entries that goes: 0 to 1, with the density
            1 at most.
        scale: :math:`α_t`: one number for all tasks, or one per task name.
        scope: Whether the shares are of every tensor on its own (``"tensor"``) or of the whole
            task vector over all merged tensors (``"global"``).

    Raises:
        InputError: A number is out of its range or a word unknown.

    References:
        Davari and Belilovsky (2024), arXiv:2312.06795.

    Note:
        The ⌊γ·n⌋ largest entries go; of the rest the ⌊density·n⌋ largest stay. Entries that equal
        the largest dropped one go as well, and those that equal the smallest kept one stay. The
        authors take the shares of each row of a matrix.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    carries_nan: ClassVar[bool] = True
    linear_in_scale: ClassVar[bool] = True

    density: float = 0.9
    outliers: float = 0.01
    scale: float | Mapping[str, float] = 1.0
    scope: Scope = "tensor"

    def __post_init__(self) -> None:
        check_number("Breadcrumbs.density", self.density, low=0, high=1)
        check_number("Breadcrumbs.outliers", self.outliers, low=0, high=1)
        check_number("Breadcrumbs.density + outliers", self.density + self.outliers, high=1 + 1e-9)
        check_scale("Breadcrumbs.scale", self.scale)
        check_choice("Breadcrumbs.scope", self.scope, ("tensor", "global"))

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there is a scale for every task."""
        per_task("Breadcrumbs.scale", self.scale, tasks)

    def survey(self, look_at_all: LookAtAll) -> Thresholds:
        """Find the smallest kept and the smallest dropped outlier: a sample, and a pass or two."""

        def ranks(size: int) -> tuple[int, int]:
            top = int(self.outliers * size)
            stays = int(self.density * size)
            return (min(top + stays, size) if stays else 0), top

        return kth_magnitudes(look_at_all, ranks, self.scope)

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice."""
        base = p.require_base()
        scales = per_task("Breadcrumbs.scale", self.scale, p.tasks)
        fact: Thresholds = self.survey(looking_at([p])) if p.fact is None else p.fact
        shares = []
        for expert, (least, outlier), scale in zip(
            p.experts, fact[group_of(p.name, self.scope)], scales, strict=True
        ):
            vector = expert - base
            share = trimmed(vector, least).sgn_().abs_()
            share -= trimmed(vector, outlier).sgn_().abs_()
            shares.append(share.clamp_(min=0).mul_(scale))
        return add_task_vectors(base, p.experts, shares)
