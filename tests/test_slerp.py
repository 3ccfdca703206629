from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods import SLERP, ParameterSlice
from lit_merge.methods.method import looking_at

TASKS = ("a", "b")


def random_slice(name: str = "w", size: int = 30, seed: int = 0) -> ParameterSlice:
    generator = torch.Generator().manual_seed(seed)
    base, first, second = torch.randn(3, size, generator=generator, dtype=torch.float64)
    return ParameterSlice(name, TASKS, (first, second), base=base)


def slerp_by_loop(a: Sequence[float], b: Sequence[float], t: float) -> list[float]:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    angle = math.acos(dot / math.hypot(*a) / math.hypot(*b))
    return [
        (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)
        for x, y in zip(a, b, strict=True)
    ]


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_experts_are_joined_by_an_arc(t: float) -> None:
    p = random_slice()
    expected = slerp_by_loop(p.experts[0].tolist(), p.experts[1].tolist(), t)
    torch.testing.assert_close(SLERP(t)(p).tolist(), expected, rtol=1e-13, atol=1e-13)


def test_task_vectors_are_joined_by_an_arc_from_the_base() -> None:
    p = random_slice()
    base = p.require_base()
    first, second = ((expert - base).tolist() for expert in p.experts)
    expected = base + torch.tensor(slerp_by_loop(first, second, 0.3), dtype=torch.float64)
    torch.testing.assert_close(SLERP(0.3, of="task_vectors")(p), expected, rtol=0, atol=1e-13)


def test_experts_of_one_length_keep_it() -> None:
    p = random_slice()
    unit = dataclasses.replace(p, experts=tuple(e / e.norm() for e in p.experts))
    for t in (0.1, 0.5, 0.9):
        assert float(SLERP(t)(unit).norm()) == pytest.approx(1, abs=1e-13)


def test_the_ends_are_the_experts_bit_for_bit() -> None:
    p = random_slice()
    assert torch.equal(SLERP(0.0)(p), p.experts[0])
    assert torch.equal(SLERP(1.0)(p), p.experts[1])


def turned(angle: float) -> ParameterSlice:
    a = torch.tensor([2.0, 0.0], dtype=torch.float64)
    b = torch.tensor([3 * math.cos(angle), 3 * math.sin(angle)], dtype=torch.float64)
    return ParameterSlice("w", TASKS, (a, b))


def test_nearly_parallel_tensors_are_interpolated_linearly_from_the_threshold_on() -> None:
    p = turned(math.acos(0.9996))
    line = 0.7 * p.experts[0] + 0.3 * p.experts[1]
    arc = torch.tensor(slerp_by_loop(p.experts[0].tolist(), p.experts[1].tolist(), 0.3))
    torch.testing.assert_close(SLERP(0.3)(p), line, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(SLERP(0.3, threshold=0.9997)(p), arc.double(), rtol=0, atol=1e-6)
    assert not torch.allclose(line, arc.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("angle", [0.0, math.pi])
def test_parallel_and_opposed_tensors_are_interpolated_linearly_at_any_threshold(
    angle: float,
) -> None:
    p = turned(angle)
    line = 0.7 * p.experts[0] + 0.3 * p.experts[1]
    torch.testing.assert_close(SLERP(0.3, threshold=1.0)(p), line, rtol=0, atol=1e-12)


def test_a_zero_tensor_is_interpolated_linearly() -> None:
    p = ParameterSlice("w", TASKS, (torch.zeros(3), torch.ones(3)))
    assert torch.equal(SLERP(0.25)(p), torch.full((3,), 0.25))


def test_equal_experts_are_returned_bit_for_bit() -> None:
    p = random_slice()
    same = dataclasses.replace(p, experts=(p.experts[0],) * 2)
    assert torch.equal(SLERP(0.3)(same), p.experts[0])


def test_every_tensor_has_its_own_angle_over_all_its_slices() -> None:
    tensors = [random_slice("v", seed=1), random_slice("w", seed=2)]
    slices: list[ParameterSlice] = []
    for p in tensors:
        for start in range(0, 30, 7):
            cut = slice(start, start + 7)
            experts = tuple(expert[cut] for expert in p.experts)
            slices.append(dataclasses.replace(p, experts=experts, start=start, shape=(30,)))
    method = SLERP(0.4)
    fact = method.survey(looking_at(slices))
    merged = [method(dataclasses.replace(p, fact=fact)) for p in slices]
    torch.testing.assert_close(
        torch.cat(merged), torch.cat([method(p) for p in tensors]), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("tasks", [("a",), ("a", "b", "c")])
def test_there_must_be_two_experts(tasks: tuple[str, ...]) -> None:
    message = rf"^experts: must be two for SLERP; got {len(tasks)} \('a'"
    with pytest.raises(InputError, match=message):
        SLERP().check_tasks(tasks)
    with pytest.raises(InputError, match=message):
        SLERP()(ParameterSlice("w", tasks, (torch.ones(2),) * len(tasks)))


def test_the_base_is_needed_for_task_vectors_only() -> None:
    assert SLERP().needs == frozenset()
    assert SLERP(of="task_vectors").needs == {"base"}
    bare = dataclasses.replace(random_slice(), base=None)
    with pytest.raises(InputError, match=r"^base: must be given .* 'w'"):
        SLERP(of="task_vectors")(bare)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", ["weights", "task_vectors"])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_what_is_not_finite_shows(bad: float, of: str, t: float) -> None:
    method = SLERP(t, of=of)  # type: ignore[arg-type]
    for model in range(3 if of == "task_vectors" else 2):
        p = random_slice()
        models: list[Tensor] = [*p.experts, p.require_base()]
        models[model][4] = bad
        assert not bool(method(p)[4].isfinite())
    near = turned(0.0)
    near.experts[1][1] = bad
    assert not bool(method(dataclasses.replace(near, base=torch.zeros(2)))[1].isfinite())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1.5}, r"^SLERP\.weight: .*between 0 and 1; got 1\.5"),
        ({"threshold": -0.1}, r"^SLERP\.threshold: .*between 0 and 1"),
        ({"of": "experts"}, r"^SLERP\.of: .*'weights', 'task_vectors'; got 'experts'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SLERP(**settings)  # type: ignore[arg-type]
