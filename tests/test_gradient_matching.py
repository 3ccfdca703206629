from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods import (
    Average,
    FisherAverage,
    GradientMatching,
    ParameterSlice,
    TaskArithmetic,
)
from lit_merge.methods.method import looking_at
from tests.references import gradient_matching_by_entries, joint_quadratic_optimum

TASKS = ("a", "b", "c")


def random_slice(size: int = 40, dtype: torch.dtype = torch.float64) -> ParameterSlice:
    generator = torch.Generator().manual_seed(1)

    def normal() -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    return ParameterSlice(
        "layer.weight",
        TASKS,
        experts=tuple(normal() for _ in TASKS),
        base=normal(),
        hessians=tuple(normal() ** 2 for _ in TASKS),
        base_hessian=normal() ** 2,
    )


def with_hessians(p: ParameterSlice, *hessians: Tensor) -> ParameterSlice:
    return dataclasses.replace(p, hessians=hessians, base_hessian=None)


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1.0, 0.3, 2.0), (1.0, 0.5, -0.05)])
def test_quadratic_losses_with_diagonal_hessians_are_solved_exactly(
    scales: tuple[float, ...],
) -> None:
    p = random_slice()
    assert p.hessians is not None
    assert p.base_hessian is not None
    optima = list(p.experts)
    experts, joint = joint_quadratic_optimum(
        p.require_base(),
        torch.diag(p.base_hessian + 0.5),
        optima,
        [torch.diag(hessian) for hessian in p.hessians],
        scales,
    )
    trained = dataclasses.replace(p, experts=tuple(experts))
    method = GradientMatching(dict(zip(TASKS, scales, strict=True)), damping=0.5)
    torch.testing.assert_close(method(trained), joint, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_agrees_with_exact_rational_arithmetic(dtype: torch.dtype) -> None:
    p = random_slice(dtype=dtype)
    assert p.hessians is not None
    assert p.base_hessian is not None
    exact = gradient_matching_by_entries(
        p.require_base().tolist(),
        [expert.tolist() for expert in p.experts],
        [hessian.tolist() for hessian in p.hessians],
        (p.base_hessian.double() * 0.25 + 1e-3).tolist(),
        (1.0, 0.5, 2.0),
    )
    method = GradientMatching({"a": 1.0, "b": 0.5, "c": 2.0}, damping=1e-3, base_scale=0.25)
    tolerance = 3e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(
        method(p).double(),
        torch.tensor(exact, dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_without_curvature_it_is_task_arithmetic(scale: float) -> None:
    p = random_slice()
    zero = with_hessians(p, *(torch.zeros_like(expert) for expert in p.experts))
    task_arithmetic = TaskArithmetic(scale)(p)
    torch.testing.assert_close(GradientMatching(scale)(zero), task_arithmetic)
    torch.testing.assert_close(GradientMatching(scale, damping=0.0)(zero), task_arithmetic)
    torch.testing.assert_close(
        GradientMatching(scale, damping=1e12)(p), task_arithmetic, rtol=0, atol=1e-9
    )


def test_without_prior_it_is_the_fisher_weighted_average() -> None:
    p = dataclasses.replace(random_slice(), base_hessian=None)
    merged = GradientMatching({"a": 0.2, "b": 0.5, "c": 0.3}, damping=0.0)(p)
    expected = FisherAverage({"a": 0.2, "b": 0.5, "c": 0.3}, floor=0.0)(p)
    torch.testing.assert_close(merged, expected)


def test_with_equal_hessians_without_prior_it_is_the_average() -> None:
    p = random_slice()
    assert p.hessians is not None
    equal = with_hessians(p, *[p.hessians[0]] * 3)
    torch.testing.assert_close(GradientMatching(1 / 3, damping=0.0)(equal), Average()(p))


def test_merging_a_merge_is_merging_all_at_once() -> None:
    p = random_slice()
    assert p.hessians is not None
    assert p.base_hessian is not None
    method = GradientMatching(damping=1e-3, base_scale=0.5)
    prior = 0.5 * p.base_hessian + 1e-3
    first = dataclasses.replace(p, tasks=TASKS[:2], experts=p.experts[:2], hessians=p.hessians[:2])
    second = dataclasses.replace(
        p,
        tasks=("a+b", "c"),
        experts=(method(first), p.experts[2]),
        hessians=(method.precision(first) - prior, p.hessians[2]),
    )
    torch.testing.assert_close(method(second), method(p), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(method.precision(second), method.precision(p))


def test_precision_is_the_prior_plus_the_scaled_hessians() -> None:
    p = random_slice()
    assert p.hessians is not None
    assert p.base_hessian is not None
    method = GradientMatching({"a": 1.0, "b": 2.0, "c": 0.5}, damping=0.25, base_scale=3.0)
    a, b, c = p.hessians
    expected = 3 * p.base_hessian + 0.25 + a + 2 * b + 0.5 * c
    torch.testing.assert_close(method.precision(p), expected)


@pytest.mark.parametrize("damping", [0.0, 1e-30])
def test_hessian_entries_near_the_smallest_floats_keep_their_proportions(damping: float) -> None:
    p = ParameterSlice(
        "w",
        ("a", "b"),
        experts=(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0])),
        base=torch.zeros(2),
        hessians=(torch.tensor([3e-19, 0.0]), torch.tensor([1e-19, 0.0])),
    )
    merged = GradientMatching(damping=damping)(p)
    torch.testing.assert_close(merged, torch.tensor([1.5, 4.0]))


def test_an_unseen_entry_beside_seen_ones_is_task_arithmetic() -> None:
    p = random_slice()
    assert p.hessians is not None
    hidden = with_hessians(
        p, *(hessian.index_fill(0, torch.tensor([3]), 0) for hessian in p.hessians)
    )
    merged = GradientMatching(damping=0.0)(hidden)
    expected = TaskArithmetic()(p)
    torch.testing.assert_close(merged[3], expected[3])
    assert not torch.allclose(merged, expected)


def negative() -> ParameterSlice:
    return ParameterSlice(
        "head.weight",
        ("keep", "forget"),
        experts=(torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([2.0, 2.0, 2.0, 2.0])),
        base=torch.zeros(4),
        hessians=(torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.5, 1.0, 2.0, 0.0])),
    )


