"""Least squares: against dense solves in float64, RegMean, and the limits of the ridge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.least_squares.normal_equations import (
    NormalEquations,
    choose_ridge,
    mean_diagonal,
    normal_equations,
    solve,
)
from lit_merge.methods import RegMean
from lit_merge.methods.method import ParameterSlice


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def two_tasks() -> tuple[list[Tensor], list[Tensor], tuple[float, float], NormalEquations]:
    inputs = [rows(0, 2, 20, 4), rows(1, 2, 9, 4)]
    wanted = [rows(2, 2, 20, 3), rows(3, 2, 9, 3)]
    weights = (0.3, 2.0)
    one, two = (normal_equations(*pair) for pair in zip(inputs, wanted, weights, strict=True))
    return inputs, wanted, weights, one + two


def test_without_a_ridge_it_is_the_weighted_least_squares_fit() -> None:
    inputs, wanted, weights, sums = two_tasks()
    roots = [w**0.5 for w in weights]
    x = torch.cat([r * a for r, a in zip(roots, inputs, strict=True)], 1)
    z = torch.cat([r * a for r, a in zip(roots, wanted, strict=True)], 1)
    fit = torch.linalg.lstsq(x, z).solution
    torch.testing.assert_close(solve(sums, rows(4, 2, 4, 3), ridge=0.0), fit)


def test_the_loss_is_the_weighted_sum_of_squared_errors() -> None:
    inputs, wanted, weights, sums = two_tasks()
    matrix = rows(5, 2, 4, 3)
    expected = sum(
        float(w * (x @ matrix - z).square().sum())
        for w, x, z in zip(weights, inputs, wanted, strict=True)
    )
    assert sums.loss(matrix) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_the_solution_is_a_minimum_of_the_objective_with_ridge_and_precision(ridge: float) -> None:
    sums, prior = two_tasks()[-1], rows(4, 2, 4, 3)
    precision = rows(6, 2, 4, 3).square()

    def objective(matrix: Tensor) -> Tensor:
        fit = (matrix * (sums.gram @ matrix)).sum() - 2 * (matrix * sums.cross).sum()
        pull = ridge * mean_diagonal(sums.gram) + precision
        return fit + (pull * (matrix - prior).square()).sum()

    found = solve(sums, prior, ridge=ridge, precision=precision).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(found), found)
    assert gradient.abs().max() < 1e-7 * sums.cross.abs().max()


def test_an_equal_precision_is_a_ridge() -> None:
    sums, prior = two_tasks()[-1], rows(4, 2, 4, 3)
    even = torch.full_like(prior, float(0.2 * mean_diagonal(sums.gram)))
    torch.testing.assert_close(
        solve(sums, prior, ridge=0.1, precision=even), solve(sums, prior, ridge=0.3)
    )


def test_an_endless_ridge_gives_the_prior() -> None:
    sums, prior = two_tasks()[-1], rows(4, 2, 4, 3)
    torch.testing.assert_close(solve(sums, prior, ridge=1e12), prior)


def test_outputs_of_the_experts_weights_give_reg_mean() -> None:
    inputs = [rows(0, 1, 20, 4), rows(1, 1, 9, 4)]
    experts = [rows(2, 4, 3), rows(3, 4, 3)]
    one, two = (normal_equations(x, x @ w, 1.0) for x, w in zip(inputs, experts, strict=True))
    expected = RegMean(off_diagonal=1.0, ridge=1e-3)(
        ParameterSlice(
            name="fc.weight",
            base=None,
            experts=tuple(w.mT for w in experts),
            tasks=("a", "b"),
            grams=tuple(x[0].mT @ x[0] for x in inputs),
        )
    )
    found = solve(one + two, (experts[0] + experts[1])[None] / 2, ridge=1e-3)
    torch.testing.assert_close(found[0].mT, expected.double(), rtol=1e-6, atol=1e-7)


def test_a_singular_system_is_refused_by_name() -> None:
    sums = normal_equations(rows(0, 1, 3, 5), rows(1, 1, 3, 2), 1.0)
    with pytest.raises(InputError, match=r"ridge: must make the normal equations of 'fc'"):
        solve(sums, torch.zeros(1, 5, 2), ridge=0.0, name="fc")


def noisy_folds(noise: float) -> tuple[list[NormalEquations], Tensor]:
    truth = rows(0, 1, 10, 4)
    folds = []
    for seed in (1, 2):
        x = rows(seed, 1, 15, 10)
        z = x @ truth + noise * rows(seed + 2, 1, 15, 4)
        folds.append(normal_equations(x, z, 1.0))
    return folds, truth


def test_noise_asks_for_more_ridge() -> None:
    clean, truth = noisy_folds(0.0)
    loud, _ = noisy_folds(5.0)
    assert choose_ridge(clean, torch.zeros_like(truth)) == 1e-4
    assert choose_ridge(loud, truth) == 0.3


def test_the_ridge_is_the_one_of_least_cross_validated_loss() -> None:
    folds, truth = noisy_folds(1.0)
    prior = torch.zeros_like(truth)
    losses = {
        ridge: folds[0].loss(solve(folds[1], prior, ridge=ridge))
        + folds[1].loss(solve(folds[0], prior, ridge=ridge))
        for ridge in (1e-3, 0.1, 1.0)
    }
    assert choose_ridge(folds, prior, ridges=tuple(losses)) == min(losses, key=losses.__getitem__)
