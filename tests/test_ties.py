from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods import TIES, ParameterSlice
from lit_merge.methods.method import looking_at
from tests.references import ties_by_sorting

Sign = Literal["total", "frequency"]
SHAPES = {"a": (30, 11), "b": (30,), "c": (5, 2, 3)}


def pieces(num_experts: int = 3, dtype: torch.dtype = torch.float32) -> list[ParameterSlice]:
    generator = torch.Generator().manual_seed(2)
    tasks = tuple(f"task{i}" for i in range(num_experts))
    return [
        ParameterSlice(
            name,
            tasks,
            experts=tuple(
                torch.randn(shape, generator=generator).to(dtype) * 10.0**scale
                for scale in range(num_experts)
            ),
            base=torch.randn(shape, generator=generator).to(dtype),
        )
        for name, shape in SHAPES.items()
    ]


def surveyed(method: TIES, slices: list[ParameterSlice]) -> list[Tensor]:
    fact = method.survey(looking_at(slices))
    return [method(dataclasses.replace(p, fact=fact)) for p in slices]


def flat(tensors: list[Tensor]) -> list[float]:
    return torch.cat([tensor.double().flatten() for tensor in tensors]).tolist()


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.2, 0.77, 1.0])
def test_global_scope_agrees_with_a_full_sort_of_the_whole_task_vector(
    density: float, sign: Sign
) -> None:
    slices = pieces(dtype=torch.float64)
    method = TIES(density, scale=0.7, sign=sign)
    expected = ties_by_sorting(
        flat([p.require_base() for p in slices]),
        [flat([p.experts[i] for p in slices]) for i in range(3)],
        density=density,
        scale=0.7,
        frequency=sign == "frequency",
    )
    result = flat(surveyed(method, slices))
    torch.testing.assert_close(torch.tensor(result), torch.tensor(expected))


def test_the_published_steps_by_hand() -> None:
    p = ParameterSlice(
        "w",
        ("a", "b"),
        experts=(
            torch.tensor([4.0, -3.0, 2.0, 0.1, 0.0, 1.0]),
            torch.tensor([-1.0, -5.0, 4.0, 0.2, 3.0, 0.3]),
        ),
        base=torch.zeros(6),
    )
    # half of the entries: a keeps 4 −3 2, b keeps −5 4 3
    expected = torch.tensor([4.0, -4.0, 3.0, 0.0, 3.0, 0.0])
    torch.testing.assert_close(TIES(0.5)(p), expected)
    torch.testing.assert_close(TIES(0.5, scale=0.5)(p), expected / 2)


def test_an_even_vote_elects_plus() -> None:
    p = ParameterSlice(
        "w", ("a", "b"), (torch.tensor([3.0]), torch.tensor([-5.0])), base=torch.zeros(1)
    )
    assert TIES(1.0, sign="frequency")(p).item() == 3.0
    assert TIES(1.0, sign="total")(p).item() == -5.0


def test_entries_that_equal_the_smallest_kept_one_are_all_kept() -> None:
    expert = torch.tensor([1.0, -1.0, 1.0, 0.5, 2.0])
    p = ParameterSlice("w", ("a",), (expert,), base=torch.zeros(5))
    kept = torch.tensor([1.0, -1.0, 1.0, 0.0, 2.0])
    assert torch.equal(TIES(0.4)(p), kept)  # the two largest: 2 and one of three equals


def test_density_zero_returns_the_base() -> None:
    for p in pieces():
        assert torch.equal(TIES(0.0)(p), p.require_base())


def test_scopes_differ_when_tensors_move_by_different_amounts() -> None:
    slices = pieces()
    moved = [
        dataclasses.replace(p, experts=tuple(p.require_base() + step for expert in p.experts))
        for p, step in zip(slices, (1.0, 0.1, 0.01), strict=True)
    ]
    everywhere = surveyed(TIES(0.2, scope="tensor"), moved)
    largest = surveyed(TIES(0.2, scope="global"), moved)
    assert not torch.equal(everywhere[2], moved[2].require_base())
    assert torch.equal(largest[2], moved[2].require_base())


def test_one_more_entry_is_kept_as_in_the_authors_code() -> None:
    expert = torch.arange(1.0, 11.0)
    p = ParameterSlice("w", ("a",), (expert,), base=torch.zeros(10))
    kept = [int(TIES(0.25, keep=keep)(p).count_nonzero()) for keep in ("floor", "floor+1")]
    assert kept == [2, 3]
    assert torch.equal(TIES(1.0, keep="floor+1")(p), expert)


def test_weights_are_taken_by_task_name() -> None:
    p = dataclasses.replace(pieces(2)[0], tasks=("a", "b"))
    by_name = TIES(1.0, weights={"b": 3.0, "a": 0.5})(p)
    assert torch.equal(by_name, TIES(1.0, weights=[0.5, 3.0])(p))
    with pytest.raises(InputError, match=r"^TIES\.weights: must have a number for every task"):
        TIES(weights={"a": 1.0}).check_tasks(("a", "b"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 1.5}, r"^TIES\.density: must be a finite number between 0 and 1"),
        ({"scope": "row"}, r"^TIES\.scope: must be one of"),
        ({"sign": "most"}, r"^TIES\.sign: must be one of"),
        ({"weigh": "all"}, r"^TIES\.weigh: must be one of"),
        ({"divide": "two"}, r"^TIES\.divide: must be one of"),
        ({"keep": "ceil"}, r"^TIES\.keep: must be one of"),
        ({"weights": [math.nan]}, r"^TIES\.weights\[0\]: must be a finite number"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TIES(**settings)
