from __future__ import annotations

import pytest
import torch

from lit_merge.checkpoint import low_rank
from lit_merge.checkpoint.low_rank import add_low_rank, truncated


def matrix(rows: int, width: int, seed: int = 0, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(rows, width, generator=generator)
    left = torch.randn(rows, rank, generator=generator)
    return left @ torch.randn(rank, width, generator=generator)


def test_a_range_of_the_product_is_added_entry_by_entry() -> None:
    left, right = matrix(9, 3, 1), matrix(3, 5, 2)
    for start, stop in ((0, 45), (3, 4), (7, 31), (44, 45), (20, 20)):
        out = torch.ones(stop - start)
        add_low_rank(out, left, right, start)
        for i, value in enumerate(out.tolist()):
            row, column = divmod(start + i, 5)
            product = sum(float(left[row, k]) * float(right[k, column]) for k in range(3))
            assert value == pytest.approx(1.0 + product, abs=1e-6)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (6, 6)])
def test_the_truncation_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    delta = matrix(*shape)
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    for rank in (1, 3, 6):
        found = truncated(delta, rank)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        product = found.left.double() @ found.right.double()
        torch.testing.assert_close(product, best, rtol=0, atol=1e-6)
        rest = float((s[rank:] ** 2).sum() / (s**2).sum()) ** 0.5
        assert found.relative_error == pytest.approx(rest, abs=1e-6)
        assert found.norm == pytest.approx(float((s**2).sum()) ** 0.5)
        # Both factors carry the root of the singular values.
        for factor in (found.left, found.right.T):
            gram = factor.double().T @ factor.double()
            torch.testing.assert_close(gram, torch.diag(s[:rank]), rtol=0, atol=1e-5)


def test_a_matrix_of_that_rank_is_returned() -> None:
    found = truncated(matrix(30, 50, rank=4), 4)
    torch.testing.assert_close(found.left @ found.right, matrix(30, 50, rank=4))
    assert found.relative_error < 1e-6


def test_a_rank_beyond_the_matrix_is_filled_with_zeros() -> None:
    delta = matrix(3, 5)
    found = truncated(delta, 8)
    assert found.left.shape == (3, 8)
    assert found.right.shape == (8, 5)
    assert not found.left[:, 3:].any()
    torch.testing.assert_close(found.left @ found.right, delta)


def test_nothing_has_no_error() -> None:
    found = truncated(torch.zeros(4, 5), 2)
    assert found.relative_error == 0.0
    assert not (found.left @ found.right).any()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_randomised_range_finds_what_the_exact_one_finds(
    monkeypatch: pytest.MonkeyPatch, transposed: bool
) -> None:
    signal, noise = matrix(150, 200, 1, rank=8), matrix(150, 200, 2)
    delta = signal + 0.1 * noise
    delta = delta.T if transposed else delta
    exact = truncated(delta, 8)
    monkeypatch.setattr(low_rank, "_EXACT", 10)
    near = truncated(delta, 8)
    assert not torch.equal(near.left, exact.left)
    torch.testing.assert_close(near.left @ near.right, exact.left @ exact.right, rtol=0, atol=1e-3)
    assert near.relative_error == pytest.approx(exact.relative_error, rel=1e-4)
    assert torch.equal(truncated(delta, 8).left, near.left)  # the same each time
