"""Breadcrumbs against a full sort on Python numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.methods import Breadcrumbs, ParameterSlice
from lit_merge.methods.method import looking_at


def pieces() -> list[ParameterSlice]:
    generator = torch.Generator().manual_seed(2)
    return [
        ParameterSlice(
            name,
            ("x", "y"),
            tuple(torch.randn(size, generator=generator) * size for _ in range(2)),
            base=torch.randn(size, generator=generator),
        )
        for name, size in (("a", 200), ("b", 33), ("c", 1))
    ]


def kept(vector: list[float], density: float, outliers: float) -> list[float]:
    size = len(vector)
    order = sorted(range(size), key=lambda i: -abs(vector[i]))
    top = int(outliers * size)
    stay = set(order[top : top + int(density * size)])
    return [x if i in stay else 0.0 for i, x in enumerate(vector)]


@pytest.mark.parametrize(
    ("density", "outliers"),
    [(0.5, 0.1), (0.9, 0.1), (0.3, 0.0), (0.0, 0.2), (1.0, 0.0), (0.0, 1.0)],
)
@pytest.mark.parametrize("whole", [True, False])
def test_the_largest_and_the_smallest_entries_go(
    density: float, outliers: float, whole: bool
) -> None:
    scales = {"x": 0.5, "y": -1.0}
    method = Breadcrumbs(density, outliers, scales, scope="global" if whole else "tensor")
    slices = pieces()
    fact = method.survey(looking_at(slices))
    results = [method(dataclasses.replace(p, fact=fact)) for p in slices]
    groups = [slices] if whole else [[p] for p in slices]
    expected: list[float] = []
    for group in groups:
        base = torch.cat([p.require_base() for p in group])
        merged = base.double()
        for t, scale in enumerate(scales.values()):
            vector = (torch.cat([p.experts[t] for p in group]) - base).tolist()
            merged = merged + scale * torch.tensor(kept(vector, density, outliers)).double()
        expected += merged.tolist()
    assert torch.cat(results).tolist() == pytest.approx(expected, abs=1e-4)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InputError, match=r"^Breadcrumbs\.density \+ outliers: must be .* at most"):
        Breadcrumbs(0.9, 0.2)
    with pytest.raises(InputError, match=r"^Breadcrumbs\.density: must be a finite number between"):
        Breadcrumbs(1.1, 0.0)
    with pytest.raises(InputError, match=r"^Breadcrumbs\.outliers: must be a finite number betwee"):
        Breadcrumbs(0.1, -0.1)
    with pytest.raises(InputError, match=r"^Breadcrumbs\.scope: must be one of"):
        Breadcrumbs(scope="row")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^Breadcrumbs\.scale: must have a number for every task"):
        Breadcrumbs(scale={"a": 1.0}).check_tasks(("a", "b"))
