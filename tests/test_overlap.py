"""Overlap of experts, against loops over the weights in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.overlap import Overlap, expert_overlap, overlap_of_inputs
from lit_merge.streaming.open_inputs import inputs_in_memory
from lit_merge.streaming.pieces import CHUNK
from tests.forecast_experts import BASE, EXPERTS, HESSIANS, TASKS, inputs_of, state

LAYERS = {"emb": ("emb.weight",), "blocks.0": ("blocks.0.weight", "blocks.0.bias"), "top": ("top",)}


def vectors(task: str, names: tuple[str, ...]) -> list[float]:
    return [
        value for name in names for value in (EXPERTS[task][name] - BASE[name]).flatten().tolist()
    ]


def loop_cosine(one: list[float], other: list[float]) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


def loop_agreement(one: list[float], other: list[float]) -> float:
    both = [(a, b) for a, b in zip(one, other, strict=True) if a != 0 and b != 0]
    return sum((a > 0) == (b > 0) for a, b in both) / len(both)


@pytest.fixture(scope="module")
def overlap() -> Overlap:
    return overlap_of_inputs(inputs_of())


@pytest.mark.parametrize("layer", LAYERS)
def test_every_number_of_a_layer_is_that_of_a_loop(overlap: Overlap, layer: str) -> None:
    names, sums = LAYERS[layer], overlap.layers[layer]
    for a, b in overlap.pairs:
        one, other = vectors(TASKS[a], names), vectors(TASKS[b], names)
        assert sums.cosine(a, b) == pytest.approx(loop_cosine(one, other), rel=1e-12)
        assert sums.sign_agreement(a, b) == loop_agreement(one, other)
    for index, task in enumerate(TASKS):
        own = vectors(task, names)
        assert sums.numel == len(own)
        size = math.sqrt(sum(value * value for value in own) / len(own))
        assert sums.size(index) == pytest.approx(size, rel=1e-12)
        curvature = sum(float(HESSIANS[task][name].sum()) for name in names) / len(own)
        assert sums.mean_curvature(index) == pytest.approx(curvature, rel=1e-12)


def test_the_total_is_that_of_one_long_vector(overlap: Overlap) -> None:
    names = tuple(name for group in LAYERS.values() for name in group)
    assert list(overlap.layers) == list(LAYERS)
    assert overlap.pairs == ((0, 1), (0, 2), (1, 2))
    for a, b in overlap.pairs:
        one, other = vectors(TASKS[a], names), vectors(TASKS[b], names)
        assert overlap.total.cosine(a, b) == pytest.approx(loop_cosine(one, other), rel=1e-12)


def in_memory(experts: Mapping[str, Mapping[str, Tensor]], base: Mapping[str, Tensor]) -> Overlap:
    return overlap_of_inputs(inputs_in_memory(base, experts, None, None))


def test_pieces_of_a_long_tensor_add_up_whatever_the_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(2 * CHUNK + 7)}
    a, b = (torch.randn(2 * CHUNK + 7, generator=generator) for _ in range(2))
    inputs = inputs_in_memory(base, {"a": {"w": a}, "b": {"w": b}}, None, None)
    sums = [overlap_of_inputs(inputs, threads=threads).total for threads in (1, 3)]
    expected = float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))
    agreement = float((a.sign() == b.sign()).double().mean())
    for one in sums:
        assert one.cosine(0, 1) == pytest.approx(expected, abs=1e-6)
        assert one.sign_agreement(0, 1) == pytest.approx(agreement, rel=1e-12)
    assert sums[0].cosine(0, 1) == sums[1].cosine(0, 1)


def test_equal_and_opposite_experts_are_at_the_ends() -> None:
    move = torch.tensor([1.0, -2.0, 0.0, 4.0])
    base = {"w": torch.zeros(4)}
    total = in_memory({"a": {"w": move}, "b": {"w": 2 * move}, "c": {"w": -move}}, base).total
    assert total.cosine(0, 1) == pytest.approx(1.0)
    assert total.cosine(0, 2) == pytest.approx(-1.0)
    assert (total.sign_agreement(0, 1), total.sign_agreement(0, 2)) == (1.0, 0.0)


def test_an_unchanged_expert_has_no_cosine_and_no_signs() -> None:
    base = {"w": torch.ones(3)}
    total = in_memory({"a": {"w": torch.ones(3)}, "b": {"w": torch.zeros(3)}}, base).total
    assert total.cosine(0, 1) is None
    assert total.sign_agreement(0, 1) is None
    assert total.size(0) == 0.0


def test_without_a_base_there_is_curvature_alone_and_a_note() -> None:
    overlap = overlap_of_inputs(inputs_of(base=None))
    total = overlap.total
    assert total.mean_curvature(0) is not None
    assert (total.cosine(0, 1), total.sign_agreement(0, 1), total.size(0)) == (None, None, None)
    assert "Without the base" in overlap.notes[-1]


def test_experts_without_a_hessian_are_named_in_a_note() -> None:
    overlap = overlap_of_inputs(inputs_in_memory(BASE, EXPERTS, None, None))
    assert overlap.total.mean_curvature(0) is None
    assert overlap.total.cosine(0, 1) is not None
    assert overlap.notes == ("Curvature is left out: svhn, dtd, cars has no Hessian.",)


def test_heads_are_left_out() -> None:
    base = {"body.weight": torch.zeros(2, 2), "head.weight": torch.zeros(3, 2)}
    experts = {
        task: {"body.weight": torch.ones(2, 2), "head.weight": torch.ones(3 + extra, 2)}
        for extra, task in enumerate(("a", "b"))
    }
    assert list(in_memory(experts, base).layers) == ["body"]


def test_files_give_the_numbers_of_memory_and_a_missing_one_an_error(tmp_path: Path) -> None:
    for name, tensors in {"base": BASE, **EXPERTS}.items():
        (tmp_path / name).mkdir()
        save_file(dict(tensors), tmp_path / name / "model.safetensors")
    paths = {task: tmp_path / task for task in TASKS}
    found = expert_overlap(tmp_path / "base", paths, progress=False).total
    expected = in_memory(EXPERTS, BASE).total
    assert [found.cosine(a, b) for a, b in ((0, 1), (0, 2), (1, 2))] == [
        expected.cosine(a, b) for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    with pytest.raises(InputError, match=r"gone: must exist"):
        expert_overlap(tmp_path / "base", {**paths, "d": tmp_path / "gone"}, progress=False)


def test_values_that_are_no_numbers_are_refused_by_file_and_tensor() -> None:
    broken = {**state(1), "top": torch.tensor(math.nan, dtype=torch.float64)}
    with pytest.raises(InputError, match=r"experts\['b'\]: tensor 'top' must be finite"):
        in_memory({"a": BASE, "b": broken}, BASE)
    with pytest.raises(InputError, match=r"base: tensor 'top' must be finite"):
        in_memory({"a": BASE, "b": BASE}, broken)
