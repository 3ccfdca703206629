from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods import (
    FisherAverage,
    MaTS,
    ParameterSlice,
    RegMean,
    WeightedAverage,
)

TASKS = ("a", "b", "c")
GENERATOR = torch.Generator().manual_seed(2)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def gram(size: int) -> Tensor:
    rows = normal(3 * size, size)
    return rows.T @ rows


P = ParameterSlice(
    "fc.weight",
    TASKS,
    tuple(normal(4, 6) for _ in TASKS),
    hessians=tuple(normal(4, 6) ** 2 for _ in TASKS),
    grams=tuple(gram(6) for _ in TASKS),
    kronecker=tuple((gram(6), gram(4)) for _ in TASKS),
)
WEIGHTS = [1.0, 0.5, 2.0]


def exact(blocks: str, **settings: object) -> MaTS:
    values: dict[str, object] = {"ridge": 0.0, "factor_damping": 0.0, "tolerance": 1e-13}
    return MaTS(blocks, **(values | settings))  # type: ignore[arg-type]


def kronecker_system(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> Tensor:
    """Assemble Σ λ B⊗A for the rows of W one after the other, and solve it for Σ λ (B⊗A) w."""
    left, right = torch.zeros(24, 24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    for (a, b), weight, expert in zip(factors, weights, P.experts, strict=True):
        block = weight * torch.kron(b, a)
        left, right = left + block, right + block @ expert.flatten()
    return torch.linalg.solve(left, right).reshape(4, 6)


def test_kronecker_blocks_solve_the_dense_system() -> None:
    assert P.kronecker is not None
    expected = kronecker_system(P.kronecker, WEIGHTS)
    merged = exact("kronecker", weights=WEIGHTS)(P)
    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-9)


def test_off_diagonal_entries_of_both_factors_are_scaled() -> None:
    assert P.kronecker is not None
    factors = [
        (0.4 * a + 0.6 * torch.diag(a.diagonal()), 0.4 * b + 0.6 * torch.diag(b.diagonal()))
        for a, b in P.kronecker
    ]
    merged = exact("kronecker", off_diagonal=0.4)(P)
    torch.testing.assert_close(merged, kronecker_system(factors, (1.0,) * 3), rtol=1e-9, atol=1e-9)


def test_factors_are_damped_by_their_own_size() -> None:
    assert P.kronecker is not None
    factors = [
        (
            a + 0.1 * a.trace() / 6 * torch.eye(6, dtype=torch.float64),
            b + 0.1 * b.trace() / 4 * torch.eye(4, dtype=torch.float64),
        )
        for a, b in P.kronecker
    ]
    merged = exact("kronecker", factor_damping=0.1)(P)
    torch.testing.assert_close(merged, kronecker_system(factors, (1.0,) * 3), rtol=1e-9, atol=1e-9)


def test_diagonal_blocks_are_fisher_averaging() -> None:
    merged = exact("diagonal", weights=WEIGHTS)(P)
    torch.testing.assert_close(merged, FisherAverage(WEIGHTS, floor=0.0)(P), rtol=1e-12, atol=0)


@pytest.mark.parametrize("off_diagonal", [1.0, 0.9])
def test_gram_blocks_are_reg_mean(off_diagonal: float) -> None:
    merged = exact("gram", weights=WEIGHTS, off_diagonal=off_diagonal)(P)
    assert torch.equal(merged, RegMean(off_diagonal, ridge=0.0, weights=WEIGHTS)(P))


def test_identical_output_factors_make_it_reg_mean() -> None:
    assert P.grams is not None
    one = gram(4)
    p = dataclasses.replace(P, kronecker=tuple((a, one) for a in P.grams))
    merged = exact("kronecker")(p)
    torch.testing.assert_close(merged, RegMean(1.0, ridge=0.0)(p), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("blocks", ["gram", "kronecker"])
def test_tensors_without_blocks_are_averaged_by_weight(blocks: str) -> None:
    p = dataclasses.replace(P, grams=None, kronecker=None)
    method = MaTS(blocks, weights=WEIGHTS)  # type: ignore[arg-type]
    assert torch.equal(method(p), WeightedAverage(WEIGHTS)(p))


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2, 1)])
def test_float32_factors_of_few_examples_can_be_solved_with_the_defaults(
    shape: tuple[int, ...],
) -> None:
    generator = torch.Generator().manual_seed(0)

    def factor(size: int) -> Tensor:  # of rank one, but for rounding
        rows = 3.0 + 1e-3 * torch.randn(2, size, generator=generator)
        return rows.T @ rows

    p = dataclasses.replace(
        P,
        experts=tuple(expert.float().reshape(shape) for expert in P.experts),
        kronecker=tuple((factor(6), factor(4)) for _ in TASKS),
    )
    merged = MaTS()(p)
    assert merged.shape == shape
    assert float(merged.abs().max()) < 3 * max(float(e.abs().max()) for e in P.experts)


@pytest.mark.parametrize(
    ("blocks", "needs"),
    [("diagonal", {"hessian"}), ("gram", {"gram"}), ("kronecker", {"kronecker"})],
)
def test_the_blocks_say_what_they_need(blocks: str, needs: set[str]) -> None:
    assert MaTS(blocks).needs == needs  # type: ignore[arg-type]


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(InputError, match=r"^MaTS\.iterations: .*after 1 in 'fc\.weight'\. Raise"):
        MaTS(iterations=1)(P)


def test_curvature_that_is_negative_is_refused() -> None:
    assert P.kronecker is not None
    p = dataclasses.replace(P, kronecker=tuple((a, -b) for a, b in P.kronecker))
    with pytest.raises(InputError, match=r"^MaTS\.ridge: .*'fc\.weight'.*search direction"):
        MaTS()(p)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (
            (torch.eye(5), torch.eye(4)),
            r"^Kronecker input factor of 'fc\.weight': must be \[6, 6\]",
        ),
        ((torch.eye(6), torch.eye(5)), r"^Kronecker output factor of 'fc\.weight': .*\[4, 4\] .*5"),
    ],
)
def test_factors_of_another_layer_are_refused(factors: tuple[Tensor, Tensor], message: str) -> None:
    p = dataclasses.replace(P, kronecker=(factors,) * 3)
    with pytest.raises(InputError, match=message):
        MaTS()(p)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": "dense"}, r"^MaTS\.blocks: .*'diagonal', 'gram', 'kronecker'; got 'dense'"),
        ({"off_diagonal": -0.1}, r"^MaTS\.off_diagonal: .*between 0 and 1"),
        ({"ridge": -1}, r"^MaTS\.ridge: .*at least 0"),
        ({"factor_damping": -1}, r"^MaTS\.factor_damping: .*at least 0"),
        ({"iterations": 0}, r"^MaTS\.iterations: must be a whole number of at least 1; got 0"),
        ({"iterations": 2.5}, r"^MaTS\.iterations: must be a whole number"),
        ({"tolerance": float("nan")}, r"^MaTS\.tolerance: .*got nan"),
        ({"weights": {}}, r"^MaTS\.weights: must have one number per task; got none"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MaTS(**settings)  # type: ignore[arg-type]


def test_weights_must_fit_the_tasks() -> None:
    with pytest.raises(InputError, match=r"^MaTS\.weights: .*one number per expert, 3; got 2"):
        MaTS(weights=[1.0, 1.0]).check_tasks(TASKS)
