from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.methods import Average, FisherAverage, ParameterSlice, WeightedAverage
from lit_merge.methods.method import looking_at

EXPERTS = (
    torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
    torch.tensor([5.0, 6.0, 7.0], dtype=torch.float64),
)
HESSIANS = (
    torch.tensor([1.0, 0.0, 1e-19], dtype=torch.float64),
    torch.tensor([3.0, 2.0, 3e-19], dtype=torch.float64),
)
SLICE = ParameterSlice("w", ("a", "b"), EXPERTS, hessians=HESSIANS)


def test_experts_are_weighed_by_their_hessians() -> None:
    merged = FisherAverage(floor=0.0)(SLICE)
    expected = torch.tensor([(1 + 15) / 4, 6.0, (3 + 21) / 4], dtype=torch.float64)
    torch.testing.assert_close(merged, expected)


def test_entries_below_the_floor_count_as_the_floor() -> None:
    merged = FisherAverage(floor=1.0)(SLICE)
    expected = torch.tensor([(1 + 15) / 4, (2 + 12) / 3, 5.0], dtype=torch.float64)
    torch.testing.assert_close(merged, expected)


def test_weights_multiply_the_hessians() -> None:
    merged = FisherAverage({"b": 1.0, "a": 3.0}, floor=0.0)(SLICE)
    expected = torch.tensor([3.0, 6.0, (9 + 21) / 6], dtype=torch.float64)
    torch.testing.assert_close(merged, expected)


def test_equal_hessians_give_the_average() -> None:
    same = ParameterSlice("w", ("a", "b"), EXPERTS, hessians=(HESSIANS[1],) * 2)
    torch.testing.assert_close(FisherAverage()(same), Average()(same))


def test_without_floor_entries_that_nobody_has_seen_are_averaged_by_weight() -> None:
    zeros = (torch.zeros(3, dtype=torch.float64),) * 2
    unseen = ParameterSlice("w", ("a", "b"), EXPERTS, hessians=zeros)
    merged = FisherAverage([1.0, 3.0], floor=0.0)(unseen)
    torch.testing.assert_close(merged, WeightedAverage([1.0, 3.0])(unseen))


def test_an_expert_of_weight_zero_does_not_count() -> None:
    assert torch.equal(FisherAverage([0.0, 1.0])(SLICE), EXPERTS[1])


def test_entries_near_the_smallest_floats_keep_their_proportions() -> None:
    tiny = (torch.tensor([1e-19]), torch.tensor([3e-19]))
    p = ParameterSlice("w", ("a", "b"), (torch.zeros(1), torch.ones(1)), hessians=tiny)
    torch.testing.assert_close(FisherAverage(floor=0.0)(p), torch.tensor([0.75]))


def random_slice(name: str, seed: int, size: int = 9) -> ParameterSlice:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(6, size, generator=generator, dtype=torch.float64)
    return ParameterSlice(name, ("a", "b", "c"), tuple(values[:3]), hessians=tuple(values[3:] ** 2))


def averaged_by_loop(p: ParameterSlice, masses: list[list[float]]) -> list[float]:
    columns = zip(*(expert.tolist() for expert in p.experts), strict=True)
    return [
        sum(m[i] * x for m, x in zip(masses, column, strict=True)) / sum(m[i] for m in masses)
        for i, column in enumerate(columns)
    ]


