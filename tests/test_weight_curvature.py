"""The shared merge formula against dense systems, assembled entry by entry."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lit_merge.methods.weight_curvature import (
    DiagonalCurvature,
    GramCurvature,
    KroneckerCurvature,
    NotConverged,
    NotPositiveDefinite,
    WeightCurvature,
    merge_by_curvature,
)

M, N, T = 4, 6, 3
SCALES = (1.0, 0.5, 2.0)
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def gram(size: int, rank: int | None = None) -> Tensor:
    rows = normal(2 * size if rank is None else rank, size)
    return rows.T @ rows


START = normal(M, N)
EXPERTS = [normal(M, N) for _ in range(T)]
HESSIANS = [normal(M, N) ** 2 for _ in range(T)]
INPUTS = [gram(N) for _ in range(T)]
OUTPUTS = [gram(M) for _ in range(T)]


def kronecker(
    inputs: Sequence[Tensor] = INPUTS,
    outputs: Sequence[Tensor] = OUTPUTS,
    *,
    scales: Sequence[float] = SCALES,
    ridge: float = 0.0,
    iterations: int = 100,
    tolerance: float = 1e-13,
    prior: float | Tensor = 0.0,
) -> KroneckerCurvature:
    return KroneckerCurvature(inputs, outputs, scales, ridge, iterations, tolerance, prior)


def dense(kind: str) -> list[Tensor]:
    """Each expert's curvature as a matrix [MN, MN] of the row-major flattened weight."""
    if kind == "diagonal":
        return [torch.diag(hessian.flatten()) for hessian in HESSIANS]
    blocks = []
    for a, b in zip(INPUTS, OUTPUTS, strict=True):
        block = torch.zeros(M * N, M * N, dtype=torch.float64)
        for row in range(M * N):
            for column in range(M * N):
                (i, j), (k, h) = divmod(row, N), divmod(column, N)
                left = float(b[i, k]) if kind == "kronecker" else float(i == k)
                block[row, column] = left * a[j, h]
        blocks.append(block)
    return blocks


def curvature(kind: str, ridge: float) -> WeightCurvature:
    if kind == "diagonal":
        return DiagonalCurvature(HESSIANS, SCALES, ridge)
    if kind == "gram":
        return GramCurvature(INPUTS, SCALES, ridge)
    return kronecker(ridge=ridge)


KINDS = ["diagonal", "gram", "kronecker"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_merge_solves_the_dense_system(kind: str, ridge: float) -> None:
    blocks = dense(kind)
    total = sum(c * block for c, block in zip(SCALES, blocks, strict=True))
    assert isinstance(total, Tensor)
    prior = ridge * total.trace() / (M * N) * torch.eye(M * N, dtype=torch.float64)
    right = prior @ START.flatten()
    for c, block, expert in zip(SCALES, blocks, EXPERTS, strict=True):
        right = right + c * block @ expert.flatten()
    expected = torch.linalg.solve(total + prior, right).reshape(M, N)
    merged = merge_by_curvature(START, EXPERTS, curvature(kind, ridge))
    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_prior_the_start_does_not_matter(kind: str) -> None:
    merged = merge_by_curvature(START, EXPERTS, curvature(kind, 0.0))
    elsewhere = merge_by_curvature(START + 5, EXPERTS, curvature(kind, 0.0))
    torch.testing.assert_close(merged, elsewhere, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_multiplying_is_that_of_the_dense_matrix(kind: str) -> None:
    for t, block in enumerate(dense(kind)):
        expected = (block @ START.flatten()).reshape(M, N)
        torch.testing.assert_close(curvature(kind, 0.0).multiply(t, START), expected)


@pytest.mark.parametrize("prior", [0.7, HESSIANS[0]])
def test_the_prior_may_differ_entry_by_entry(prior: float | Tensor) -> None:
    added = torch.diag((torch.ones(M, N, dtype=torch.float64) * prior).flatten())
    left, right = added.clone(), added @ START.flatten()
    for c, block, expert in zip(SCALES, dense("kronecker"), EXPERTS, strict=True):
        left, right = left + c * block, right + c * block @ expert.flatten()
    merged = merge_by_curvature(START, EXPERTS, kronecker(prior=prior))
    expected = torch.linalg.solve(left, right).reshape(M, N)
    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-9)


def test_proportional_factors_are_solved_in_one_step() -> None:
    inputs = [2.0 * INPUTS[0], INPUTS[0], 0.1 * INPUTS[0]]
    outputs = [OUTPUTS[0], 3.0 * OUTPUTS[0], OUTPUTS[0]]
    sizes = [c * s for c, s in zip(SCALES, (2.0, 3.0, 0.1), strict=True)]
    expected = sum(s * e for s, e in zip(sizes, EXPERTS, strict=True)) / sum(sizes)
    one = kronecker(inputs, outputs, iterations=1, tolerance=1e-9)
    merged = merge_by_curvature(START, EXPERTS, one)
    torch.testing.assert_close(merged, torch.as_tensor(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_directions_that_nobody_has_seen_stay_at_the_start(ridge: float) -> None:
    seen = torch.linalg.qr(normal(N, N)).Q[:, :3]
    inputs = [seen @ gram(3) @ seen.T for _ in range(T)]
    merged = merge_by_curvature(START, EXPERTS, kronecker(inputs, ridge=ridge))
    unseen = torch.eye(N, dtype=torch.float64) - seen @ seen.T
    torch.testing.assert_close(
        (merged - START) @ unseen, torch.zeros(M, N).double(), atol=1e-8, rtol=0
    )
    whole = sum(
        c * torch.kron(b, seen.T @ a @ seen)
        for c, a, b in zip(SCALES, inputs, OUTPUTS, strict=True)
    )
    right = sum(
        c * b @ e @ a @ seen for c, a, b, e in zip(SCALES, inputs, OUTPUTS, EXPERTS, strict=True)
    )
    expected = torch.linalg.solve(torch.as_tensor(whole), torch.as_tensor(right).flatten())
    torch.testing.assert_close(merged @ seen, expected.reshape(M, 3), rtol=1e-4, atol=1e-4)


def test_entries_that_nobody_has_seen_stay_at_the_start() -> None:
    hessians = [hessian.clone() for hessian in HESSIANS]
    for hessian in hessians:
        hessian[1, 2] = 0
    merged = merge_by_curvature(START, EXPERTS, DiagonalCurvature(hessians, SCALES, 0.0))
    assert merged[1, 2] == START[1, 2]
    assert bool(merged.isfinite().all())


def test_one_expert_as_the_start_is_returned_bit_for_bit() -> None:
    merged = merge_by_curvature(START, [START], kronecker(INPUTS[:1], OUTPUTS[:1], scales=(1.0,)))
    assert torch.equal(merged, START)


def test_a_sum_of_grams_without_curvature_in_a_direction_is_refused() -> None:
    singular = [gram(N, rank=2) for _ in range(2)]
    with pytest.raises(NotPositiveDefinite, match=r"none left at input \d of 6"):
        merge_by_curvature(START, EXPERTS[:2], GramCurvature(singular, (1.0, 1.0), 0.0))


def test_negative_curvature_is_refused() -> None:
    with pytest.raises(NotPositiveDefinite, match="search direction"):
        merge_by_curvature(START, EXPERTS, kronecker(scales=(-1.0, -0.5, -2.0)))


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(NotConverged, match=r"^0\.\d+ after 2$|^\d.*e-\d+ after 2$"):
        merge_by_curvature(START, EXPERTS, kronecker(iterations=2))
