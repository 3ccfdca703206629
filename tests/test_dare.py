"""DARE against its definition, and the statistics of its random numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods import DARE, ParameterSlice
from lit_merge.methods.method import looking_at

SIZE = 100_000


def ones(task: str = "a", name: str = "w", size: int = SIZE) -> ParameterSlice:
    return ParameterSlice(name, (task,), (torch.ones(size),), base=torch.zeros(size))


def mask(p: ParameterSlice, density: float = 0.3, seed: int = 0) -> Tensor:
    return DARE(density, seed=seed, rescale="none")(p)


def chunks(p: ParameterSlice, size: int) -> list[ParameterSlice]:
    return [
        dataclasses.replace(
            p,
            experts=tuple(e[start : start + size] for e in p.experts),
            base=p.require_base()[start : start + size],
            start=start,
            shape=p.require_base().shape,
        )
        for start in range(0, p.require_base().numel(), size)
    ]


@pytest.mark.parametrize("size", [1, 7, 64, 4096])
@pytest.mark.parametrize("rescale", ["density", "none", "norm"])
def test_chunks_drop_the_same_entries(size: int, rescale: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    whole = ParameterSlice(
        "w",
        ("a", "b"),
        tuple(torch.randn(1001, generator=generator) for _ in range(2)),
        base=torch.randn(1001, generator=generator),
    )
    method = DARE(0.4, rescale=rescale, seed=3)
    pieces = chunks(whole, size)
    fact = method.survey(looking_at(pieces))
    merged = torch.cat([method(dataclasses.replace(p, fact=fact)) for p in pieces])
    if rescale == "norm":  # sums of other pieces round in other places
        torch.testing.assert_close(merged, method(whole), rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(merged, method(whole))


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9])
def test_the_kept_share_is_binomial(density: float) -> None:
    for seed in range(3):
        share = float(mask(ones(), density, seed).mean())
        assert abs(share - density) < 5 * (density * (1 - density) / SIZE) ** 0.5


def test_seeds_tasks_and_tensors_are_independent() -> None:
    rows = torch.stack([mask(ones(t, n), 0.5, s) for t in "ab" for n in "wv" for s in (0, 1)])
    correlation = torch.corrcoef(rows) - torch.eye(8)
    assert correlation.abs().max() < 5 / SIZE**0.5
    along = torch.corrcoef(torch.stack([rows[0, :-1], rows[0, 1:]]))[0, 1]
    assert along.abs() < 5 / SIZE**0.5


def test_a_task_drops_the_same_whatever_tasks_are_beside_it() -> None:
    alone = mask(ones("b"))
    together = ParameterSlice(
        "w", ("a", "b"), (torch.zeros(SIZE), torch.ones(SIZE)), base=torch.zeros(SIZE)
    )
    assert torch.equal(mask(together), alone)


def test_the_mean_over_seeds_is_task_arithmetic() -> None:
    generator = torch.Generator().manual_seed(1)
    p = ParameterSlice(
        "w",
        ("a", "b"),
        tuple(torch.randn(50, generator=generator) for _ in range(2)),
        base=torch.randn(50, generator=generator),
    )
    base = p.require_base()
    scale = {"a": 0.5, "b": -1.0}
    runs = torch.stack([DARE(0.4, scale, seed=seed)(p) for seed in range(2000)]).double()
    expected = base + 0.5 * (p.experts[0] - base) - (p.experts[1] - base)
    standard_error = runs.std(0) / 2000**0.5
    assert bool(((runs.mean(0) - expected).abs() < 5 * standard_error).all())


@pytest.mark.parametrize("combine", ["linear", "ties"])
def test_the_norm_of_every_tensor_can_be_kept(combine: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    p = ParameterSlice(
        "w",
        ("a",),
        (torch.randn(1000, generator=generator),),
        base=torch.zeros(1000),
    )
    method = DARE(0.2, rescale="norm", combine=combine)
    fact = method.survey(looking_at(chunks(p, 300)))
    result = method(dataclasses.replace(p, fact=fact))
    assert float(result.abs().sum()) == pytest.approx(float(p.experts[0].abs().sum()), rel=1e-5)
    dropped = float((result == 0).float().mean())
    assert 0.7 < dropped < 0.9


def test_ties_merge_what_is_left_by_the_elected_sign() -> None:
    p = ParameterSlice(
        "w",
        ("a", "b"),
        (torch.full((SIZE,), 2.0), torch.full((SIZE,), -3.0)),
        base=torch.zeros(SIZE),
    )
    result = DARE(0.5, combine="ties")(p)
    a = mask(dataclasses.replace(p, tasks=("a",), experts=(torch.ones(SIZE),)), 0.5)
    b = mask(dataclasses.replace(p, tasks=("b",), experts=(torch.ones(SIZE),)), 0.5)
    # both: −6 outweighs 4; one: that one; none: nothing
    assert torch.equal(result, torch.where(b == 1, -6.0, 4.0 * a))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, r"^DARE\.density: must be a finite number between"),
        ({"rescale": True}, r"^DARE\.rescale: must be one of 'density', 'norm', 'none'"),
        ({"combine": "sum"}, r"^DARE\.combine: must be one of"),
        ({"sign": "most"}, r"^DARE\.sign: must be one of"),
        ({"weigh": "all"}, r"^DARE\.weigh: must be one of"),
        ({"divide": "two"}, r"^DARE\.divide: must be one of"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DARE(**settings)


def test_a_scale_for_every_task_is_asked_for() -> None:
    with pytest.raises(InputError, match=r"^DARE\.scale: must have a number for every task"):
        DARE(scale={"a": 1.0}).check_tasks(("a", "b"))
