r"""Uncertainty-based gradient matching: the product of the experts' Gaussians.

The prior is N(θ₀, 1/h₀), the posterior of expert t is N(θ_t, 1/(h₀ + h_t)), and the merge is the
mean of p·Π(q_t/p)^{α_t}, whose precision is :math:`\bar h = h_0 + \sum_t α_t h_t`. It is the point
at which, to first order, the gradients of the experts' losses cancel as at the joint optimum;
exactly so for quadratic losses. Being a Gaussian again, a merge can be merged again: it counts as
an expert whose Hessian is :math:`\bar h - h_0`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods.method import (
    LookAtAll,
    MergeMethod,
    ParameterSlice,
    add_task_vectors,
    weighted_sum,
)
from lit_merge.methods.settings import check_choice, check_number, check_scale, per_task


def merged_precision(
    hessians: Sequence[Tensor], base_hessian: Tensor | float, scales: Sequence[float]
) -> Tensor:
    r"""Return :math:`\bar h = h_0 + \sum_t α_t h_t`, of the Hessians' shape.

    Args:
        hessians: :math:`h_t ≥ 0`, at least one.
        base_hessian: :math:`h_0 ≥ 0`, a number or a tensor of the same shape.
        scales: :math:`α_t`.
    """
    return weighted_sum(hessians, scales).add_(base_hessian)


def without_precision(
    hessians: Sequence[Tensor], base_hessian: Tensor | float, scales: Sequence[float]
) -> Tensor:
    r"""Return where negative scales have used up all precision: a mask of the Hessians' shape.

    That is :math:`\bar h ≤ 2ε·(h_0 + \sum_t |α_t| h_t)` with ε the dtype's machine epsilon per
    expert, so that a difference which is nothing but rounding counts as none. Entries that
    nothing has seen at all (both sides zero) are not meant.
    """
    if min(scales) >= 0:
        return torch.zeros_like(hessians[0], dtype=torch.bool)
    magnitude = merged_precision(hessians, base_hessian, [abs(scale) for scale in scales])
    rounding = 2 * len(hessians) * torch.finfo(magnitude.dtype).eps
    precision = merged_precision(hessians, base_hessian, scales)
    return (precision <= rounding * magnitude) & (magnitude > 0)


def match_gradients(
    base: Tensor,
    experts: Sequence[Tensor],
    hessians: Sequence[Tensor],
    base_hessian: Tensor | float,
    scales: Sequence[float],
    *,
    precision: Tensor | None = None,
) -> Tensor:
    r"""Return the point whose gradient mismatch to the joint model vanishes, to first order.

    .. math:: θ = θ_0 + \sum_t α_t \frac{h_0 + h_t}{h_0 + \sum_s α_s h_s} (θ_t - θ_0)

    Args:
        base: :math:`θ_0`.
        experts: :math:`θ_t`, at least one, of the base's shape and dtype.
        hessians: :math:`h_t ≥ 0`, sums over the experts' examples, of that shape and dtype.
        base_hessian: :math:`h_0 ≥ 0`, a number or a tensor of that shape.
        scales: :math:`α_t`.
        precision: The denominator, from :func:`merged_precision`; None to compute it.

    Returns:
        The merged tensor. Where the denominator is zero because nothing has been seen, or where
        negative scales leave no precision, every factor after α is one: task arithmetic, the
        limit for :math:`h_0 ≫ h_t`. One expert at α = 1 is returned bit for bit.

    References:
        Daheim et al. (2024), arXiv:2310.12808, the merge rule for diagonal Hessians.

    Note:
        The authors' script divides without a guard and has one scale for all tasks.
    """
    if precision is None:
        precision = merged_precision(hessians, base_hessian, scales)
    if len(experts) == 1:
        share = (hessians[0] + base_hessian).div_(precision).mul_(scales[0])
        merged = torch.lerp(base, experts[0], share)
    else:
        merged = torch.zeros_like(base)
        weight, vector = torch.empty_like(base), torch.empty_like(base)  # for all of them
        for expert, hessian, scale in zip(experts, hessians, scales, strict=True):
            torch.add(hessian, base_hessian, out=weight)
            torch.sub(expert, base, out=vector)
            merged.addcmul_(vector, weight, value=scale)
        merged.div_(precision).add_(base)
    unsure = _fallback(hessians, base_hessian, scales, precision)
    if unsure is None:
        return merged
    return torch.where(unsure, add_task_vectors(base, experts, scales), merged)


def _fallback(
    hessians: Sequence[Tensor],
    base_hessian: Tensor | float,
    scales: Sequence[float],
    precision: Tensor,
) -> Tensor | None:
    """Return where task arithmetic has to stand in, a mask, or None where it is nowhere."""
    if min(scales) < 0:
        return without_precision(hessians, base_hessian, scales) | (precision == 0)
    if not precision.numel() or bool(precision.min() > 0):
        return None
    return precision == 0


@dataclass(frozen=True)
class GradientMatching(MergeMethod):
    r"""The point where the experts' gradients match, from diagonal Hessians.

    .. math:: θ = θ_0 + \sum_t α_t \frac{h_0 + h_t}{h_0 + \sum_s α_s h_s} (θ_t - θ_0),
        \qquad h_0 = c F_0 + δ

    With Hessians that are sums over the experts' examples, :math:`α = 1` means what the paper
    means and there is nothing to tune.

    Args:
        scale: :math:`α_t`: one number for all tasks, or one per task name. A negative one takes
            what the expert learned out of the base.
        damping: :math:`δ ≥ 0`, the prior's isotropic part, in units of the sum over examples.
            Large values turn the merge into task arithmetic. With 0, an entry that no expert has
            seen falls back to task arithmetic all the same.
        base_scale: :math:`c ≥ 0`, the weight of the base's own Hessian, where one is given.
        guard: What happens where negative scales leave no precision: ``"raise"`` refuses,
            naming the tensor; ``"clamp"`` merges these entries by task arithmetic and gives them
            the precision :math:`h_0`.

    Raises:
        InputError: A number is not finite or out of its range.

    References:
        Daheim et al. (2024), arXiv:2310.12808.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"base", "hessian"})
    carries_nan: ClassVar[bool] = True

    scale: float | Mapping[str, float] = 1.0
    damping: float = 1e-12
    base_scale: float = 1.0
    guard: Literal["raise", "clamp"] = "raise"

    def __post_init__(self) -> None:
        check_scale("GradientMatching.scale", self.scale)
        check_number("GradientMatching.damping", self.damping, low=0)
        check_number("GradientMatching.base_scale", self.base_scale, low=0)
        check_choice("GradientMatching.guard", self.guard, ("raise", "clamp"))

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there is a scale for every task."""
        self._scales(tasks)

    def survey(self, look_at_all: LookAtAll) -> Mapping[str, tuple[int, int]] | None:
        """Count the entries that negative scales leave without precision.

        With a negative scale this is a pass over the data, so that nothing is written when an entry
        at the end of the model cannot be merged.

        Returns:
            Such entries and all entries, by tensor; None without a negative scale.

        Raises:
            InputError: There are such entries and ``guard`` is ``"raise"``; names the first tensor
                and the counts.
        """
        scales = self.scale.values() if isinstance(self.scale, Mapping) else (self.scale,)
        if min(scales) >= 0:
            return None
        counts: dict[str, tuple[int, int]] = {}
        for name, (count, size) in look_at_all(self._count_lost):
            before = counts.get(name, (0, 0))
            counts[name] = (before[0] + count, before[1] + size)
        lost = [name for name, (count, _) in counts.items() if count]
        if lost and self.guard == "raise":
            raise _no_precision(lost[0], *counts[lost[0]], others=len(lost) - 1)
        return counts

    def notes(self, fact: Any) -> tuple[str, ...]:
        """Say where negative scales have left no precision, and task arithmetic stood in."""
        lost = {name: count for name, (count, _) in (fact or {}).items() if count}
        if not lost:
            return ()
        worst = max(lost, key=lambda name: lost[name] / fact[name][1])
        share = sum(lost.values()) / sum(size for _, size in fact.values())
        return (
            f"negative scales leave no precision in {sum(lost.values()):,} entries "
            f"({100 * share:.3g} %) of {len(lost)} tensors, which were merged by task arithmetic; "
            f"most of all in {worst!r}, {lost[worst]} of {fact[worst][1]}",
        )

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice.

        Raises:
            InputError: Entries are left without precision and ``guard`` is ``"raise"``.
        """
        base = p.require_base()
        self._refuse(p)
        return match_gradients(
            base, p.experts, p.require_hessians(), self._base_hessian(p), self._scales(p.tasks)
        )

    def merge_with_hessian(self, p: ParameterSlice) -> tuple[Tensor, Tensor]:
        """Merge one slice, and return its :meth:`hessian` too, for one more addition.

        Raises:
            InputError: As calling the method.
        """
        self._refuse(p)
        scales, hessians, base_hessian = (
            self._scales(p.tasks),
            p.require_hessians(),
            self._base_hessian(p),
        )
        total = weighted_sum(hessians, scales)
        merged = match_gradients(
            p.require_base(),
            p.experts,
            hessians,
            base_hessian,
            scales,
            precision=total + base_hessian,
        )
        return merged, total if min(scales) >= 0 else total.clamp_(min=0)

    def precision(self, p: ParameterSlice) -> Tensor:
        r"""Return the precision of the merged slice, :math:`h_0 + \sum_t α_t h_t`.

        Less :math:`h_0` it is the Hessian of the merge as an expert of the same base.

        Raises:
            InputError: Entries are left without precision and ``guard`` is ``"raise"``.
        """
        self._refuse(p)
        base_hessian = self._base_hessian(p)
        precision = merged_precision(p.require_hessians(), base_hessian, self._scales(p.tasks))
        return torch.where(self._without_precision(p), base_hessian, precision)

    def hessian(self, p: ParameterSlice) -> Tensor:
        r"""Return :math:`\sum_t α_t h_t`, not below zero: what makes the merge an expert again.

        With it, merges compose: merging this result with a further expert of the same base gives
        what merging all of them at once does.
        """
        return weighted_sum(p.require_hessians(), self._scales(p.tasks)).clamp_(min=0)

    def _count_lost(self, p: ParameterSlice) -> tuple[int, int]:
        lost = self._without_precision(p)
        return int(lost.sum()), lost.numel()

    def _scales(self, tasks: Sequence[str]) -> tuple[float, ...]:
        return per_task("GradientMatching.scale", self.scale, tasks)

    def _base_hessian(self, p: ParameterSlice) -> Tensor | float:
        if p.base_hessian is None:
            return self.damping
        return p.base_hessian * self.base_scale + self.damping

    def _without_precision(self, p: ParameterSlice) -> Tensor:
        return without_precision(p.require_hessians(), self._base_hessian(p), self._scales(p.tasks))

    def _refuse(self, p: ParameterSlice) -> None:
        if self.guard == "raise" and min(self._scales(p.tasks)) < 0:
            lost = self._without_precision(p)
            if lost.any():
                raise _no_precision(p.name, int(lost.sum()), lost.numel())


def _no_precision(name: str, count: int, total: int, *, others: int = 0) -> InputError:
    more = f", and entries of {others} more tensor{'s'[: others - 1]}" if others else ""
    return InputError(
        f"GradientMatching.scale: the merged precision h0 + Σ α_t h_t must be positive; got none "
        f"left in {count} of {total} entries of '{name}'{more}. Take negative scales nearer to 0, "
        f"raise damping, give a base_hessian, or set guard='clamp' to merge these entries by task "
        f"arithmetic."
    )
