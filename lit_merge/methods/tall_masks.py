"""TALL masks: which entries of the summed task vector each task needs, and which several do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods.method import MergeMethod, ParameterSlice, add_task_vectors
from lit_merge.methods.settings import check_number, check_numbers, per_task


def tall_masks(
    vectors: Sequence[Tensor], merged: Tensor, thresholds: Sequence[float]
) -> tuple[Tensor, ...]:
    r"""Return where a task's own entry is large beside what the merge makes different from it.

    .. math:: m_t = [\,|τ_t| > λ_t |τ - τ_t|\,]

    Args:
        vectors: :math:`τ_t`, of one shape and dtype.
        merged: :math:`τ`, of that shape.
        thresholds: :math:`λ_t`, one per vector. Larger ones select fewer entries.

    Returns:
        Booleans, one tensor per vector.
    """
    return tuple(
        vector.abs() > (merged - vector).abs_().mul_(threshold)
        for vector, threshold in zip(vectors, thresholds, strict=True)
    )


@dataclass(frozen=True)
class TALLMasks(MergeMethod):
    r"""One shared task vector for all tasks, with a mask for each.

    .. math:: θ = θ_0 + τ, \quad τ = α \sum_t τ_t, \quad θ^{(t)} = θ_0 + m_t ⊙ τ

    with :math:`m_t` of :func:`tall_masks`.

    Args:
        threshold: :math:`λ_t ≥ 0`: one number for all tasks, or one per task name. The authors
            choose it from 0.2 to 0.6 per task on validation data.
        scale: :math:`α`.

    Raises:
        InputError: A number is out of its range.

    References:
        Wang et al. (2024), arXiv:2405.07813.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    carries_nan: ClassVar[bool] = True
    masks: ClassVar[bool] = True

    threshold: float | Mapping[str, float] = 0.4
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_thresholds("TALLMasks.threshold", self.threshold)
        check_number("TALLMasks.scale", self.scale)

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there is a threshold for every task."""
        per_task("TALLMasks.threshold", self.threshold, tasks)

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Return the base plus the shared task vector."""
        return add_task_vectors(p.require_base(), p.experts, [self.scale] * len(p.experts))

    def task_masks(self, p: ParameterSlice) -> tuple[Tensor, ...]:
        """Return the entries that each task uses."""
        base = p.require_base()
        vectors = [expert - base for expert in p.experts]
        thresholds = per_task("TALLMasks.threshold", self.threshold, p.tasks)
        return tall_masks(vectors, _total(vectors).mul_(self.scale), thresholds)


@dataclass(frozen=True)
class Consensus(MergeMethod):
    r"""The base plus those entries of the summed task vector that several tasks use.

    .. math:: θ = θ_0 + α \Big[\sum_t m_t ≥ k\Big] ⊙ \sum_t τ_t

    with :math:`m_t` of :func:`tall_masks`, where :math:`τ` is the plain sum.

    Args:
        k: How many tasks must use an entry for it to stay: 1 to the number of tasks.
        threshold: :math:`λ_t ≥ 0`; see :class:`TALLMasks`.
        scale: :math:`α`.

    Raises:
        InputError: A number is out of its range.

    References:
        Wang et al. (2024), arXiv:2405.07813.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    carries_nan: ClassVar[bool] = True
    linear_in_scale: ClassVar[bool] = True

    k: int = 2
    threshold: float | Mapping[str, float] = 0.4
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise InputError(
                f"Consensus.k: must be a whole number of at least 1; got {self.k!r}. Correct it."
            )
        _check_thresholds("Consensus.threshold", self.threshold)
        check_number("Consensus.scale", self.scale)

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there are k tasks, and a threshold for every one."""
        if self.k > len(tasks):
            raise InputError(
                f"Consensus.k: must be at most the number of experts, {len(tasks)}; got {self.k}. "
                f"Take a smaller k, or more experts."
            )
        per_task("Consensus.threshold", self.threshold, tasks)

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice."""
        base = p.require_base()
        vectors = [expert - base for expert in p.experts]
        thresholds = per_task("Consensus.threshold", self.threshold, p.tasks)
        total = _total(vectors)
        users = torch.zeros_like(total)
        for mask in tall_masks(vectors, total, thresholds):
            users += mask
        share = (users >= self.k).to(base.dtype).mul_(self.scale)
        return add_task_vectors(base, p.experts, [share] * len(p.experts))


def _total(vectors: Sequence[Tensor]) -> Tensor:
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total += vector
    return total


def _check_thresholds(setting: str, threshold: float | Mapping[str, float]) -> None:
    if isinstance(threshold, Mapping):
        check_numbers(setting, threshold, low=0)
    else:
        check_number(setting, threshold, low=0)