FORGET = {"keep": 1.0, "forget": -1.0}


def test_a_negative_scale_takes_data_out() -> None:
    p = random_slice()
    assert p.hessians is not None
    together = dataclasses.replace(
        p, tasks=TASKS[:2], experts=p.experts[:2], hessians=p.hessians[:2]
    )
    method = GradientMatching(damping=1e-3)
    prior = method.precision(with_hessians(together, *[torch.zeros_like(p.experts[0])] * 2))
    base_only = dataclasses.replace(together, base_hessian=None)
    joint = dataclasses.replace(
        base_only,
        tasks=("a+b", "b"),
        experts=(method(base_only), p.experts[1]),
        hessians=(method.precision(base_only) - prior, p.hessians[1]),
    )
    without_b = GradientMatching({"a+b": 1.0, "b": -1.0}, damping=1e-3)
    torch.testing.assert_close(without_b(joint), p.experts[0], rtol=1e-8, atol=1e-8)


def test_negative_scales_that_leave_no_precision_are_refused_by_name_and_count() -> None:
    message = r"precision .* must be positive; got none left in 2 of 4 entries of 'head\.weight'\."
    method = GradientMatching(FORGET, damping=0.0)
    with pytest.raises(InputError, match=message + r".*guard='clamp'"):
        method(negative())
    with pytest.raises(InputError, match=message):
        method.precision(negative())


def test_the_survey_refuses_them_before_anything_is_merged() -> None:
    p = negative()
    assert p.hessians is not None
    first, second = (
        dataclasses.replace(
            p,
            experts=tuple(expert[part] for expert in p.experts),
            base=torch.zeros(2),
            hessians=tuple(hessian[part] for hessian in p.hessians),
        )
        for part in (slice(0, 2), slice(2, 4))
    )
    bias, norm = (dataclasses.replace(p, name=name) for name in ("fc.bias", "norm.weight"))
    method = GradientMatching(FORGET, damping=0.0)
    lost = r"2 of 4 entries of 'head\.weight'"
    with pytest.raises(InputError, match=rf"{lost}\."):
        method.survey(looking_at([first, second]))
    with pytest.raises(InputError, match=rf"{lost}, and entries of 1 more tensor\."):
        method.survey(looking_at([first, second, bias]))
    with pytest.raises(InputError, match=rf"{lost}, and entries of 2 more tensors\."):
        method.survey(looking_at([first, second, bias, norm]))


@pytest.mark.parametrize(
    "method",
    [GradientMatching(), GradientMatching({"a": 0.0}), GradientMatching(guard="clamp")],
)
def test_the_survey_reads_nothing_when_it_has_nothing_to_refuse(method: GradientMatching) -> None:
    def read(look: object) -> list[tuple[str, Any]]:
        raise AssertionError("read")

    method.survey(read)


def test_a_difference_that_is_only_rounding_counts_as_no_precision() -> None:
    p = dataclasses.replace(
        negative(),
        tasks=("keep", "also", "forget"),
        experts=(*negative().experts, torch.ones(4)),
        hessians=(torch.full((4,), 0.1), torch.full((4,), 0.2), torch.full((4,), 0.3)),
    )
    method = GradientMatching({"keep": 1.0, "also": 1.0, "forget": -1.0}, damping=0.0)
    with pytest.raises(InputError, match="none left in 4 of 4 entries"):
        method(p)


def test_clamping_merges_these_entries_by_task_arithmetic() -> None:
    method = GradientMatching(FORGET, damping=0.0, guard="clamp")
    merged = method(negative())
    # entry 0: (1·1 − 0.5·2)/(1 − 0.5); 1 and 2 have no precision left; 3 was never seen
    torch.testing.assert_close(merged, torch.tensor([0.0, -1.0, -1.0, -1.0]))


def test_clamped_entries_have_the_precision_of_the_prior() -> None:
    method = GradientMatching(FORGET, damping=0.25, guard="clamp")
    expected = torch.tensor([0.75, 0.25, 0.25, 0.25])
    torch.testing.assert_close(method.precision(negative()), expected)


def test_what_the_guard_has_clamped_is_said() -> None:
    method = GradientMatching({"keep": 1.0, "forget": -1.0}, guard="clamp", damping=0.5)
    p = dataclasses.replace(
        negative(),
        name="layer.weight",
        tasks=("keep", "forget"),
        experts=(torch.ones(4), torch.zeros(4)),
        hessians=(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([9.0, 1.0, 1.0, 9.0])),
        base=torch.zeros(4),
        base_hessian=None,
    )
    whole = dataclasses.replace(p, name="whole", hessians=(torch.ones(4), torch.zeros(4)))
    fact = method.survey(looking_at([p, p, whole]))
    assert fact == {"layer.weight": (4, 8), "whole": (0, 4)}
    (note,) = method.notes(fact)
    assert "in 4 entries (33.3 %) of 1 tensors" in note
    assert "'layer.weight', 4 of 8" in note
    assert method.notes({"whole": (0, 4)}) == method.notes(None) == ()
