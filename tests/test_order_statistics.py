"""Order statistics of task vectors against sorting them whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_merge.methods import ParameterSlice, order_statistics
from lit_merge.methods.method import looking_at
from lit_merge.methods.order_statistics import kth_magnitudes, trimmed

SIZE = 200_000


def values(seed: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(SIZE, generator=generator)
    if kind == "binades":  # sixty of them, and many equal numbers
        normal *= 2.0 ** torch.randint(-30, 30, (SIZE,), generator=generator)
        normal[::7] = 0.125
    elif kind == "rounded":  # few distinct numbers, as between two bf16 checkpoints
        normal = (normal * 4).round() / 4
    elif kind == "zeros":
        normal[torch.rand(SIZE, generator=generator) < 0.9] = 0
    elif kind == "drift":  # the first slices, of which the sample is, tell nothing of the others
        normal *= torch.logspace(-6, 6, SIZE)
    return normal


def sliced(experts: list[Tensor], size: int, shape: bool = True) -> list[ParameterSlice]:
    tasks = tuple(str(i) for i in range(len(experts)))
    return [
        ParameterSlice(
            "w",
            tasks,
            tuple(e[start : start + size] for e in experts),
            base=torch.zeros_like(experts[0][start : start + size]),
            start=start,
            shape=(experts[0].numel(),) if shape else None,
        )
        for start in range(0, experts[0].numel(), size)
    ]


def counting(slices: Iterable[ParameterSlice]) -> tuple[Any, list[int]]:
    """Return passes over slices, and the list to which each pass adds how many it looked at."""
    look_at_all = looking_at(slices)
    passes: list[int] = []

    def counted(look: Callable[[ParameterSlice], Any], every: int = 1) -> Iterable[tuple[str, Any]]:
        passes.append(0)
        for found in look_at_all(look, every):
            passes[-1] += 1
            yield found

    return counted, passes


@pytest.mark.parametrize("kind", ["normal", "binades", "rounded", "zeros", "drift"])
@pytest.mark.parametrize("share", [0.0001, 0.02, 0.2, 0.5, 0.95, 1.0])
def test_thresholds_are_those_of_a_full_sort(share: float, kind: str) -> None:
    experts = [values(seed, kind) for seed in (1, 2)]
    found = kth_magnitudes(
        looking_at(sliced(experts, 999)), lambda size: (int(share * size),), "global"
    )
    expected = tuple(
        (float(np.sort(np.abs(e.numpy()))[::-1][int(share * SIZE) - 1]),) for e in experts
    )
    assert found == {"": expected}


@pytest.mark.parametrize("kind", ["normal", "binades", "rounded", "zeros", "drift"])
@pytest.mark.parametrize("size", [2000, 4096, 70_000, SIZE])
def test_thresholds_do_not_depend_on_the_slices_or_what_is_known_of_them(
    size: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few entries are kept before they are counted, in few bins: as in a model a thousand times
    # this one's size.
    monkeypatch.setattr(order_statistics, "_COLLECTED", 300)
    monkeypatch.setattr(order_statistics, "_BINS", 1 << 12)
    experts = [values(seed, kind) for seed in (1, 2)]

    def ranks(count: int) -> tuple[int, int]:
        return count // 5, count // 2

    expected = tuple(
        tuple(float(np.sort(np.abs(e.numpy()))[::-1][k - 1]) for k in ranks(SIZE)) for e in experts
    )
    for shape in (True, False):
        found = kth_magnitudes(looking_at(sliced(experts, size, shape)), ranks, "global")
        assert found == {"": expected}


def test_a_sample_and_one_pass_are_enough_for_even_slices() -> None:
    look_at_all, passes = counting(sliced([values(3, "normal")], 1000))
    kth_magnitudes(look_at_all, lambda size: (size // 5,), "global")
    assert passes == [13, 200]


def test_a_misleading_sample_costs_passes_and_no_exactness() -> None:
    drift = values(3, "drift")
    look_at_all, passes = counting(sliced([drift], 70_000))
    found = kth_magnitudes(look_at_all, lambda size: (size // 2,), "global")
    assert found == {"": ((float(np.sort(np.abs(drift.numpy()))[SIZE // 2]),),)}
    assert passes == [1, 3, 3]


def test_every_tensor_is_a_group_of_its_own() -> None:
    slices = [
        ParameterSlice(name, ("a",), (torch.arange(1.0, size + 1),), base=torch.zeros(size))
        for name, size in (("x", 10), ("empty", 0), ("y", 1000))
    ]
    found = kth_magnitudes(looking_at(slices), lambda size: (size // 10, 0), "tensor")
    assert found == {
        "x": ((10.0, math.inf),),
        "empty": ((math.inf, math.inf),),
        "y": ((901.0, math.inf),),
    }


def test_infinity_is_the_largest_and_nan_the_smallest() -> None:
    expert = torch.tensor([math.nan, -math.inf, 2.0, 0.0, -3.0])
    p = ParameterSlice("w", ("a",), (expert,), base=torch.zeros(5))
    found = kth_magnitudes(looking_at([p]), lambda size: range(1, size + 1), "global")
    assert found == {"": ((math.inf, 3.0, 2.0, 0.0, 0.0),)}


@pytest.mark.parametrize("kind", ["normal", "rounded", "zeros"])
def test_on_a_device_slices_are_split_as_on_the_cpu(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = sliced([values(seed, kind) for seed in (1, 2)], 5000)
    expected = kth_magnitudes(looking_at(slices), lambda size: (size // 3,), "global")
    monkeypatch.setattr(order_statistics, "_split", order_statistics._split_on_device)
    assert kth_magnitudes(looking_at(slices), lambda size: (size // 3,), "global") == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [1, 2, 0x3F800000, 0x3F800001, 0x7F7FFFFF, 0x7F800000, 0])
def test_trimming_keeps_what_is_not_below_once_it_is_rounded(bits: int, dtype: torch.dtype) -> None:
    threshold = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    near = [threshold.to(dtype)]
    for _ in range(2):
        near = [torch.nextafter(near[0], torch.tensor(0.0, dtype=dtype)), *near]
        near.append(torch.nextafter(near[-1], torch.tensor(math.inf, dtype=dtype)))
    if dtype == torch.float64 and 0 < bits < 0x7F800000:
        below = torch.tensor(bits - 1, dtype=torch.int32).view(torch.float32).double()
        half = (threshold.double() + below) / 2
        near += [half, *(torch.nextafter(half, torch.tensor(x).double()) for x in (0.0, math.inf))]
    vector = torch.stack(near)
    vector = torch.cat([vector, -vector])
    kept = vector.to(torch.float32).abs() >= threshold
    expected = torch.where(kept | vector.isinf(), vector, 0.0)
    assert torch.equal(trimmed(vector, threshold.item()), expected)


def test_trimming_never_hides_what_is_not_finite() -> None:
    vector = torch.tensor([math.nan, math.inf, -math.inf, 1e38])
    result = trimmed(vector, math.inf)
    assert result[0].isnan()
    assert result[1:].tolist() == [math.inf, -math.inf, 0.0]
