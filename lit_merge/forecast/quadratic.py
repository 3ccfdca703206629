r"""The second-order loss of an expert around its own weights, and its minimum along a line.

At the end of a fine-tuning the gradient of the expert's loss is near zero, and what moving the
weights costs is, to second order,

.. math:: ℓ_t(θ) - ℓ_t(θ_t) ≈ ½ (θ - θ_t)^T H_t (θ - θ_t)

with :math:`H_t` the diagonal of the Hessian, summed over the expert's :math:`N_t` training
examples: a sum of losses, which divided by :math:`N_t` is the increase of the mean loss. For a
quadratic loss with a diagonal Hessian it is exact.

References:
    Daheim et al. (2024), arXiv:2310.12808, for the expansion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lit_merge.errors import InputError


@dataclass(frozen=True)
class LineTerms:
    r"""The increase of one expert's loss on the line :math:`θ_0 + α u`, as a parabola in α.

    .. math:: ½ (α u - τ)^T H (α u - τ) = ½ (α^2\, u^T H u - 2 α\, u^T H τ + τ^T H τ)

    Attributes:
        constant: :math:`τ^T H τ`, with τ the expert's task vector.
        linear: :math:`u^T H τ`.
        square: :math:`u^T H u`.

    Example:
        >>> LineTerms(constant=4.0, linear=2.0, square=1.0).at(2.0)
        0.0
    """

    constant: float = 0.0
    linear: float = 0.0
    square: float = 0.0

    def at(self, scale: float) -> float:
        """Return the increase at a scale; not below zero, which only rounding could make it."""
        doubled = scale * scale * self.square - 2 * scale * self.linear + self.constant
        return max(0.5 * doubled, 0.0)

    def __add__(self, other: LineTerms) -> LineTerms:
        """Return the terms of both pieces of a model together."""
        return LineTerms(
            self.constant + other.constant,
            self.linear + other.linear,
            self.square + other.square,
        )


def loss_increase(weights: Tensor, expert: Tensor, hessian: Tensor) -> float:
    r"""Return :math:`½ \sum_i h_i (θ_i - θ_{t,i})^2`, summed in float64.

    Args:
        weights: :math:`θ`.
        expert: :math:`θ_t`, of that shape.
        hessian: :math:`h ≥ 0`, of that shape.
    """
    moved = weights.double() - expert.double()
    return 0.5 * _dot(hessian.double() * moved, moved)


def line_terms(direction: Tensor, task_vector: Tensor, hessian: Tensor) -> LineTerms:
    """Return the parabola of one expert along a direction, its inner products in float64.

    Args:
        direction: u, what a scale of one adds to the base.
        task_vector: τ, of that shape.
        hessian: h ≥ 0, of that shape.
    """
    u, tau, h = direction.double(), task_vector.double(), hessian.double()
    weighted = h * tau
    return LineTerms(constant=_dot(weighted, tau), linear=_dot(weighted, u), square=_dot(h * u, u))


def line_minimum(terms: Sequence[LineTerms], weights: Sequence[float]) -> float:
    r"""Return the scale at which the weighted total of the experts' losses is least.

    .. math:: α^* = \frac{\sum_t w_t\, u^T H_t τ_t}{\sum_t w_t\, u^T H_t u}

    Args:
        terms: The experts' parabolas along the same direction u.
        weights: :math:`w_t > 0`, one per expert.

    Raises:
        InputError: No Hessian says anything about the direction: the denominator is zero.

    Example:
        >>> line_minimum([LineTerms(4.0, 2.0, 1.0), LineTerms(0.0, 0.0, 1.0)], [1.0, 1.0])
        1.0
    """
    pull = sum(w * term.linear for w, term in zip(weights, terms, strict=True))
    stiffness = sum(w * term.square for w, term in zip(weights, terms, strict=True))
    if stiffness <= 0:
        raise InputError(
            "hessians: must be positive somewhere that the merge moves the base, for a best scale; "
            "got zero everywhere. Compute the curvature of the parameters that are merged, or "
            "choose a scale."
        )
    return pull / stiffness


def _dot(a: Tensor, b: Tensor) -> float:
    return float(a.flatten() @ b.flatten())
