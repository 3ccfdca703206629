"""DELLA against its definition entry by entry, and the statistics of what it keeps."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch

from lit_merge.counter import key_of, uniforms_from
from lit_merge.errors import InputError
from lit_merge.methods import DELLA, ParameterSlice
from lit_merge.methods.della import keep_probabilities

CPU = torch.device("cpu")


def piece(shape: tuple[int, ...], tasks: tuple[str, ...] = ("a",)) -> ParameterSlice:
    generator = torch.Generator().manual_seed(4)
    experts = tuple(torch.randn(shape, generator=generator) for _ in tasks)
    return ParameterSlice("w", tasks, experts, base=torch.zeros(shape))


def test_probabilities_are_linear_in_the_rank_by_hand() -> None:
    vectors = torch.tensor([[3.0, -1.0, 2.0], [0.1, -0.3, 0.2]])
    expected = torch.tensor([[0.8, 0.2, 0.5], [0.2, 0.8, 0.5]])
    torch.testing.assert_close(keep_probabilities(vectors, 0.5, 0.3), expected)
    assert keep_probabilities(torch.ones(3, 1), 0.5, 0.3).tolist() == [[0.5]] * 3


def test_blocks_of_rows_are_ranked_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.randn(7, 30, generator=torch.Generator().manual_seed(1))
    whole = keep_probabilities(vectors, 0.5, 0.3)
    monkeypatch.setattr("lit_merge.methods.della._BLOCK", 64)
    assert torch.equal(keep_probabilities(vectors, 0.5, 0.3), whole)


@pytest.mark.parametrize("ranks", ["row", "tensor"])
@pytest.mark.parametrize("shape", [(40, 30), (20,), (6, 5, 2, 2), ()])
def test_what_stays_is_divided_by_its_own_probability(
    shape: tuple[int, ...], ranks: Literal["row", "tensor"]
) -> None:
    p = piece(shape)
    method = DELLA(0.5, 0.3, seed=7, ranks=ranks, combine="linear")
    result = method(p).flatten().tolist()
    values = p.experts[0].flatten().tolist()
    row = len(values) // shape[0] if ranks == "row" and len(shape) > 1 else len(values)
    uniforms = uniforms_from(key_of(7, "a", "w"), 0, len(values), CPU).tolist()
    for i, (value, u, got) in enumerate(zip(values, uniforms, result, strict=True)):
        mine = values[i // row * row : (i // row + 1) * row]
        rank = sum(abs(x) < abs(value) for x in mine)
        keep = 0.2 + 0.6 * rank / (row - 1) if row > 1 else 0.5
        if abs(u - keep) > 1e-6:
            assert got == pytest.approx(value / keep if u < keep else 0.0, rel=1e-5)


def test_the_mean_over_seeds_is_the_task_vector() -> None:
    p = piece((4, 10))
    runs = torch.stack(
        [DELLA(0.5, 0.4, seed=seed, combine="linear")(p) for seed in range(2000)]
    ).double()
    error = (runs.mean(0) - p.experts[0]).abs()
    assert bool((error <= 5 * runs.std(0) / 2000**0.5).all())


def test_the_norm_can_be_kept() -> None:
    p = piece((40, 30))
    result = DELLA(0.4, 0.2, rescale="norm")(p)
    assert float(result.abs().sum()) == pytest.approx(float(p.experts[0].abs().sum()), rel=1e-5)


def test_left_as_they_are_the_kept_entries_are_elected_as_by_ties() -> None:
    p = piece((40, 30), ("a", "b"))
    alone = [
        DELLA(rescale="none", combine="linear")(
            dataclasses.replace(p, tasks=(task,), experts=(expert,))
        )
        for task, expert in zip(p.tasks, p.experts, strict=True)
    ]
    result = DELLA(rescale="none")(p).flatten().tolist()
    for a, b, got in zip(*(x.flatten().tolist() for x in alone), result, strict=True):
        sign = 1 if a + b >= 0 else -1
        agreeing = [x for x in (a, b) if x * sign > 0]
        assert got == pytest.approx(sum(agreeing) / max(len(agreeing), 1), abs=1e-6)


def test_an_empty_tensor_stays_empty() -> None:
    assert DELLA()(piece((0, 3))).shape == (0, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.1}, r"^DELLA\.density - window: must be a finite number of at least"),
        ({"density": 0.9}, r"^DELLA\.density \+ window: must be a finite number of at most"),
        ({"density": 2.0}, r"^DELLA\.density: must be a finite number between"),
        ({"window": -0.1}, r"^DELLA\.window: must be a finite number between"),
        ({"ranks": "column"}, r"^DELLA\.ranks: must be one of"),
        ({"rescale": "density"}, r"^DELLA\.rescale: must be one of"),
        ({"combine": "sum"}, r"^DELLA\.combine: must be one of"),
        ({"sign": "most"}, r"^DELLA\.sign: must be one of"),
        ({"weigh": "all"}, r"^DELLA\.weigh: must be one of"),
        ({"divide": "two"}, r"^DELLA\.divide: must be one of"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DELLA(**settings)


def test_a_scale_for_every_task_is_asked_for() -> None:
    with pytest.raises(InputError, match=r"^DELLA\.scale: must have a number for every task"):
        DELLA(scale={"a": 1.0}).check_tasks(("a", "b"))
