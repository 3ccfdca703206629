"""Gradient matching with Kronecker factors: curvature that knows how entries act together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lit_merge.methods.gradient_matching import GradientMatching
from lit_merge.methods.method import MergeMethod, ParameterSlice, add_task_vectors
from lit_merge.methods.settings import check_count, check_number, check_scale, per_task
from lit_merge.methods.weight_curvature import KroneckerCurvature
from lit_merge.methods.whole_weight import as_matrix, kronecker_factors, merge_weight


@dataclass(frozen=True)
class KroneckerMatching(MergeMethod):
    r"""The point where the experts' gradients match, from a Kronecker product per weight.

    .. math:: θ = θ_0 + \Big(H_0 + \sum_s α_s H_s\Big)^{-1} \sum_t α_t (H_0 + H_t) τ_t, \qquad
        H_t = B_t ⊗ A_t, \quad H_0 = c F_0 + δ

    with A the factor of a layer's inputs and B that of its output gradients. Tensors without
    factors, such as biases, are merged as :class:`GradientMatching` does, by the diagonal.

    Args:
        scale: :math:`α_t`: one number for all tasks, or one per task name. A negative one takes
            what the expert learned out of the base, as long as curvature is left in all directions.
        damping: The absolute part of :math:`δ ≥ 0`, in units of the sum over examples.
        ridge: Its relative part, in units of the mean diagonal entry of
            :math:`\sum_t |α_t| H_t`. What the curvature says less about is merged by task
            arithmetic.
        factor_damping: How much of the identity is added to each factor first, in units of its own
            mean diagonal entry: what makes up for its rounding in float32.
        base_scale: :math:`c ≥ 0`, the weight of the base's own diagonal Hessian, where one is
            given.
        iterations: The most steps of conjugate gradients.
        tolerance: The residual at which they stop, as a share of the first. At 1e-3 the excess
            loss that the curvature tells is within some 1e-4 of its least; less costs more steps.

    Raises:
        InputError: A number is not finite or out of its range, no curvature is left in a
            direction, or the tolerance is not reached.

    References:
        Daheim et al. (2024), arXiv:2310.12808, there with diagonal Hessians; Martens & Grosse
        (2015), arXiv:1503.05671, for the factors.
    """

    elementwise: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"base", "hessian", "kronecker"})

    scale: float | Mapping[str, float] = 1.0
    damping: float = 1e-12
    ridge: float = 1e-4
    factor_damping: float = 1e-5
    base_scale: float = 1.0
    iterations: int = 200
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        check_scale("KroneckerMatching.scale", self.scale)
        for name in ("damping", "ridge", "factor_damping", "base_scale", "tolerance"):
            check_number(f"KroneckerMatching.{name}", getattr(self, name), low=0)
        check_count("KroneckerMatching.iterations", self.iterations)

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there is a scale for every task."""
        self._scales(tasks)

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one tensor.

        Raises:
            InputError: A factor does not fit it, or the system cannot be solved.
        """
        base = p.require_base()
        factors = kronecker_factors(p, off_diagonal=1.0, damping=self.factor_damping)
        if factors is None:
            return self._diagonal()(p)
        scales = self._scales(p.tasks)
        prior: float | Tensor = self.damping
        if p.base_hessian is not None:
            prior = as_matrix(p.base_hessian) * self.base_scale + self.damping
        curvature = KroneckerCurvature(
            *factors, scales, self.ridge, self.iterations, self.tolerance, prior
        )
        start = add_task_vectors(base.double(), [e.double() for e in p.experts], scales)
        return merge_weight(p, start, curvature, "KroneckerMatching")

    def hessian(self, p: ParameterSlice) -> Tensor:
        r"""Return the diagonal :math:`\sum_t α_t h_t`, not below zero.

        A sum of Kronecker products is no Kronecker product, so that merging the result again is
        by the diagonal.
        """
        return self._diagonal().hessian(p)

    def _diagonal(self) -> GradientMatching:
        return GradientMatching(self.scale, self.damping, self.base_scale)

    def _scales(self, tasks: Sequence[str]) -> tuple[float, ...]:
        return per_task("KroneckerMatching.scale", self.scale, tasks)