def test_an_added_floor_is_added() -> None:
    p = random_slice("w", 0)
    assert p.hessians is not None
    masses = [[h + 0.3 for h in hessian.tolist()] for hessian in p.hessians]
    merged = FisherAverage(floor=0.3, floor_mode="added")(p)
    torch.testing.assert_close(merged.tolist(), averaged_by_loop(p, masses), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("floor_mode", ["clamped", "added"])
def test_hessians_are_divided_by_their_norm_over_all_tensors(floor_mode: str) -> None:
    tensors = [random_slice("v", 1), random_slice("w", 2)]
    slices = [
        dataclasses.replace(
            p,
            experts=tuple(expert[start : start + 4] for expert in p.experts),
            hessians=tuple(hessian[start : start + 4] for hessian in p.hessians or ()),
        )
        for p in tensors
        for start in (0, 4, 8)
    ]
    weights, floor = (1.0, 2.0, 0.5), 0.3
    method = FisherAverage(weights, floor, floor_mode, "norm")  # type: ignore[arg-type]
    fact = method.survey(looking_at(slices))
    merged = torch.cat([method(dataclasses.replace(p, fact=fact)) for p in slices])

    norms = [
        math.hypot(*(h for p in tensors for h in (p.hessians or ())[t].tolist())) for t in range(3)
    ]
    expected: list[float] = []
    for p in tensors:
        assert p.hessians is not None
        masses = []
        for weight, norm, hessian in zip(weights, norms, p.hessians, strict=True):
            if floor_mode == "added":
                masses.append([weight * (h + floor) / (norm + floor) for h in hessian.tolist()])
            else:
                masses.append([weight * max(h, floor) / norm for h in hessian.tolist()])
        expected += averaged_by_loop(p, masses)
    torch.testing.assert_close(merged.tolist(), expected, rtol=1e-13, atol=1e-13)


def test_normalised_hessians_may_be_of_any_scale() -> None:
    p = random_slice("w", 3)
    assert p.hessians is not None
    method = FisherAverage(floor=0.0, normalize="norm")
    scaled = tuple(hessian * size for hessian, size in zip(p.hessians, (1e3, 1e-9, 7), strict=True))
    torch.testing.assert_close(method(dataclasses.replace(p, hessians=scaled)), method(p))


def test_a_hessian_without_norm_is_refused() -> None:
    p = random_slice("w", 4)
    assert p.hessians is not None
    nothing = dataclasses.replace(p, hessians=(p.hessians[0], torch.zeros(9), p.hessians[2]))
    message = r"^FisherAverage\.normalize: .*got 0 for expert 2 of 3.*set normalize='none'"
    with pytest.raises(InputError, match=message):
        FisherAverage(normalize="norm").survey(looking_at([nothing]))


@pytest.mark.parametrize("floor_mode", ["clamped", "added"])
def test_averages_compose_with_the_hessian_of_the_result(floor_mode: str) -> None:
    p = random_slice("w", 5)
    assert p.hessians is not None
    method = FisherAverage(floor=0.0, floor_mode=floor_mode)  # type: ignore[arg-type]
    two = dataclasses.replace(p, tasks=("a", "b"), experts=p.experts[:2], hessians=p.hessians[:2])
    again = dataclasses.replace(
        p,
        tasks=("ab", "c"),
        experts=(method(two), p.experts[2]),
        hessians=(method.hessian(two), p.hessians[2]),
    )
    torch.testing.assert_close(method(again), method(p), rtol=1e-13, atol=1e-13)


def test_the_hessian_of_the_result_is_what_the_entries_counted() -> None:
    expected = torch.tensor([3 * 1 + 3, 3 * 0.5 + 2, 3 * 0.5 + 0.5], dtype=torch.float64)
    method = FisherAverage([3.0, 1.0], floor=0.5)
    torch.testing.assert_close(method.hessian(SLICE), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"floor_mode": "max"}, r"^FisherAverage\.floor_mode: .*'clamped', 'added'; got 'max'"),
        ({"normalize": "sum"}, r"^FisherAverage\.normalize: .*'none', 'norm'; got 'sum'"),
    ],
)
def test_unknown_words_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FisherAverage(**settings)  # type: ignore[arg-type]


def test_chunks_of_many_experts_merge_to_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(6)
    experts = tuple(torch.randn(9, 5001, generator=generator))
    hessians = tuple(torch.rand(9, 5001, generator=generator))
    p = ParameterSlice("w", tuple("abcdefghi"), experts, hessians=hessians)
    chunks = [
        ParameterSlice(
            "w",
            p.tasks,
            tuple(expert[start : start + 7] for expert in experts),
            hessians=tuple(hessian[start : start + 7] for hessian in hessians),
        )
        for start in range(0, 5001, 7)
    ]
    assert torch.equal(torch.cat([FisherAverage()(chunk) for chunk in chunks]), FisherAverage()(p))
