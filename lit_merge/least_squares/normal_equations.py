r"""Least squares in closed form: the layer whose outputs are nearest to those of all experts.

Over the rows x of the layer's inputs and the wanted outputs z of every task t,

.. math:: M = \arg\min_M \sum_t w_t \sum_n \|x_n M - z_n\|^2 + λ \bar d \|M - M_0\|^2
            = (G + λ \bar d I)^{-1} (C + λ \bar d M_0)

with :math:`G = \sum_t w_t X_t^\top X_t`, :math:`C = \sum_t w_t X_t^\top Z_t`, :math:`\bar d` the
mean diagonal entry of G, :math:`w_t = 1/(n_t \operatorname{var} Z_t)` and :math:`M_0` any merge
that needs no data. Rows are counted from a centre (of all tasks, where the layer has an offset; of
each task, where a shift per task follows), which is a column of ones in X without a ridge on it.

With the experts' own inputs and :math:`Z_t = X_t M_t` this is RegMean (Jin et al. 2023,
arXiv:2212.09849); with the merged model's inputs and :math:`Z_t = X_t M_t` RegMean++ (Nguyen et al.
2025, arXiv:2508.03121); here :math:`Z_t` is what the expert really puts out.

Shapes: G groups of rows; gram ``[G, d, d]``, cross ``[G, d, o]``, M ``[G, d, o]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_merge.errors import InputError

RIDGES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""What ``ridge: auto`` chooses from."""

_STEPS = 200  # of conjugate gradients, at most
_CLOSE = 1e-10


@dataclass(frozen=True)
class NormalEquations:
    """Sums over rows that determine a least-squares fit, float64.

    Attributes:
        gram: ``[G, d, d]``.
        cross: ``[G, d, o]``.
        square: Sum of the squares of the wanted outputs, ``[G, o]``.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """Return the sums over the rows of both."""
        return NormalEquations(
            self.gram + other.gram, self.cross + other.cross, self.square + other.square
        )

    def narrowed(self, size: float) -> NormalEquations:
        """Return the sums in units of a size, in float32."""
        sums = (self.gram, self.cross, self.square)
        return NormalEquations(*((values / size).float() for values in sums))

    def loss(self, matrix: Tensor) -> float:
        """Return the weighted sum of squared errors of a matrix."""
        fitted = (matrix * (self.gram @ matrix)).sum() - 2 * (matrix * self.cross).sum()
        return float(fitted + self.square.sum())


def normal_equations(inputs: Tensor, wanted: Tensor, weight: float) -> NormalEquations:
    """Return the sums of one task's rows.

    Args:
        inputs: Rows, ``[G, n, d]``, centred; multiplied in their own type.
        wanted: Wanted outputs, ``[G, n, o]``, centred.
        weight: The task's weight.
    """
    transposed = inputs.mT
    return NormalEquations(
        (transposed @ inputs).double() * weight,
        (transposed @ wanted).double() * weight,
        wanted.double().square().sum(1) * weight,
    )


def solve(
    sums: NormalEquations,
    prior: Tensor,
    *,
    ridge: float,
    precision: Tensor | None = None,
    name: str = "layer",
) -> Tensor:
    r"""Return the minimiser, float64 ``[G, d, o]``.

    Args:
        sums: The sums over all tasks.
        prior: What the ridge ties to, M₀.
        ridge: λ, in units of the mean diagonal entry of G.
        precision: A ridge entry by entry on top of it, ``[G, d, o]``, non-negative, in the unit of
            G: :math:`\sum p (M - M_0)^2` is added to the objective. Solved by conjugate gradients.
        name: The layer, for messages.

    Raises:
        InputError: The system is singular.

    >>> x = torch.tensor([[[1.0], [2.0]]])
    >>> round(solve(normal_equations(x, 3 * x, 1.0), torch.zeros(1, 1, 1), ridge=0.0).item(), 6)
    3.0
    """
    gram, prior = sums.gram, prior.to(sums.gram)
    strength = ridge * mean_diagonal(gram)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    right = sums.cross + strength * prior
    if precision is None:
        return _cholesky_solve(gram + strength * eye, right, name)
    precision = precision.to(gram)
    typical = precision.mean(dim=(-2, -1), keepdim=True)
    factor = _factor(gram + (strength + typical) * eye, name)
    return _conjugate_gradients(
        lambda m: gram @ m + (strength + precision) * m,
        right + precision * prior,
        lambda m: torch.cholesky_solve(m, factor),
        start=prior,
    )


def choose_ridge(
    folds: Sequence[NormalEquations], prior: Tensor, *, ridges: Sequence[float] = RIDGES
) -> float:
    """Return the ridge whose fit to the other folds predicts each fold best.

    Solved in float32, which is enough to compare candidates that lie apart by factors.

    Args:
        folds: The sums over disjoint sets of examples; two or more.
        prior: What the ridge ties to.
        ridges: The candidates, ascending.
    """
    size = max(float(fold.square.sum()) for fold in folds) or 1.0
    folds = [fold.narrowed(size) for fold in folds]
    best, chosen = float("inf"), ridges[-1]
    for ridge in ridges:
        loss = 0.0
        for held_out, fold in enumerate(folds):
            rest = [other for number, other in enumerate(folds) if number != held_out]
            total = rest[0]
            for other in rest[1:]:
                total = total + other
            try:
                loss += fold.loss(solve(total, prior, ridge=ridge))
            except InputError:  # singular: more ridge is needed
                loss = float("inf")
                break
        if loss < best:
            best, chosen = loss, ridge
    return chosen


def mean_diagonal(gram: Tensor) -> Tensor:
    """Return the mean diagonal entry over all groups, 0-d."""
    return gram.diagonal(dim1=-2, dim2=-1).mean()


def _factor(matrix: Tensor, name: str) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    # Rounding leaves a singular matrix just positive, at some 1e-16 of its diagonal.
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    smallest = torch.finfo(matrix.dtype).eps * matrix.diagonal(dim1=-2, dim2=-1).amax()
    if bool(failed.any()) or bool((pivots <= smallest).any()):
        raise InputError(
            f"ridge: must make the normal equations of {name!r} regular; got singular ones. Give a "
            "larger ridge, or more calibration examples."
        )
    checked: Tensor = factor
    return checked


def _cholesky_solve(matrix: Tensor, right: Tensor, name: str) -> Tensor:
    return torch.cholesky_solve(right, _factor(matrix, name))


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    precondition: Callable[[Tensor], Tensor],
    *,
    start: Tensor,
) -> Tensor:
    """Solve apply(x) = right for a symmetric positive definite operator."""
    x = start.clone()
    residual = right - apply(x)
    z = precondition(residual)
    direction, product = z, (residual * z).sum()
    target = _CLOSE**2 * right.square().sum()
    for _ in range(_STEPS):
        if residual.square().sum() <= target or product == 0:
            break
        image = apply(direction)
        step = product / (direction * image).sum()
        x = x + step * direction
        residual = residual - step * image
        z = precondition(residual)
        product, before = (residual * z).sum(), product
        direction = z + product / before * direction
    return x
