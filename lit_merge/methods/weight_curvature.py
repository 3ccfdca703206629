r"""The curvatures of the experts of one weight, in three shapes, and the merge that they all share.

Averaging, task arithmetic, Fisher averaging, RegMean, MaTS and gradient matching are one formula
under different curvature:

.. math:: \hat θ = θ_s + \Big(H_0 + \sum_t c_t H_t\Big)^{-1} \sum_t c_t H_t (θ_t - θ_s)

It minimises :math:`½\|θ - θ_s\|²_{H_0} + ½\sum_t c_t \|θ - θ_t\|²_{H_t}`. From the weighted mean
:math:`θ_s = \bar θ` with :math:`H_0 → 0` it is the solution of
:math:`(\sum c_t H_t) θ = \sum c_t H_t θ_t`, and what no expert has seen stays at the mean. From
task arithmetic :math:`θ_s = θ_0 + \sum_t c_t τ_t` it is gradient matching,
:math:`θ_0 + (H_0 + \sum c_t H_t)^{-1} \sum_t c_t (H_0 + H_t) τ_t`, as putting :math:`θ_s` in shows.
One expert of coefficient one is :math:`θ_s` itself, and stays as it is.

Notation: a weight W is [m, n], m outputs and n inputs. A Gram matrix G acts as :math:`W G`, a
Kronecker product of input and output factors A [n, n], B [m, m] as :math:`B W A`.

References:
    Tam, Bansal & Raffel (2024), arXiv:2312.04339; Daheim et al. (2024), arXiv:2310.12808.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class NotPositiveDefinite(ArithmeticError):
    """The merged curvature has a direction without curvature, or a negative one."""


class NotConverged(ArithmeticError):
    """Conjugate gradients did not reach their tolerance in the steps that they had."""


class WeightCurvature(ABC):
    r"""The curvatures of all experts of one weight, with their coefficients and a prior.

    The prior :math:`H_0` has an absolute part and a relative one, the ridge: a multiple of the
    identity, in units of the mean of :math:`\sum_t |c_t| \operatorname{diag} H_t`.
    """

    coefficients: Sequence[float]

    @abstractmethod
    def multiply(self, expert: int, weight: Tensor) -> Tensor:
        """Return one expert's curvature times a matrix of the weight's shape."""

    @abstractmethod
    def solve(self, right: Tensor) -> Tensor:
        r"""Return X with :math:`(H_0 + \sum_t c_t H_t) X` the right side.

        Raises:
            NotPositiveDefinite: There is no such X, or no stable one.
            NotConverged: It was not found in the steps allowed.
        """


def merge_by_curvature(
    start: Tensor, experts: Sequence[Tensor], curvature: WeightCurvature
) -> Tensor:
    r"""Return :math:`θ_s + (H_0 + \sum_t c_t H_t)^{-1} \sum_t c_t H_t (θ_t - θ_s)`.

    Args:
        start: :math:`θ_s`, of the shape and dtype that the curvature works in.
        experts: :math:`θ_t`, likewise.
        curvature: :math:`H_t`, :math:`c_t` and :math:`H_0`.

    Raises:
        NotPositiveDefinite: The merged curvature is not.
        NotConverged: The steps allowed were not enough.
    """
    pull = torch.zeros_like(start)
    for t, (expert, coefficient) in enumerate(zip(experts, curvature.coefficients, strict=True)):
        pull.add_(curvature.multiply(t, expert - start), alpha=coefficient)
    if not pull.any():  # of one expert, or where no expert has seen anything
        return start
    return start + curvature.solve(pull)


@dataclass(frozen=True)
class DiagonalCurvature(WeightCurvature):
    r"""Curvature entry by entry.

    Args:
        hessians: :math:`h_t`, of the weight's shape.
        coefficients: :math:`c_t`.
        ridge: The prior's relative part.
    """

    hessians: Sequence[Tensor]
    coefficients: Sequence[float]
    ridge: float

    def multiply(self, expert: int, weight: Tensor) -> Tensor:
        """Return :math:`h_t ⊙ W`."""
        return self.hessians[expert] * weight

    def solve(self, right: Tensor) -> Tensor:
        """Divide; an entry that nothing has seen is zero."""
        total = _total(self.hessians, self.coefficients)
        sizes = [float(hessian.mean()) for hessian in self.hessians]
        total += self.ridge * _weighted_size(self.coefficients, sizes)
        return torch.where(total == 0, 0.0, right / total)


@dataclass(frozen=True)
class GramCurvature(WeightCurvature):
    r"""Curvature of a squared error of the layer's outputs: every row of W has the same one.

    Args:
        grams: :math:`G_t = \sum x x^T`, ``[n, n]``.
        coefficients: :math:`c_t`.
        ridge: The prior's relative part.
    """

    grams: Sequence[Tensor]
    coefficients: Sequence[float]
    ridge: float

    def multiply(self, expert: int, weight: Tensor) -> Tensor:
        """Return :math:`W G_t`."""
        return weight @ self.grams[expert]

    def solve(self, right: Tensor) -> Tensor:
        r"""Return :math:`R (δI + \sum_t c_t G_t)^{-1}` by a Cholesky decomposition.

        Raises:
            NotPositiveDefinite: The sum is not.
        """
        total = _total(self.grams, self.coefficients)
        sizes = [float(gram.diagonal().mean()) for gram in self.grams]
        total.diagonal().add_(self.ridge * _weighted_size(self.coefficients, sizes))
        factor, failed = torch.linalg.cholesky_ex(total)
        if int(failed):
            raise NotPositiveDefinite(
                f"got none left at input {int(failed) - 1} of {len(total)}, given those before it"
            )
        return torch.cholesky_solve(right.T, factor).T


@dataclass(frozen=True)
class KroneckerCurvature(WeightCurvature):
    r"""Curvature with a factor for the inputs and one for the outputs.

    The sum of Kronecker products is no Kronecker product, so its equation is solved by conjugate
    gradients. Their preconditioner is the product :math:`\bar B ⊗ \bar A` of averaged factors plus
    the prior's mean, inverted through eigenvectors; it is exact where the experts' factors are
    proportional, as they nearly are after fine-tuning from one base.

    Args:
        inputs: :math:`A_t`, ``[n, n]``.
        outputs: :math:`B_t`, ``[m, m]``.
        coefficients: :math:`c_t`, not all zero.
        ridge: The prior's relative part.
        iterations: The most steps.
        tolerance: The residual at which to stop, as a share of the first, both in the norm that
            the preconditioner makes. On random factors with spectra that fall as 1/k², 1e-3 left
            0.2 to 2 % of the way to go, measured by the curvature, after 20 to 80 steps.
        prior: The prior's absolute part, a number or of the weight's shape.

    References:
        Tam, Bansal & Raffel (2024), arXiv:2312.04339, without a preconditioner; Martens & Grosse
        (2015), arXiv:1503.05671, for the factors.
    """

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    coefficients: Sequence[float]
    ridge: float
    iterations: int
    tolerance: float
    prior: float | Tensor = 0.0

    def multiply(self, expert: int, weight: Tensor) -> Tensor:
        """Return :math:`B_t W A_t`."""
        return self.outputs[expert] @ weight @ self.inputs[expert]

    def solve(self, right: Tensor) -> Tensor:
        """Solve by preconditioned conjugate gradients from zero.

        Raises:
            NotPositiveDefinite: A step came upon a direction without positive curvature.
            NotConverged: The residual is still above the tolerance after the last step.
        """
        prior = self.prior + self.ridge * self._mean_diagonal()
        precondition = self._preconditioner(float(torch.as_tensor(prior).mean()))
        solution, residual = torch.zeros_like(right), right
        direction = precondition(residual)
        first = size = _inner(residual, direction)
        for _ in range(self.iterations):
            image = prior * direction
            for t, coefficient in enumerate(self.coefficients):
                image.add_(self.multiply(t, direction), alpha=coefficient)
            curvature = _inner(direction, image)
            if not curvature > 0:
                raise NotPositiveDefinite("got a search direction with none")
            step = size / curvature
            solution = solution + step * direction
            residual = residual - step * image
            preconditioned = precondition(residual)
            before, size = size, _inner(residual, preconditioned)
            if size <= self.tolerance**2 * first:
                return solution
            direction = preconditioned + (size / before) * direction
        raise NotConverged(f"{(size / first) ** 0.5:.2g} after {self.iterations}")

    def _mean_diagonal(self) -> float:
        means = [
            float(a.diagonal().mean() * b.diagonal().mean())
            for a, b in zip(self.inputs, self.outputs, strict=True)
        ]
        return _weighted_size(self.coefficients, means)

    def _preconditioner(self, prior: float) -> _KroneckerInverse:
        r"""Return :math:`(\bar B ⊗ \bar A + δ)^{-1}`, δ the prior's mean.

        :math:`\bar A = \sum_t |c_t| \operatorname{tr}(B_t) A_t` and
        :math:`\bar B = \sum_t |c_t| \operatorname{tr}(A_t) B_t`, divided by the trace that both
        have: the product's trace is then that of the sum.
        """
        sizes = [abs(coefficient) for coefficient in self.coefficients]
        of_inputs = [float(a.diagonal().sum()) for a in self.inputs]
        of_outputs = [float(b.diagonal().sum()) for b in self.outputs]
        mean_input = _total(self.inputs, [c * tr for c, tr in zip(sizes, of_outputs, strict=True)])
        mean_output = _total(self.outputs, [c * tr for c, tr in zip(sizes, of_inputs, strict=True)])
        input_values, input_vectors = torch.linalg.eigh(mean_input)
        output_values, output_vectors = torch.linalg.eigh(mean_output)
        trace = float(mean_input.diagonal().sum())
        curvature = torch.outer(output_values.clamp(min=0), input_values.clamp(min=0)) / trace
        curvature += prior
        # A direction that the averaged factors do not see, none of the experts' does. Nothing but
        # rounding pulls there, and dividing by rounding would let it.
        rounding = max(curvature.shape) * torch.finfo(curvature.dtype).eps * curvature.max()
        scales = torch.where(curvature > rounding, curvature.reciprocal(), 0.0)
        return _KroneckerInverse(output_vectors, input_vectors, scales)


@dataclass(frozen=True)
class _KroneckerInverse:
    """A matrix [m, n] goes into the eigenvectors' frame, is scaled there, and comes back."""

    output_vectors: Tensor
    input_vectors: Tensor
    scales: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        turned = self.output_vectors.T @ weight @ self.input_vectors
        return self.output_vectors @ (turned * self.scales) @ self.input_vectors.T


def _inner(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def _total(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0])
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        total.add_(tensor, alpha=coefficient)
    return total


def _weighted_size(coefficients: Sequence[float], sizes: Sequence[float]) -> float:
    return sum(abs(c) * size for c, size in zip(coefficients, sizes, strict=True))
