from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods import ParameterSlice
from lit_merge.methods.iso import IsoC, IsoCTS

Array = npt.NDArray[np.float64]
SHAPES = [(9, 6), (6, 9), (8, 8), (40, 7)]


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def slice_of(base: Tensor, vectors: Sequence[Tensor]) -> ParameterSlice:
    tasks = tuple(f"task{i}" for i in range(len(vectors)))
    return ParameterSlice("w", tasks, tuple(base + vector for vector in vectors), base)


def example(shape: tuple[int, int], tasks: int = 3) -> tuple[ParameterSlice, list[Array]]:
    vectors = [normal(shape, seed) for seed in range(1, tasks + 1)]
    return slice_of(normal(shape, 0), vectors), [vector.numpy() for vector in vectors]


def common_and_specific(vectors: Sequence[Array], fraction: float) -> Array:
    """Return what the paper's algorithm makes of task vectors of full rank, step by step."""
    rank, tasks = min(vectors[0].shape), len(vectors)
    own = round((rank - int(rank * fraction)) / tasks)
    if own * tasks > rank:  # rounded up to more than there is, which the paper does not foresee
        own -= 1
    common = rank - own * tasks
    u, s, v = np.linalg.svd(sum(vectors), full_matrices=False)
    lefts, values, rights = [u[:, :common]], [s[:common]], [v[:common]]
    project = u[:, :common] @ u[:, :common].T
    for vector in vectors:
        u1, s1, v1 = np.linalg.svd(vector - project @ vector, full_matrices=False)
        lefts.append(u1[:, :own])
        values.append(s1[:own])
        rights.append(v1[:own])
    u2, _, v2 = np.linalg.svd(np.concatenate(lefts, axis=1), full_matrices=False)
    u3, _, v3 = np.linalg.svd(np.concatenate(rights), full_matrices=False)
    return np.asarray(np.concatenate(values).mean() * (u2 @ v2 @ u3 @ v3))


@pytest.mark.parametrize("shape", SHAPES)
def test_all_directions_of_the_sum_become_as_strong_as_their_mean(shape: tuple[int, int]) -> None:
    p, vectors = example(shape)
    u, s, v = np.linalg.svd(np.sum(vectors, axis=0), full_matrices=False)
    merged = IsoC(scale=0.7)(p) - p.require_base()
    np.testing.assert_allclose(merged, 0.7 * s.mean() * u @ v, atol=1e-11)
    np.testing.assert_allclose(torch.linalg.svdvals(merged), 0.7 * s.mean(), rtol=1e-10)


def test_directions_that_no_task_has_stay_the_base() -> None:
    left, right = torch.linalg.qr(normal((8, 2), 1))[0], torch.linalg.qr(normal((6, 2), 2))[0]
    vectors = [5.0 * torch.outer(left[:, 0], right[:, 0]), torch.outer(left[:, 1], right[:, 1])]
    base = normal((8, 6), 0)
    merged = IsoC()(slice_of(base, vectors)) - base
    torch.testing.assert_close(merged, 3.0 * left @ right.mT)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_common_and_specific_is_the_papers_algorithm(
    shape: tuple[int, int], fraction: float
) -> None:
    p, vectors = example(shape, tasks=2)
    merged = IsoCTS(0.7, common_fraction=fraction)(p)
    expected = p.require_base().numpy() + 0.7 * common_and_specific(vectors, fraction)
    np.testing.assert_allclose(merged, expected, atol=1e-10)


def test_specific_directions_make_a_difference() -> None:
    p, _ = example((8, 8))
    assert float(torch.dist(IsoCTS(common_fraction=0.5)(p), IsoC()(p))) > 0.1


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8])
def test_all_directions_are_equally_strong(fraction: float) -> None:
    p, _ = example((12, 9))
    values = torch.linalg.svdvals(IsoCTS(common_fraction=fraction)(p) - p.require_base())
    np.testing.assert_allclose(values, float(values[0]), rtol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_with_only_common_directions_or_one_expert_both_are_the_same(
    shape: tuple[int, int],
) -> None:
    p, _ = example(shape)
    torch.testing.assert_close(IsoCTS(common_fraction=1.0)(p), IsoC()(p))
    alone, _ = example(shape, tasks=1)
    torch.testing.assert_close(IsoCTS(common_fraction=0.4)(alone), IsoC()(alone))


def test_one_expert_does_not_come_back() -> None:
    alone, vectors = example((8, 6), tasks=1)
    mean = np.linalg.svd(vectors[0])[1].mean()
    merged = IsoC()(alone) - alone.require_base()
    np.testing.assert_allclose(torch.linalg.svdvals(merged), mean, rtol=1e-10)


def test_more_tasks_than_directions_leave_only_common_ones() -> None:
    p, _ = example((3, 9), tasks=5)
    torch.testing.assert_close(IsoCTS(common_fraction=0.0)(p), IsoC()(p))


def test_the_fraction_is_checked() -> None:
    with pytest.raises(InputError, match=r"^IsoCTS\.common_fraction: must be .* got -0\.1"):
        IsoCTS(common_fraction=-0.1)
