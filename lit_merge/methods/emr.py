"""EMR: one elected task vector for all tasks, with a mask and a scale for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_merge.methods.method import LookAtAll, MergeMethod, ParameterSlice
from lit_merge.methods.settings import check_choice


def unified_task_vector(vectors: Sequence[Tensor]) -> Tensor:
    r"""Return, entry by entry, the largest magnitude among the vectors of the elected sign.

    The elected sign is that of the vectors' sum, minus where it is zero.

    Args:
        vectors: :math:`τ_t`, at least one, of one shape and dtype.

    Returns:
        A new tensor. A NaN or an infinity in any vector makes the same entry NaN or infinite.
    """
    total = vectors[0].clone()
    most, least = vectors[0].clamp(min=0), vectors[0].clamp(max=0)
    for vector in vectors[1:]:
        total += vector
        torch.maximum(most, vector, out=most)
        torch.minimum(least, vector, out=least)
    return torch.where(total > 0, most, least)


@dataclass(frozen=True)
class EMR(MergeMethod):
    r"""Elect a unified task vector, mask it and rescale it for every task.

    .. math:: θ = θ_0 + τ, \quad θ^{(t)} = θ_0 + λ_t m_t ⊙ τ, \quad
        m_t = [\,τ_t ⊙ τ > 0\,], \quad λ_t = \frac{\sum |τ_t|}{\sum |m_t ⊙ τ|}

    with :math:`τ` of :func:`unified_task_vector`.

    Args:
        rescale: Whether the sums of :math:`λ_t` are of every tensor's mean, so that all tensors
            count alike (``"tensors"``, as in the authors' code), or of all entries
            (``"entries"``, as in the paper's formula); ``"none"`` for :math:`λ_t = 1`.

    Raises:
        InputError: The word is unknown.

    References:
        Huang et al. (2024), arXiv:2405.17461.

    Note:
        The shared result without masks is no model of its own that the paper would use.
        :math:`λ_t` is one where the mask leaves nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    carries_nan: ClassVar[bool] = True
    masks: ClassVar[bool] = True

    rescale: Literal["tensors", "entries", "none"] = "tensors"

    def __post_init__(self) -> None:
        check_choice("EMR.rescale", self.rescale, ("tensors", "entries", "none"))

    def survey(self, look_at_all: LookAtAll) -> tuple[float, ...] | None:
        """Find every task's :math:`λ_t`, in one pass."""
        if self.rescale == "none":
            return None
        tensors: dict[str, _Sums] = {}
        for name, found in look_at_all(_sums):
            tensors[name] = _added(tensors[name], found) if name in tensors else found
        counts_alike = self.rescale == "tensors"
        tasks = len(next(iter(tensors.values()))[1]) if tensors else 0
        scales = []
        for t in range(tasks):
            own = masked = 0.0
            for size, of_tasks in tensors.values():
                share = 1 / max(size, 1) if counts_alike else 1.0
                own += of_tasks[t][0] * share
                masked += of_tasks[t][1] * share
            scales.append(own / masked if masked > 0 else 1.0)
        return tuple(scales)

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Return the base plus the unified task vector."""
        base = p.require_base()
        if len(p.experts) == 1:  # bit for bit, which θ₀ + (θ₁ − θ₀) is not
            return torch.where(base.isfinite(), p.experts[0], base)
        return base + unified_task_vector([expert - base for expert in p.experts])

    def task_masks(self, p: ParameterSlice) -> tuple[Tensor, ...]:
        """Return where each task's entry has the elected sign."""
        base = p.require_base()
        vectors = [expert - base for expert in p.experts]
        return _masks(vectors, unified_task_vector(vectors))

    def task_scales(self, fact: Any, tasks: Sequence[str]) -> tuple[float, ...]:
        """Return :math:`λ_t`."""
        return (1.0,) * len(tasks) if fact is None else tuple(fact)


_Sums = tuple[int, list[tuple[float, float]]]  # entries; per task Σ|τ_t| and Σ|m_t ⊙ τ|


def _masks(vectors: Sequence[Tensor], unified: Tensor) -> tuple[Tensor, ...]:
    # Signs, as products of small numbers may be zero.
    sign = unified.sgn()
    return tuple((vector.sgn() == sign) & (sign != 0) for vector in vectors)


def _sums(p: ParameterSlice) -> _Sums:
    base = p.require_base()
    vectors = [expert - base for expert in p.experts]
    unified = unified_task_vector(vectors)
    size = unified.abs()
    return base.numel(), [
        (
            float(vector.abs().sum(dtype=torch.float64)),
            float((size * mask).sum(dtype=torch.float64)),
        )
        for vector, mask in zip(vectors, _masks(vectors, unified), strict=True)
    ]


def _added(first: _Sums, second: _Sums) -> _Sums:
    return first[0] + second[0], [
        (a + c, b + d) for (a, b), (c, d) in zip(first[1], second[1], strict=True)
    ]
