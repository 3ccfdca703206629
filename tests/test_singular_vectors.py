from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_merge.methods.singular_vectors import leading_singular_vectors, polar_factor

SHAPES = [(9, 5), (5, 9), (7, 7), (1, 4), (4, 1)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def with_spectrum(values: list[float], rows: int, columns: int) -> Tensor:
    left = torch.linalg.qr(normal(rows, len(values)))[0]
    right = torch.linalg.qr(normal(columns, len(values), seed=1))[0]
    return torch.mm(left * torch.tensor(values, dtype=torch.float64), right.mT)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_leading_vectors_make_the_nearest_matrix_of_their_rank(shape: tuple[int, int]) -> None:
    matrix = normal(*shape)
    left, values, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    for count in range(1, min(shape) + 1):
        u, s, v = leading_singular_vectors(matrix, count)
        assert (u.shape, s.shape, v.shape) == ((shape[0], count), (count,), (count, shape[1]))
        np.testing.assert_allclose(s, values[:count], rtol=1e-12)
        expected = (left[:, :count] * values[:count]) @ right[:count]
        np.testing.assert_allclose((u * s) @ v, expected, atol=1e-12)
        torch.testing.assert_close(u.mT @ u, torch.eye(count, dtype=torch.float64))
        torch.testing.assert_close(v @ v.mT, torch.eye(count, dtype=torch.float64))


@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 9e-6, 1e-7, 1e-10])
@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (6, 6)])
def test_small_singular_values_have_their_vectors_too(
    shape: tuple[int, int], smallest: float
) -> None:
    matrix = with_spectrum([1.0, 0.7, 0.3, 0.1, 10 * smallest, smallest], *shape)
    u, s, v = leading_singular_vectors(matrix, 6)
    assert float(s[-1]) == pytest.approx(smallest, rel=1e-5)
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(u.mT @ u, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(v @ v.mT, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close((u * s) @ v, matrix, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_zeros_have_no_singular_vectors(shape: tuple[int, int]) -> None:
    zeros = torch.zeros(shape, dtype=torch.float64)
    u, s, v = leading_singular_vectors(zeros, min(shape))
    assert (u.shape, s.shape, v.shape) == ((shape[0], 0), (0,), (0, shape[1]))
    assert torch.equal(polar_factor(zeros), zeros)
    assert polar_factor(zeros[:, :0]).shape == (shape[0], 0)


def test_directions_without_a_singular_value_are_left_out() -> None:
    matrix = normal(8, 2) @ normal(2, 6, seed=1)
    _, s, _ = leading_singular_vectors(matrix, 5)
    np.testing.assert_allclose(s, np.linalg.svd(matrix.numpy())[1][:2], rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_polar_factor_of_full_rank_is_the_matrix_over_its_root(shape: tuple[int, int]) -> None:
    matrix = normal(*shape).numpy()
    gram = matrix.T @ matrix if shape[0] >= shape[1] else matrix @ matrix.T
    values, vectors = np.linalg.eigh(gram)
    root = (vectors / np.sqrt(values)) @ vectors.T
    expected = matrix @ root if shape[0] >= shape[1] else root @ matrix
    np.testing.assert_allclose(polar_factor(torch.from_numpy(matrix)), expected, atol=1e-12)


def test_no_orthonormal_matrix_is_nearer_than_the_polar_factor() -> None:
    matrix = normal(8, 5)
    nearest = float(torch.dist(matrix, polar_factor(matrix)))
    for seed in range(50):
        near = torch.linalg.qr(polar_factor(matrix) + 0.1 * normal(8, 5, seed=seed))[0]
        near = near * torch.sign((near * polar_factor(matrix)).sum(dim=0))
        assert float(torch.dist(matrix, near)) > nearest


def test_the_polar_factor_is_zero_where_the_matrix_is() -> None:
    left, right = torch.linalg.qr(normal(8, 2))[0], torch.linalg.qr(normal(6, 2, seed=1))[0]
    matrix = (left * torch.tensor([3.0, 0.5], dtype=torch.float64)) @ right.mT
    torch.testing.assert_close(polar_factor(matrix), left @ right.mT)
