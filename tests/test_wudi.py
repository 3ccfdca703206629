from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods import ParameterSlice, TaskArithmetic
from lit_merge.methods.wudi import WUDI

SHAPES = [(9, 6), (6, 6), (3, 20), (1, 5)]  # the last two have more inputs than outputs of all


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def slice_of(base: Tensor, vectors: Sequence[Tensor]) -> ParameterSlice:
    tasks = tuple(f"task{i}" for i in range(len(vectors)))
    return ParameterSlice("w", tasks, tuple(base + vector for vector in vectors), base)


def interference(merged: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """Return the paper's loss as it is written there."""
    losses = [
        ((merged - vector) @ vector.T).square().sum() / vector.square().sum() for vector in vectors
    ]
    return torch.stack(losses).sum()


def least_squares(
    vectors: Sequence[Tensor], start: Tensor, damping: float
) -> npt.NDArray[np.float64]:
    """Return the minimum from one least-squares problem in all rows at once."""
    norms = [float(vector.norm()) for vector in vectors]
    inputs = np.concatenate([(v / n).numpy() for v, n in zip(vectors, norms, strict=True)])
    outputs = np.concatenate(
        [(v @ v.T / n).numpy() for v, n in zip(vectors, norms, strict=True)], axis=1
    )
    if damping:
        strength = np.sqrt(damping * np.square(inputs).sum() / inputs.shape[1])
        outputs = np.concatenate([outputs, strength * start.numpy()], axis=1)
        inputs = np.concatenate([inputs, strength * np.eye(inputs.shape[1])])
    return np.asarray(np.linalg.lstsq(inputs, outputs.T)[0].T)


@pytest.mark.parametrize("damping", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_is_the_least_squares_solution(shape: tuple[int, int], damping: float) -> None:
    base, vectors = normal(shape, 0), [normal(shape, seed) for seed in (1, 2, 3)]
    start = torch.stack(vectors).sum(dim=0)
    merged = WUDI(damping=damping)(slice_of(base, vectors)) - base
    expected = least_squares(vectors, start, damping)
    np.testing.assert_allclose(merged, expected, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_the_papers_loss_vanishes_there(shape: tuple[int, int]) -> None:
    base, vectors = normal(shape, 0), [normal(shape, seed) for seed in (1, 2, 3)]
    merged = (WUDI()(slice_of(base, vectors)) - base).requires_grad_()
    (gradient,) = torch.autograd.grad(interference(merged, vectors), merged)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_nothing_is_added_where_no_task_vector_reaches() -> None:
    reach = torch.linalg.qr(normal((9, 4), 5))[0]
    vectors = [normal((7, 4), seed) @ reach.mT for seed in (1, 2)]
    merged = WUDI()(slice_of(torch.zeros(7, 9, dtype=torch.float64), vectors))
    torch.testing.assert_close(merged @ reach @ reach.mT, merged)
    np.testing.assert_allclose(merged, least_squares(vectors, sum(vectors), 0.0), atol=1e-10)


def test_tasks_with_inputs_apart_are_added() -> None:
    inputs = torch.linalg.qr(normal((8, 8), 5))[0]
    vectors = [normal((6, 4), 1) @ inputs[:4], normal((6, 4), 2) @ inputs[4:]]
    p = slice_of(normal((6, 8), 0), vectors)
    torch.testing.assert_close(WUDI()(p), TaskArithmetic()(p))


@pytest.mark.parametrize("shape", SHAPES)
def test_one_expert_comes_back(shape: tuple[int, int]) -> None:
    p = slice_of(normal(shape, 0), [normal(shape, 1)])
    torch.testing.assert_close(WUDI()(p), p.experts[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(WUDI(solver="adam")(p), p.experts[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["exact", "adam"])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_expert_that_learned_nothing_has_no_say(shape: tuple[int, int], solver: str) -> None:
    base, vectors = normal(shape, 0), [normal(shape, 1), normal(shape, 2)]
    method = WUDI(solver=solver, learning_rate=1e-2)  # type: ignore[arg-type]
    still = method(slice_of(base, [*vectors, torch.zeros(shape, dtype=torch.float64)]))
    torch.testing.assert_close(still, method(slice_of(base, vectors)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_adam_is_the_authors_loop_on_the_papers_loss(shape: tuple[int, int]) -> None:
    base, vectors = normal(shape, 0), [normal(shape, seed) for seed in (1, 2, 3)]
    point = torch.stack(vectors).sum(dim=0).requires_grad_()
    optimizer = torch.optim.Adam([point], lr=1e-3)
    for _ in range(50):
        (point.grad,) = torch.autograd.grad(interference(point, vectors), point)
        optimizer.step()
    merged = WUDI(solver="adam", steps=50, learning_rate=1e-3)(slice_of(base, vectors))
    torch.testing.assert_close(merged, base + point.detach(), rtol=0, atol=1e-10)


def test_adam_approaches_the_exact_minimum() -> None:
    base, vectors = normal((9, 6), 0), [normal((9, 6), seed) for seed in (1, 2, 3)]
    p = slice_of(base, vectors)
    exact = WUDI()(p)
    least = float(interference(exact - base, vectors))
    distances, excess = [], []
    for steps in (0, 30, 100, 300, 1000, 3000):
        merged = WUDI(solver="adam", steps=steps, learning_rate=1e-2)(p)
        distances.append(float(torch.dist(merged, exact)))
        excess.append(float(interference(merged - base, vectors)) - least)
    assert distances == sorted(distances, reverse=True)
    assert excess == sorted(excess, reverse=True)
    assert distances[0] > 1
    assert distances[-1] < 1e-3
    assert 0 < excess[-1] < 1e-6 * excess[0]


def test_zero_steps_are_the_sum_of_the_task_vectors() -> None:
    p = slice_of(normal((5, 4), 0), [normal((5, 4), 1), normal((5, 4), 2)])
    torch.testing.assert_close(WUDI(solver="adam", steps=0)(p), TaskArithmetic()(p))


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match=r"^WUDI\.solver: must be one of .* got 'sgd'"):
        WUDI(solver="sgd")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^WUDI\.damping: must be .* at least 0; got -1"):
        WUDI(damping=-1)
    with pytest.raises(InputError, match=r"^WUDI\.steps: must be a whole number; got 1\.5"):
        WUDI(steps=1.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^WUDI\.steps: must be .* at least 0; got -1"):
        WUDI(steps=-1)
    with pytest.raises(InputError, match=r"^WUDI\.learning_rate: must be .* got inf"):
        WUDI(learning_rate=float("inf"))
