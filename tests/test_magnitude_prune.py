"""Pruning by magnitude against a full sort on Python numbers."""

from __future__ import annotations

import dataclasses
from itertools import chain

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.methods import MagnitudePrune, ParameterSlice
from lit_merge.methods.method import looking_at
from lit_merge.methods.order_statistics import Scope

SHAPES = {"a": (30, 11), "b": (30,), "c": (5, 2, 3)}
SCALES = {"x": 0.5, "y": -1.0}


def pieces() -> list[ParameterSlice]:
    generator = torch.Generator().manual_seed(2)
    return [
        ParameterSlice(
            name,
            ("x", "y"),
            tuple(torch.randn(shape, generator=generator) * size for _ in SCALES),
            base=torch.randn(shape, generator=generator),
        )
        for size, (name, shape) in enumerate(SHAPES.items(), start=1)
    ]


def by_sorting(bases: list[float], experts: list[list[float]], density: float) -> list[float]:
    merged = list(bases)
    for expert, scale in zip(experts, SCALES.values(), strict=True):
        vector = [e - b for e, b in zip(expert, bases, strict=True)]
        order = sorted(range(len(bases)), key=lambda i: -abs(vector[i]))
        for i in order[: int(density * len(bases))]:
            merged[i] += scale * vector[i]
    return merged


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_the_largest_entries_are_added_up(density: float, scope: Scope) -> None:
    method = MagnitudePrune(density, SCALES, scope=scope)
    slices = pieces()
    fact = method.survey(looking_at(slices))
    results = [method(dataclasses.replace(p, fact=fact)).flatten().tolist() for p in slices]
    flat = [
        (p.require_base().flatten().tolist(), [e.flatten().tolist() for e in p.experts])
        for p in slices
    ]
    if scope == "tensor":
        expected = [by_sorting(base, experts, density) for base, experts in flat]
        for result, wanted in zip(results, expected, strict=True):
            assert result == pytest.approx(wanted, abs=1e-5)
    else:
        base = list(chain.from_iterable(base for base, _ in flat))
        experts = [list(chain.from_iterable(e[t] for _, e in flat)) for t in range(2)]
        result = list(chain.from_iterable(results))
        assert result == pytest.approx(by_sorting(base, experts, density), abs=1e-5)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InputError, match=r"^MagnitudePrune\.density: must be a finite number betw"):
        MagnitudePrune(-0.1)
    with pytest.raises(InputError, match=r"^MagnitudePrune\.scope: must be one of"):
        MagnitudePrune(scope="row")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^MagnitudePrune\.scale: must have a number for every"):
        MagnitudePrune(scale={"a": 1.0}).check_tasks(("a", "b"))
