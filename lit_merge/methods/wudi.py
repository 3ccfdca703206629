r"""WUDI: the task vector that disturbs each layer least on the inputs its experts were tuned on.

The rows of a linear layer's task vector lie in the span of the inputs it was tuned on, so the task
vectors stand for those inputs:

.. math:: L(M) = \sum_t \frac{‖(M - τ_t) τ_t^T‖^2}{‖τ_t‖^2}

is how far a merged task vector M is from doing to every task's inputs what its own one does. It is
quadratic: with :math:`A = \sum_t τ_t^T τ_t / ‖τ_t‖^2` and
:math:`B = \sum_t τ_t τ_t^T τ_t / ‖τ_t‖^2` the gradient is :math:`2 (M A - B)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods.matrix_method import MatrixMethod, sum_of_task_vectors, task_vector
from lit_merge.methods.settings import check_choice, check_number


def interference_terms(base: Tensor, experts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return A [n, n] and B [m, n] of the quadratic, in float64.

    Args:
        base: θ₀ of shape [m, n].
        experts: θ_t, of the same shape. One that equals the base has no say.
    """
    outputs, inputs = base.shape
    curvature = base.new_zeros(inputs, inputs, dtype=torch.float64)
    target = base.new_zeros(outputs, inputs, dtype=torch.float64)
    for expert in experts:
        vector = task_vector(base, expert)
        square = float(vector.square().sum())
        if square:
            gram = vector.mT @ vector
            gram /= square
            curvature += gram
            target.addmm_(vector, gram)
    return curvature, target


def interference_factors(base: Tensor, experts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return X [T·m, n] and Y [m, T·m] with A = XᵀX and B = YX, in float64.

    They are the smaller pair where a layer has many more inputs than outputs.

    Args:
        base: θ₀ of shape [m, n].
        experts: θ_t, of the same shape. One that equals the base has no say.
    """
    rows, products = [], []
    for expert in experts:
        vector = task_vector(base, expert)
        norm = float(torch.linalg.vector_norm(vector))
        row = vector / norm if norm else vector
        rows.append(row)
        products.append(vector @ row.mT)
    return torch.cat(rows), torch.cat(products, dim=1)


def least_interference(base: Tensor, experts: Sequence[Tensor], damping: float = 0.0) -> Tensor:
    r"""Return the minimum of :math:`L(M) + δ ‖M - M_0‖^2`, the nearest to the sum :math:`M_0`.

    .. math:: M = M_0 + (B - M_0 A)(A + δ I)^{+} = M_0 + (Y - M_0 X^T)(X X^T + δ I)^{+} X

    Args:
        base: θ₀ of shape [m, n].
        experts: θ_t, of the same shape.
        damping: :math:`δ` over the mean eigenvalue of A, not below zero.
    """
    outputs, inputs = base.shape
    start = sum_of_task_vectors(base, experts)
    if len(experts) * outputs < inputs:
        rows, products = interference_factors(base, experts)
        missing = torch.addmm(products, start, rows.mT, alpha=-1)
        return start.addmm_(_solved(rows @ rows.mT, missing, damping / inputs), rows)
    curvature, target = interference_terms(base, experts)
    missing = torch.addmm(target, start, curvature, alpha=-1)
    return start.add_(_solved(curvature, missing, damping / inputs))


def _solved(curvature: Tensor, rows: Tensor, damping: float) -> Tensor:
    """Return rows (C + δI)⁺ with δ the damping in units of the trace of C."""
    values, vectors = torch.linalg.eigh(curvature)
    # What is less than this is a direction that no task vector has, but for rounding.
    zero = torch.finfo(values.dtype).eps * len(values) * values[-1]
    inverse = torch.where(values > zero, 1 / (values + damping * values.sum()), 0)
    return torch.mm((rows @ vectors) * inverse, vectors.mT)


def descend_interference(
    base: Tensor, experts: Sequence[Tensor], *, steps: int, learning_rate: float
) -> Tensor:
    """Return where Adam arrives on L after some steps from the sum of the task vectors.

    Args:
        base: θ₀ of shape [m, n].
        experts: θ_t, of the same shape.
        steps: How many.
        learning_rate: About what an entry moves in one step, in the unit of the weights.
    """
    outputs, inputs = base.shape
    if len(experts) * outputs < inputs:
        rows, products = interference_factors(base, experts)
    else:
        rows = None
        curvature, target = interference_terms(base, experts)
    merged = sum_of_task_vectors(base, experts)
    mean = torch.zeros_like(merged)
    square = torch.zeros_like(merged)
    for step in range(1, steps + 1):
        if rows is None:
            gradient = torch.addmm(target, merged, curvature, beta=-2, alpha=2)
        else:
            gradient = torch.addmm(products, merged, rows.mT, beta=-2, alpha=2) @ rows
        mean.lerp_(gradient, 1 - 0.9)
        square.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        spread = (square / (1 - 0.999**step)).sqrt_().add_(1e-8)
        merged.addcdiv_(mean, spread, value=-learning_rate / (1 - 0.9**step))
    return merged


@dataclass(frozen=True)
class WUDI(MatrixMethod):
    """Least interference between the task vectors of every linear layer.

    Each matrix of a layer [outputs, inputs] becomes the one that comes nearest to doing to every
    task's inputs what that task's own vector does, the inputs being told from the task vectors.

    Args:
        scale: What the merged task vector is multiplied with before it is added to the base.
        others: What becomes of tensors that are no matrices: the mean of their task vectors, the
            sum, or nothing (``"base"``, as the authors do).
        convolutions: Whether tensors of more than two dimensions count as matrices of shape
            [outputs, everything else] (``"matrix"``) or are among the others (as the authors do).
        solver: ``"exact"`` solves for the minimum; ``"adam"`` starts at the sum of the task vectors
            and takes some steps of Adam towards it, as the authors do.
        damping: How strongly the exact minimum is drawn to the sum of the task vectors, in units of
            the curvature's mean eigenvalue; 0 is the minimum itself. On task vectors of low rank
            with noise and entries of 1e-3, 300 of the authors' steps come as far as 0.1 does.
        steps: How many steps of Adam.
        learning_rate: Adam's; about what a weight moves in one step.

    Raises:
        InputError: A number is out of its range or a word unknown.

    References:
        Cheng et al. (2025), arXiv:2503.08099.

    Note:
        One expert alone comes back from ``"exact"`` (but for rounding; its biases only with
        ``others="mean"``). Where no task vector reaches a direction, nothing is added in it. The
        authors merge the attention and MLP matrices only and leave the rest, embeddings among it,
        at the base.
    """

    others: Literal["mean", "sum", "base"] = "base"
    solver: Literal["exact", "adam"] = "exact"
    damping: float = 0.0
    steps: int = 300
    learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("WUDI.solver", self.solver, ("exact", "adam"))
        check_number("WUDI.damping", self.damping, low=0)
        check_number("WUDI.steps", self.steps, low=0)
        if not isinstance(self.steps, int):
            raise InputError(f"WUDI.steps: must be a whole number; got {self.steps!r}. Correct it.")
        check_number("WUDI.learning_rate", self.learning_rate, low=0)

    def merge_matrices(self, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """Return the merged task vector of one weight, unscaled."""
        if self.solver == "adam":
            return descend_interference(
                base, experts, steps=self.steps, learning_rate=self.learning_rate
            )
        return least_interference(base, experts, self.damping)
