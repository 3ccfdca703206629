from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods import ModelStock, ParameterSlice
from lit_merge.methods.method import looking_at

TASKS = ("a", "b", "c")


def slice_around(
    center: float, *, name: str = "w", size: int = 12, tasks: Sequence[str] = TASKS, seed: int = 0
) -> ParameterSlice:
    """Experts at random around a common task vector of entries ``center``."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator, dtype=torch.float64)
    experts = tuple(
        base + center + torch.randn(size, generator=generator, dtype=torch.float64) for _ in tasks
    )
    return ParameterSlice(name, tuple(tasks), experts, base=base)


def merged_by_loop(p: ParameterSlice, ratio: float) -> list[float]:
    columns = zip(*(expert.tolist() for expert in p.experts), strict=True)
    return [
        (1 - ratio) * origin + ratio * sum(column) / len(column)
        for origin, column in zip(p.require_base().tolist(), columns, strict=True)
    ]


def cosines_by_loop(slices: Sequence[ParameterSlice]) -> list[float]:
    """The cosine of every pair of task vectors, over all slices in a row."""
    vectors = [
        [x for p in slices for x in (p.experts[t] - p.require_base()).tolist()]
        for t in range(len(slices[0].tasks))
    ]
    return [
        math.fsum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
        for a, b in itertools.combinations(vectors, 2)
    ]


def ratio_of(cosine: float, n: int) -> float:
    return n * cosine / (1 + (n - 1) * cosine)


def test_the_ratio_is_that_of_the_mean_cosine() -> None:
    p = slice_around(1.0)
    cosine = sum(cosines_by_loop([p])) / 3
    expected = merged_by_loop(p, ratio_of(cosine, 3))
    torch.testing.assert_close(ModelStock()(p).tolist(), expected, rtol=1e-13, atol=1e-13)


def test_the_ratio_may_be_that_of_the_mean_angle() -> None:
    p = slice_around(1.0)
    cosine = math.cos(sum(math.acos(c) for c in cosines_by_loop([p])) / 3)
    expected = merged_by_loop(p, ratio_of(cosine, 3))
    torch.testing.assert_close(
        ModelStock(mean="angle")(p).tolist(), expected, rtol=1e-13, atol=1e-13
    )
    assert not torch.allclose(ModelStock()(p), ModelStock(mean="angle")(p), rtol=0, atol=1e-6)


def test_the_result_is_the_point_nearest_to_the_center_that_the_experts_scatter_around() -> None:
    # Task vectors are μ + e_i with all e_i of one length and orthogonal to μ and to one another:
    # the nearest point to μ on the way from the base to the mean is found by hand.
    base = torch.linspace(-1, 1, 6, dtype=torch.float64)
    center = torch.tensor([2.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    noise = 3 * torch.eye(6, dtype=torch.float64)[1:5]
    p = ParameterSlice("w", ("a", "b", "c", "d"), tuple(base + center + noise), base=base)
    mean = center + noise.mean(0)
    nearest = base + mean * (center @ mean) / (mean @ mean)
    torch.testing.assert_close(ModelStock()(p), nearest, rtol=0, atol=1e-14)


def test_equal_experts_are_the_result() -> None:
    p = slice_around(1.0)
    same = dataclasses.replace(p, experts=(p.experts[1],) * 3)
    torch.testing.assert_close(ModelStock()(same), p.experts[1], rtol=0, atol=1e-13)


def test_experts_that_point_away_from_each_other_leave_the_base() -> None:
    base = torch.tensor([1.0, 2.0])
    vector = torch.tensor([0.5, 0.25])
    p = ParameterSlice("w", ("a", "b"), (base + vector, base - vector), base=base)
    assert torch.equal(ModelStock()(p), base)


def test_a_zero_task_vector_counts_as_orthogonal() -> None:
    base = torch.zeros(2, dtype=torch.float64)
    vector = torch.tensor([3.0, 4.0], dtype=torch.float64)
    p = ParameterSlice("w", TASKS, (vector, vector, base), base=base)  # cosines 1, 0, 0
    expected = ratio_of(1 / 3, 3) * 2 / 3 * vector
    torch.testing.assert_close(ModelStock()(p), expected, rtol=1e-14, atol=0)


NAMES = ("encoder.weight", "encoder.bias", "head.weight")


@pytest.mark.parametrize("scope", ["tensor", "layer", "model"])
def test_an_angle_is_that_of_its_scope_over_all_slices(scope: str) -> None:
    tensors = [slice_around(0.5, name=name, seed=seed) for seed, name in enumerate(NAMES)]
    groups = {
        "tensor": [[0], [1], [2]],
        "layer": [[0, 1], [0, 1], [2]],
        "model": [[0, 1, 2]] * 3,
    }[scope]
    slices = [
        dataclasses.replace(
            p,
            experts=tuple(expert[start : start + 5] for expert in p.experts),
            base=p.require_base()[start : start + 5],
        )
        for p in tensors
        for start in (0, 5, 10)
    ]
    method = ModelStock(scope=scope)  # type: ignore[arg-type]
    fact = method.survey(looking_at(slices))
    merged = torch.cat([method(dataclasses.replace(p, fact=fact)) for p in slices])
    expected: list[float] = []
    for p, group in zip(tensors, groups, strict=True):
        cosines = cosines_by_loop([tensors[i] for i in group])
        expected += merged_by_loop(p, ratio_of(sum(cosines) / 3, 3))
    torch.testing.assert_close(merged.tolist(), expected, rtol=1e-13, atol=1e-13)


def test_there_must_be_two_experts() -> None:
    with pytest.raises(InputError, match=r"^experts: must be at least two for ModelStock.*got 1"):
        ModelStock().check_tasks(("a",))
    with pytest.raises(InputError, match=r"^experts: must be at least two for ModelStock.*got 1"):
        ModelStock()(slice_around(1.0, tasks=("a",)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("still", [False, True])
def test_what_is_not_finite_shows(bad: float, still: bool) -> None:
    for model in range(4):
        p = slice_around(1.0)
        if still:  # all task vectors are zero elsewhere
            p = dataclasses.replace(p, experts=tuple(p.require_base().clone() for _ in TASKS))
        models: list[Tensor] = [*p.experts, p.require_base()]
        models[model][4] = bad
        assert not bool(ModelStock()(p)[4].isfinite())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scope": "block"}, r"^ModelStock\.scope: .*'tensor', 'layer', 'model'; got 'block'"),
        ({"mean": "median"}, r"^ModelStock\.mean: .*'cosine', 'angle'; got 'median'"),
    ],
)
def test_unknown_words_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelStock(**settings)  # type: ignore[arg-type]
