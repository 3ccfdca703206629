"""What every merge method must hold, whatever it computes."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Iterator

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from lit_merge import methods
from lit_merge.errors import InputError
from lit_merge.methods import (
    TIES,
    Average,
    FisherAverage,
    GradientMatching,
    MergeMethod,
    ParameterSlice,
    TaskArithmetic,
    WeightedAverage,
)
from lit_merge.methods.method import looking_at

TASKS = ("svhn", "dtd", "mnist")
METHODS = [
    Average(),
    WeightedAverage({"svhn": 1.0, "dtd": 2.0, "mnist": 0.5}),
    TaskArithmetic(0.4),
    TaskArithmetic({"svhn": 1.0, "dtd": -0.5, "mnist": 0.2}),
    TIES(density=0.3, scale=0.7),
    TIES(density=0.3, scope="tensor", sign="frequency"),
    FisherAverage(),
    FisherAverage({"svhn": 1.0, "dtd": 2.0, "mnist": 0.5}, floor=0.0),
    GradientMatching(),
    GradientMatching({"svhn": 1.0, "dtd": -0.01, "mnist": 0.2}, damping=0.5, base_scale=0.1),
]
IDENTITIES = [  # with one expert they return it, bit for bit
    Average(),
    WeightedAverage([3.0]),
    TaskArithmetic(),
    TIES(density=1.0),
    FisherAverage(),
    GradientMatching(),
    GradientMatching(damping=0.0),
]
NAMES = {"encoder.weight": (7, 11), "encoder.bias": (7,), "scale": ()}


def named(method: MergeMethod) -> str:
    return repr(method)


def slices(
    dtype: torch.dtype = torch.float32, tasks: tuple[str, ...] = TASKS
) -> list[ParameterSlice]:
    generator = torch.Generator().manual_seed(5)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        ParameterSlice(
            name,
            tasks,
            experts=tuple(normal(shape) for _ in tasks),
            base=normal(shape),
            hessians=tuple(normal(shape) ** 2 for _ in tasks),
            base_hessian=normal(shape) ** 2,
        )
        for name, shape in NAMES.items()
    ]


def chunks(p: ParameterSlice, size: int) -> Iterator[ParameterSlice]:
    def flat(tensors: tuple[Tensor, ...] | None, start: int) -> tuple[Tensor, ...]:
        assert tensors is not None
        return tuple(tensor.flatten()[start : start + size] for tensor in tensors)

    assert p.base is not None
    assert p.base_hessian is not None
    for start in range(0, p.base.numel(), size):
        yield dataclasses.replace(
            p,
            experts=flat(p.experts, start),
            hessians=flat(p.hessians, start),
            base=p.base.flatten()[start : start + size],
            base_hessian=p.base_hessian.flatten()[start : start + size],
        )


def merged(method: MergeMethod, pieces: list[ParameterSlice]) -> list[Tensor]:
    fact = method.survey(looking_at(pieces))
    return [method(dataclasses.replace(p, fact=fact)) for p in pieces]


def permuted(p: ParameterSlice, order: list[int]) -> ParameterSlice:
    assert p.hessians is not None
    return dataclasses.replace(
        p,
        tasks=tuple(p.tasks[i] for i in order),
        experts=tuple(p.experts[i] for i in order),
        hessians=tuple(p.hessians[i] for i in order),
    )


def test_every_exported_method_is_under_these_laws() -> None:
    exported = {getattr(methods, name) for name in methods.__all__}
    concrete = {
        kind for kind in exported if issubclass(kind, MergeMethod) and kind is not MergeMethod
    }
    assert concrete == {type(method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS, ids=named)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_chunks_merge_to_the_same_bits_as_whole_tensors(method: MergeMethod, size: int) -> None:
    assert method.elementwise
    whole = merged(method, slices())
    pieces = [list(chunks(p, size)) for p in slices()]
    fact = method.survey(looking_at(chunk for piece in pieces for chunk in piece))
    for expected, piece in zip(whole, pieces, strict=True):
        result = torch.cat([method(dataclasses.replace(chunk, fact=fact)) for chunk in piece])
        assert torch.equal(result, expected.flatten())


@pytest.mark.parametrize("method", IDENTITIES, ids=named)
def test_merging_one_expert_returns_it(method: MergeMethod) -> None:
    pieces = slices(tasks=("svhn",))
    for p, result in zip(pieces, merged(method, pieces), strict=True):
        assert torch.equal(result, p.experts[0])


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_experts_that_equal_the_base_merge_to_the_base(method: MergeMethod) -> None:
    for p in slices(torch.float64):
        assert p.base is not None
        still = dataclasses.replace(p, experts=(p.base,) * 3)
        torch.testing.assert_close(merged(method, [still])[0], p.base, rtol=0, atol=1e-15)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_the_order_of_experts_does_not_matter(method: MergeMethod) -> None:
    pieces = slices(torch.float64)
    shuffled = [permuted(p, [2, 0, 1]) for p in pieces]
    for expected, result in zip(merged(method, pieces), merged(method, shuffled), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS, ids=named)
def test_shape_and_dtype_are_kept(method: MergeMethod, dtype: torch.dtype) -> None:
    for result, shape in zip(merged(method, slices(dtype)), NAMES.values(), strict=True):
        assert result.dtype == dtype
        assert result.shape == shape


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_inputs_are_left_as_they_were(method: MergeMethod) -> None:
    pieces = slices()
    results = merged(method, pieces)
    for p, fresh, result in zip(pieces, slices(), results, strict=True):
        for left, right in zip(
            (p.base, p.base_hessian, *p.experts, *(p.hessians or ())),
            (fresh.base, fresh.base_hessian, *fresh.experts, *(fresh.hessians or ())),
            strict=True,
        ):
            assert left is not None
            assert right is not None
            assert torch.equal(left, right)
            assert result.data_ptr() != left.data_ptr()


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_float32_is_as_good_as_float64_rounded(method: MergeMethod) -> None:
    for single, double in zip(
        merged(method, slices()), merged(method, slices(torch.float64)), strict=True
    ):
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_methods_survive_pickling(method: MergeMethod) -> None:
    assert pickle.loads(pickle.dumps(method)) == method


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_methods_survive_a_round_trip_through_yaml(method: MergeMethod) -> None:
    parser = ArgumentParser()
    parser.add_argument("--method", type=MergeMethod)
    settings = {
        field.name: getattr(method, field.name)
        for field in dataclasses.fields(method)  # type: ignore[arg-type]
    }
    given = parser.parse_object(
        {"method": {"class_path": type(method).__name__, "init_args": settings}}
    )
    text = parser.dump(given)
    read = parser.instantiate_classes(parser.parse_string(text)).method
    assert read == method
    assert re.search(rf"class_path: lit_merge[\w.]*\.{type(method).__name__}\n", text)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_methods_say_what_they_need(method: MergeMethod) -> None:
    with_needs = [
        dataclasses.replace(
            p,
            base=p.base if "base" in method.needs else None,
            hessians=p.hessians if "hessian" in method.needs else None,
            base_hessian=p.base_hessian if "hessian" in method.needs else None,
        )
        for p in slices()
    ]
    for expected, result in zip(merged(method, slices()), merged(method, with_needs), strict=True):
        assert torch.equal(result, expected)
    bare = dataclasses.replace(slices()[0], base=None, hessians=None)
    if "base" in method.needs:
        with pytest.raises(InputError, match=r"^base: must be given .*'encoder\.weight'"):
            method(bare)
    elif "hessian" in method.needs:
        with pytest.raises(InputError, match=r"^hessians: must be given .*'encoder\.weight'"):
            method(bare)


def test_gradient_matching_asks_for_hessians_beside_a_base() -> None:
    p = dataclasses.replace(slices()[0], hessians=None)
    with pytest.raises(InputError, match=r"^hessians: must be given .*'encoder\.weight'"):
        GradientMatching()(p)
