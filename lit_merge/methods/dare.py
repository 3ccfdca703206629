"""DARE: drop entries of the task vectors at random, and scale up those that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_merge.counter import kept, key_of
from lit_merge.methods.election import Divide, Sign, Weigh, elected_task_vector
from lit_merge.methods.method import (
    LookAtAll,
    MergeMethod,
    ParameterSlice,
    add_task_vectors,
    looking_at,
)
from lit_merge.methods.settings import check_choice, check_number, check_scale, per_task


@dataclass(frozen=True)
class DARE(MergeMethod):
    r"""The base plus task vectors of which a random part is dropped and the rest scaled up.

    .. math:: θ = θ_0 + \sum_t α_t \frac{m_t ⊙ τ_t}{ρ}, \quad m_t ∼ \mathrm{Bernoulli}(ρ)

    Args:
        density: :math:`ρ`, the probability with which an entry is kept: above 0, to 1.
        scale: :math:`α_t`: one number for all tasks, or one per task name.
        seed: Of the random numbers, which belong to seed, task, tensor and position: they do not
            depend on chunks, threads or ranks, nor on the other tasks.
        rescale: What makes up for the dropped entries: a division by :math:`ρ` (``"density"``, as
            in the paper), the factor that keeps :math:`\sum |τ_t|` of the tensor (``"norm"``), or
            nothing (``"none"``).
        combine: Whether what stays of the task vectors is summed (``"linear"``), or merged as TIES
            does, by the entries of the elected sign (``"ties"``).
        sign: How ``"ties"`` elects; see :class:`lit_merge.methods.TIES`.
        weigh: Whether the scales come after that election or before it; see there.
        divide: What the sum of the elected is divided by; see there.

    Raises:
        InputError: A number is out of its range or a word unknown.

    References:
        Yu et al. (2024), arXiv:2311.03099.

    Note:
        With ``rescale="norm"`` the factors are found by a survey, in one pass. A tensor that is
        dropped whole stays dropped.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    carries_nan: ClassVar[bool] = True

    density: float = 0.1
    scale: float | Mapping[str, float] = 1.0
    seed: int = 0
    rescale: Literal["density", "norm", "none"] = "density"
    combine: Literal["linear", "ties"] = "linear"
    sign: Sign = "total"
    weigh: Weigh = "values"
    divide: Divide = "count"

    def __post_init__(self) -> None:
        check_number("DARE.density", self.density, low=2.0**-32, high=1)
        check_scale("DARE.scale", self.scale)
        check_choice("DARE.rescale", self.rescale, ("density", "norm", "none"))
        check_choice("DARE.combine", self.combine, ("linear", "ties"))
        check_choice("DARE.sign", self.sign, ("total", "frequency"))
        check_choice("DARE.weigh", self.weigh, ("values", "votes"))
        check_choice("DARE.divide", self.divide, ("count", "weights", "none"))

    @property
    def linear_in_scale(self) -> bool:
        """Whether the scale does not cancel in a division by the scales' sum."""
        return self.combine == "linear" or self.divide != "weights"

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there is a scale for every task."""
        per_task("DARE.scale", self.scale, tasks)

    def survey(self, look_at_all: LookAtAll) -> dict[str, tuple[float, ...]] | None:
        """Find the factors that keep the norms, per task by tensor."""
        if self.rescale != "norm":
            return None
        norms: dict[str, list[tuple[float, float]]] = {}
        for name, found in look_at_all(self._norms):
            so_far = norms.get(name, [(0.0, 0.0)] * len(found))
            norms[name] = [
                (a + all_, b + left) for (a, b), (all_, left) in zip(so_far, found, strict=True)
            ]
        return {
            name: tuple(all_ / left if left > 0 else 1.0 for all_, left in found)
            for name, found in norms.items()
        }

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice."""
        base = p.require_base()
        scales = per_task("DARE.scale", self.scale, p.tasks)
        masks = zip(self._masks(p), self._factors(p), strict=True)
        if self.combine == "linear":
            shares = [
                mask * (factor * scale) for (mask, factor), scale in zip(masks, scales, strict=True)
            ]
            return add_task_vectors(base, p.experts, shares)
        vectors = (
            (expert - base).mul_(mask).mul_(factor)
            for expert, (mask, factor) in zip(p.experts, masks, strict=True)
        )
        return base + elected_task_vector(
            vectors, scales, sign=self.sign, weigh=self.weigh, divide=self.divide
        )

    def _factors(self, p: ParameterSlice) -> Sequence[float]:
        if self.rescale == "norm":
            fact: Any = self.survey(looking_at([p])) if p.fact is None else p.fact
            factors: tuple[float, ...] = fact[p.name]
            return factors
        return (1 / self.density if self.rescale == "density" else 1.0,) * len(p.tasks)

    def _masks(self, p: ParameterSlice) -> list[Tensor]:
        """Return ones and zeros per task, in the slice's shape and dtype."""
        like = p.experts[0]
        return [
            kept(key_of(self.seed, task, p.name), p.start, like.numel(), self.density, like.device)
            .to(like.dtype)
            .view(like.shape)
            for task in p.tasks
        ]

    def _norms(self, p: ParameterSlice) -> list[tuple[float, float]]:
        """Return :math:`|τ_t|` summed over all entries, and over those that stay."""
        base = p.require_base()
        found = []
        for expert, mask in zip(p.experts, self._masks(p), strict=True):
            size = (expert - base).abs_()
            found.append(
                (
                    float(size.sum(dtype=torch.float64)),
                    float(size.mul_(mask).sum(dtype=torch.float64)),
                )
            )
        return found
