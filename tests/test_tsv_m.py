from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods import ParameterSlice
from lit_merge.methods.tsv_m import TSVM

Array = npt.NDArray[np.float64]
SHAPES = [(9, 6), (6, 9), (8, 8), (40, 5)]


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def slice_of(base: Tensor, vectors: Sequence[Tensor]) -> ParameterSlice:
    tasks = tuple(f"task{i}" for i in range(len(vectors)))
    return ParameterSlice("w", tasks, tuple(base + vector for vector in vectors), base)


def reference(vectors: Sequence[Array], count: int) -> Array:
    """Return what the paper's algorithm makes of task vectors of full rank, step by step."""
    lefts, values, rights = [], [], []
    for vector in vectors:
        u, s, v = np.linalg.svd(vector)
        for i in range(count):
            lefts.append(u[:, i])
            values.append(s[i])
            rights.append(v[i])
    u1, _, v1 = np.linalg.svd(np.stack(lefts, axis=1), full_matrices=False)
    u2, _, v2 = np.linalg.svd(np.stack(rights), full_matrices=False)
    return np.asarray(u1 @ v1 @ np.diag(values) @ u2 @ v2)


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_papers_algorithm(shape: tuple[int, int], tasks: int) -> None:
    base = normal(shape, 0)
    vectors = [normal(shape, seed) for seed in range(1, tasks + 1)]
    expected = reference([v.numpy() for v in vectors], min(shape) // tasks)
    merged = TSVM(scale=0.7)(slice_of(base, vectors))
    np.testing.assert_allclose(merged, base.numpy() + 0.7 * expected, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_vectors_can_be_kept(shape: tuple[int, int]) -> None:
    base = normal(shape, 0)
    vectors = [normal(shape, seed) for seed in (1, 2, 3)]
    expected = reference([v.numpy() for v in vectors], min(shape))
    merged = TSVM(share=1.0)(slice_of(base, vectors))
    np.testing.assert_allclose(merged, base.numpy() + expected, atol=1e-11)


def test_one_expert_comes_back() -> None:
    p = slice_of(normal((6, 9), 0), [normal((6, 9), 1)])
    torch.testing.assert_close(TSVM()(p), p.experts[0], rtol=0, atol=1e-13)


def test_tasks_that_do_not_meet_are_added() -> None:
    left = torch.linalg.qr(normal((12, 9), 1))[0]
    right = torch.linalg.qr(normal((9, 9), 2))[0]
    vectors = [
        (left[:, part] * torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)) @ right[part]
        for part in (slice(0, 3), slice(3, 6), slice(6, 9))
    ]
    base = normal((12, 9), 0)
    merged = TSVM()(slice_of(base, vectors))
    torch.testing.assert_close(merged, base + sum(vectors), rtol=0, atol=1e-13)


def test_equal_experts_count_as_one() -> None:
    vector = normal((8, 6), 1)
    u, s, v = np.linalg.svd(vector.numpy(), full_matrices=False)
    base = normal((8, 6), 0)
    merged = TSVM()(slice_of(base, [vector] * 3))
    np.testing.assert_allclose(merged, base.numpy() + (u[:, :2] * s[:2]) @ v[:2], atol=1e-11)


def test_an_expert_that_learned_nothing_changes_nothing_but_the_share() -> None:
    base, vectors = normal((8, 6), 0), [normal((8, 6), 1), normal((8, 6), 2)]
    still = TSVM(share=0.5)(slice_of(base, [*vectors, torch.zeros_like(base)]))
    torch.testing.assert_close(still, TSVM(share=0.5)(slice_of(base, vectors)))


def test_every_task_keeps_a_vector_of_a_small_matrix() -> None:
    vectors = [normal((2, 9), seed) for seed in (1, 2, 3)]
    expected = reference([v.numpy() for v in vectors], 1)
    merged = TSVM()(slice_of(torch.zeros(2, 9, dtype=torch.float64), vectors))
    np.testing.assert_allclose(merged, expected, atol=1e-12)


def test_the_share_is_checked() -> None:
    with pytest.raises(InputError, match=r"^TSVM\.share: must be .* between 0 and 1; got 1\.5"):
        TSVM(share=1.5)
