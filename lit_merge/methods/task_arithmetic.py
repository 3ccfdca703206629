"""Task arithmetic: add what every expert learned to the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lit_merge.methods.method import (
    MergeMethod,
    ParameterSlice,
    add_coarse_task_vectors,
    add_task_vectors,
)
from lit_merge.methods.settings import check_scale, per_task


@dataclass(frozen=True)
class TaskArithmetic(MergeMethod):
    r"""The base plus the scaled sum of the task vectors.

    .. math:: θ = θ_0 + \sum_t α_t (θ_t - θ_0)

    Args:
        scale: :math:`α_t`: one number for all tasks, or one per task name. Negative numbers take
            a task out; with T experts, 1/T is their average.

    Raises:
        InputError: A scale is not finite.

    References:
        Ilharco et al. (2023), arXiv:2212.04089.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    carries_nan: ClassVar[bool] = True
    linear_in_scale: ClassVar[bool] = True

    scale: float | Mapping[str, float] = 1.0

    def __post_init__(self) -> None:
        check_scale("TaskArithmetic.scale", self.scale)

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there is a scale for every task."""
        per_task("TaskArithmetic.scale", self.scale, tasks)

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice."""
        scales = per_task("TaskArithmetic.scale", self.scale, p.tasks)
        add = add_coarse_task_vectors if p.coarse and len(scales) > 1 else add_task_vectors
        return add(p.require_base(), p.experts, scales)
