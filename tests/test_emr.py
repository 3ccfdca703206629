"""EMR against loops over entries on Python numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.methods import EMR, ParameterSlice
from lit_merge.methods.method import looking_at

TASKS = ("a", "b", "c")


def unified(column: tuple[float, ...]) -> float:
    sign = 1 if math.fsum(column) > 0 else -1
    return sign * max((abs(x) for x in column if x * sign > 0), default=0.0)


def pieces() -> list[ParameterSlice]:
    generator = torch.Generator().manual_seed(2)
    return [
        ParameterSlice(
            name,
            TASKS,
            tuple(torch.randn(size, generator=generator, dtype=torch.float64) for _ in TASKS),
            base=torch.randn(size, generator=generator, dtype=torch.float64),
        )
        for name, size in (("x", 40), ("y", 7), ("empty", 0))
    ]


def columns_of(p: ParameterSlice) -> list[tuple[float, ...]]:
    return list(zip(*((e - p.require_base()).tolist() for e in p.experts), strict=True))


def test_every_pattern_of_signs_is_unified_and_masked_as_by_hand() -> None:
    columns = list(itertools.product([0.0, 1.0, -1.0, 0.5, -2.0, 0.125], repeat=3))
    experts = tuple(torch.tensor(columns).T.contiguous().unbind())
    p = ParameterSlice("w", TASKS, experts, base=torch.zeros(len(columns)))
    wanted = [unified(column) for column in columns]
    assert EMR()(p).tolist() == pytest.approx(wanted)
    for t, mask in enumerate(EMR().task_masks(p)):
        assert mask.tolist() == [
            math.copysign(1, column[t]) == math.copysign(1, whole) and 0 not in (column[t], whole)
            for column, whole in zip(columns, wanted, strict=True)
        ]


def test_entries_whose_product_is_too_small_for_a_number_are_masked_by_their_sign() -> None:
    p = ParameterSlice("w", ("a",), (torch.tensor([1e-30, -1e-30]),), base=torch.zeros(2))
    assert EMR().task_masks(p)[0].tolist() == [True, True]


@pytest.mark.parametrize("rescale", ["tensors", "entries"])
@pytest.mark.parametrize("size", [3, 100])
def test_scales_keep_the_sum_of_magnitudes(rescale: str, size: int) -> None:
    chunks = [
        dataclasses.replace(
            p,
            experts=tuple(e[start : start + size] for e in p.experts),
            base=p.require_base()[start : start + size],
        )
        for p in pieces()
        for start in range(0, max(p.require_base().numel(), 1), size)
    ]
    method = EMR(rescale=rescale)  # type: ignore[arg-type]
    fact = method.survey(looking_at(chunks))
    expected = []
    for t in range(3):
        own = masked = 0.0
        for p in pieces():
            columns = columns_of(p)
            share = 1 / max(len(columns), 1) if rescale == "tensors" else 1.0
            own += share * math.fsum(abs(c[t]) for c in columns)
            masked += share * math.fsum(abs(unified(c)) for c in columns if c[t] * unified(c) > 0)
        expected.append(own / masked)
    assert method.task_scales(fact, TASKS) == pytest.approx(expected, rel=1e-12)


def test_without_rescaling_nothing_is_read() -> None:
    method = EMR(rescale="none")
    assert method.survey(looking_at(pieces())) is None
    assert method.task_scales(None, TASKS) == (1.0, 1.0, 1.0)


def test_a_task_that_the_election_leaves_nothing_of_has_the_scale_one() -> None:
    p = ParameterSlice(
        "w", ("a", "b"), (torch.tensor([1.0]), torch.tensor([-3.0])), base=torch.zeros(1)
    )
    assert EMR().survey(looking_at([p])) == (1.0, 1.0)
    still = dataclasses.replace(p, experts=(torch.zeros(1), torch.zeros(1)))
    assert EMR().survey(looking_at([still])) == (1.0, 1.0)


def test_the_only_task_s_model_is_the_expert() -> None:
    p = dataclasses.replace(pieces()[0], tasks=("a",), experts=pieces()[0].experts[:1])
    (scale,) = EMR().task_scales(EMR().survey(looking_at([p])), ("a",))
    (mask,) = EMR().task_masks(p)
    assert scale == pytest.approx(1.0)
    assert bool(mask.all())
    assert torch.equal(EMR()(p), p.experts[0])


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InputError, match=r"^EMR\.rescale: must be one of"):
        EMR(rescale="all")  # type: ignore[arg-type]
