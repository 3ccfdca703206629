from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods import (
    GradientMatching,
    KroneckerMatching,
    ParameterSlice,
    TaskArithmetic,
)
from tests.references import joint_quadratic_optimum

TASKS = ("a", "b", "c")
GENERATOR = torch.Generator().manual_seed(3)
M, N = 4, 6


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def gram(size: int) -> Tensor:
    rows = normal(2 * size, size)
    return rows.T @ rows


FACTORS = tuple((gram(N), gram(M)) for _ in TASKS)
BASE = normal(M, N)
P = ParameterSlice(
    "fc.weight",
    TASKS,
    tuple(normal(M, N) for _ in TASKS),
    base=BASE,
    hessians=tuple(torch.outer(b.diagonal(), a.diagonal()) for a, b in FACTORS),
    kronecker=FACTORS,
)


def exact(scale: float | dict[str, float] = 1.0, **settings: float) -> KroneckerMatching:
    values = {"ridge": 0.0, "factor_damping": 0.0, "tolerance": 1e-14}
    return KroneckerMatching(scale, **(values | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1.0, 0.3, 2.0), (1.0, 0.5, -0.02)])
def test_quadratic_losses_with_kronecker_hessians_are_solved_exactly(
    scales: tuple[float, ...],
) -> None:
    base_hessian = normal(M, N) ** 2
    experts, joint = joint_quadratic_optimum(
        BASE.flatten(),
        torch.diag(0.1 * base_hessian.flatten() + 0.5),
        [expert.flatten() for expert in P.experts],
        [torch.kron(b, a) for a, b in FACTORS],
        scales,
    )
    trained = dataclasses.replace(
        P, experts=tuple(e.reshape(M, N) for e in experts), base_hessian=base_hessian
    )
    method = exact(dict(zip(TASKS, scales, strict=True)), damping=0.5, base_scale=0.1)
    torch.testing.assert_close(method(trained), joint.reshape(M, N), rtol=1e-9, atol=1e-9)


def test_diagonal_factors_make_it_gradient_matching_by_the_diagonal() -> None:
    factors = tuple((torch.diag(a.diagonal()), torch.diag(b.diagonal())) for a, b in FACTORS)
    p = dataclasses.replace(P, kronecker=factors, base_hessian=normal(M, N) ** 2)
    expected = GradientMatching(0.7, damping=0.2)(p)
    torch.testing.assert_close(exact(0.7, damping=0.2)(p), expected, rtol=1e-9, atol=1e-9)


def test_a_large_prior_is_task_arithmetic() -> None:
    for method in (exact(0.3, damping=1e12), KroneckerMatching(0.3, ridge=1e10)):
        torch.testing.assert_close(method(P), TaskArithmetic(0.3)(P), rtol=0, atol=1e-7)


def test_tensors_without_factors_are_matched_by_the_diagonal() -> None:
    p = dataclasses.replace(P, kronecker=None, base_hessian=normal(M, N) ** 2)
    method = KroneckerMatching({"a": 1.0, "b": 0.5, "c": 2.0}, damping=0.1, base_scale=0.3)
    expected = GradientMatching({"a": 1.0, "b": 0.5, "c": 2.0}, damping=0.1, base_scale=0.3)(p)
    assert torch.equal(method(p), expected)


def test_the_hessian_of_the_result_is_the_diagonal_of_the_sum() -> None:
    scales = {"a": 1.0, "b": 0.5, "c": 2.0}
    dense = sum(c * torch.kron(b, a) for c, (a, b) in zip(scales.values(), FACTORS, strict=True))
    expected = torch.as_tensor(dense).diagonal().reshape(M, N)
    torch.testing.assert_close(KroneckerMatching(scales).hessian(P), expected)


def test_a_scale_that_takes_out_more_than_there_is_is_refused() -> None:
    method = exact({"a": 0.1, "b": 0.1, "c": -5.0}, damping=0.1)
    message = r"^KroneckerMatching\.ridge: .*'fc\.weight'.*negative scales nearer to 0"
    with pytest.raises(InputError, match=message):
        method(P)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(InputError, match=r"^KroneckerMatching\.iterations: .*after 1 in 'fc\.w"):
        KroneckerMatching(iterations=1)(P)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": float("inf")}, r"^KroneckerMatching\.scale: .*got inf"),
        ({"damping": -1.0}, r"^KroneckerMatching\.damping: .*at least 0"),
        ({"ridge": -1.0}, r"^KroneckerMatching\.ridge: .*at least 0"),
        ({"factor_damping": -1.0}, r"^KroneckerMatching\.factor_damping: .*at least 0"),
        ({"base_scale": -1.0}, r"^KroneckerMatching\.base_scale: .*at least 0"),
        ({"tolerance": -1.0}, r"^KroneckerMatching\.tolerance: .*at least 0"),
        ({"iterations": True}, r"^KroneckerMatching\.iterations: must be a whole number"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        KroneckerMatching(**settings)  # type: ignore[arg-type]


def test_scales_must_fit_the_tasks() -> None:
    with pytest.raises(InputError, match=r"^KroneckerMatching\.scale: .*got none for 'c'"):
        KroneckerMatching({"a": 1.0, "b": 1.0}).check_tasks(TASKS)
