"""What every merge method must hold, whatever it computes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
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
    DARE,
    DELLA,
    EMR,
    SLERP,
    TIES,
    TSVM,
    WUDI,
    Average,
    Breadcrumbs,
    Consensus,
    FisherAverage,
    GradientMatching,
    IsoC,
    IsoCTS,
    KroneckerMatching,
    MagMax,
    MagnitudePrune,
    MaTS,
    MergeMethod,
    ModelStock,
    ParameterSlice,
    RegMean,
    TALLMasks,
    TaskArithmetic,
    WeightedAverage,
)
from lit_merge.methods.method import looking_at

TASKS = ("svhn", "dtd", "mnist")
WEIGHTS = {"svhn": 1.0, "dtd": 2.0, "mnist": 0.5}
METHODS = [
    Average(),
    WeightedAverage({"svhn": 1.0, "dtd": 2.0, "mnist": 0.5}),
    TaskArithmetic(0.4),
    TaskArithmetic({"svhn": 1.0, "dtd": -0.5, "mnist": 0.2}),
    TIES(density=0.3, scale=0.7),
    TIES(density=0.3, scope="tensor", sign="frequency"),
    TIES(0.5, keep="floor+1", weights=WEIGHTS, weigh="votes", divide="weights"),
    TIES(0.5, weights=WEIGHTS, divide="none"),
    DARE(0.5),
    DARE(0.3, WEIGHTS, seed=4, rescale="norm", combine="ties"),
    DARE(0.6, 0.4, rescale="none", combine="ties", sign="frequency", divide="none"),
    MagnitudePrune(0.3, WEIGHTS),
    MagnitudePrune(0.3, scope="tensor"),
    Breadcrumbs(0.5, 0.2, WEIGHTS),
    Breadcrumbs(0.3, 0.1, scope="global"),
    DELLA(),
    DELLA(0.6, 0.3, WEIGHTS, seed=2, ranks="tensor", rescale="norm", combine="linear"),
    MagMax(0.5),
    EMR(),
    EMR(rescale="entries"),
    TALLMasks(),
    TALLMasks(WEIGHTS, scale=0.7),
    Consensus(),
    Consensus(1, WEIGHTS, 0.3),
    FisherAverage(),
    FisherAverage({"svhn": 1.0, "dtd": 2.0, "mnist": 0.5}, floor=0.0),
    FisherAverage(WEIGHTS, floor=0.1, floor_mode="added", normalize="norm"),
    GradientMatching(),
    GradientMatching({"svhn": 1.0, "dtd": -0.01, "mnist": 0.2}, damping=0.5, base_scale=0.1),
    SLERP(),
    SLERP(of="task_vectors", threshold=0.9),
    ModelStock(),
    ModelStock(scope="model", mean="angle"),
    RegMean(),
    RegMean(0.5, ridge=0.01, weights=WEIGHTS),
    MaTS("diagonal"),
    MaTS("gram"),
    MaTS(tolerance=1e-14),
    KroneckerMatching(tolerance=1e-14),
    KroneckerMatching({"svhn": 1.0, "dtd": 0.5, "mnist": 0.2}, damping=0.5, tolerance=1e-14),
    TSVM(),
    TSVM(0.5, others="sum", share=0.4),
    IsoC(1.5),
    IsoCTS(common_fraction=0.5),
    WUDI(),
    WUDI(others="mean", solver="adam", steps=10, learning_rate=0.01),
]
IDENTITIES = [  # with one expert they return it, bit for bit
    Average(),
    WeightedAverage([3.0]),
    TaskArithmetic(),
    TIES(density=1.0),
    DARE(1.0),
    MagnitudePrune(1.0),
    Breadcrumbs(1.0, 0.0),
    MagMax(),
    EMR(),
    TALLMasks(),
    Consensus(k=1, threshold=0.0),
    FisherAverage(),
    GradientMatching(),
    GradientMatching(damping=0.0),
    RegMean(),
    MaTS("diagonal"),
    MaTS("gram"),
    MaTS(),
    KroneckerMatching(),
]
NAMES = {"encoder.weight": (7, 11), "encoder.bias": (7,), "scale": ()}


def named(method: MergeMethod) -> str:
    return repr(method)


def tasks_of(method: MergeMethod) -> tuple[str, ...]:
    return TASKS[:2] if isinstance(method, SLERP) else TASKS


def slices(
    dtype: torch.dtype = torch.float32, tasks: tuple[str, ...] = TASKS
) -> list[ParameterSlice]:
    generator = torch.Generator().manual_seed(5)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def gram(size: int) -> Tensor:
        rows = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
        return (rows.T @ rows).to(dtype)

    def factors(shape: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor], ...] | None:
        if len(shape) != 2:
            return None
        return tuple((gram(shape[1]), gram(shape[0])) for _ in tasks)

    pieces = [
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
    kronecker = [factors(shape) for shape in NAMES.values()]
    return [
        dataclasses.replace(p, kronecker=f, grams=None if f is None else tuple(a for a, _ in f))
        for p, f in zip(pieces, kronecker, strict=True)
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
            start=start,
            shape=tuple(p.base.shape),
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
        grams=None if p.grams is None else tuple(p.grams[i] for i in order),
        kronecker=None if p.kronecker is None else tuple(p.kronecker[i] for i in order),
    )


def test_every_exported_method_is_under_these_laws() -> None:
    exported = {getattr(methods, name) for name in methods.__all__}
    concrete = {
        kind for kind in exported if issubclass(kind, MergeMethod) and kind is not MergeMethod
    }
    assert concrete == {type(method) for method in METHODS}


@pytest.mark.parametrize("method", [m for m in METHODS if m.elementwise], ids=named)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_chunks_merge_to_the_same_bits_as_whole_tensors(method: MergeMethod, size: int) -> None:
    inputs = slices(tasks=tasks_of(method))
    whole = merged(method, inputs)
    pieces = [list(chunks(p, size)) for p in inputs]
    fact = method.survey(looking_at(chunk for piece in pieces for chunk in piece))
    for expected, piece in zip(whole, pieces, strict=True):
        result = torch.cat([method(dataclasses.replace(chunk, fact=fact)) for chunk in piece])
        assert torch.equal(result, expected.flatten())


@pytest.mark.parametrize(
    "method",
    # the diagonal is one setting of a method that needs whole tensors for the others
    [m for m in METHODS if not m.elementwise and m != MaTS("diagonal")],
    ids=named,
)
def test_only_methods_that_need_whole_tensors_ask_for_them(method: MergeMethod) -> None:
    weight = slices()[0]
    if method.needs & {"gram", "kronecker"}:
        with pytest.raises(InputError, match=r" of 'encoder\.weight': must be \["):
            merged(method, [next(chunks(weight, 11))])
        return
    (whole,) = merged(method, [weight])
    chunked = torch.cat([merged(method, [chunk])[0] for chunk in chunks(weight, 11)])
    assert not torch.allclose(chunked, whole.flatten(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", IDENTITIES, ids=named)
def test_merging_one_expert_returns_it(method: MergeMethod) -> None:
    pieces = slices(tasks=("svhn",))
    for p, result in zip(pieces, merged(method, pieces), strict=True):
        assert torch.equal(result, p.experts[0])


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_experts_that_equal_the_base_merge_to_the_base(method: MergeMethod) -> None:
    for p in slices(torch.float64, tasks_of(method)):
        assert p.base is not None
        still = dataclasses.replace(p, experts=(p.base,) * len(p.tasks))
        torch.testing.assert_close(merged(method, [still])[0], p.base, rtol=0, atol=1e-15)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_the_order_of_experts_does_not_matter(method: MergeMethod) -> None:
    pieces = slices(torch.float64, tasks_of(method))
    order = [2, 0, 1] if len(tasks_of(method)) == 3 else [1, 0]
    shuffled = [permuted(p, order) for p in pieces]
    for expected, result in zip(merged(method, pieces), merged(method, shuffled), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS, ids=named)
def test_shape_and_dtype_are_kept(method: MergeMethod, dtype: torch.dtype) -> None:
    for result, shape in zip(
        merged(method, slices(dtype, tasks_of(method))), NAMES.values(), strict=True
    ):
        assert result.dtype == dtype
        assert result.shape == shape


def tensors_of(p: ParameterSlice) -> tuple[Tensor | None, ...]:
    factors = [factor for pair in p.kronecker or () for factor in pair]
    return (p.base, p.base_hessian, *p.experts, *(p.hessians or ()), *(p.grams or ()), *factors)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_inputs_are_left_as_they_were(method: MergeMethod) -> None:
    pieces, untouched = slices(tasks=tasks_of(method)), slices(tasks=tasks_of(method))
    results = merged(method, pieces)
    for p, fresh, result in zip(pieces, untouched, results, strict=True):
        for left, right in zip(tensors_of(p), tensors_of(fresh), strict=True):
            assert left is not None
            assert right is not None
            assert torch.equal(left, right)
            assert result.data_ptr() != left.data_ptr()


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_float32_is_as_good_as_float64_rounded(method: MergeMethod) -> None:
    tasks = tasks_of(method)
    singles, doubles = slices(tasks=tasks), slices(torch.float64, tasks)
    for single, double in zip(merged(method, singles), merged(method, doubles), strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("method", "tasks"),
    [(m, tasks_of(m)) for m in METHODS if m.carries_nan]
    + [(m, TASKS[:1]) for m in IDENTITIES if m.carries_nan],
)
def test_what_is_not_finite_in_an_input_shows_in_the_result_or_is_refused(
    method: MergeMethod, tasks: tuple[str, ...], bad: float
) -> None:
    whole = slices(tasks=tasks)
    p = whole[0]
    inputs = [p.require_base(), *p.experts] if "base" in method.needs else [*p.experts]
    if "hessian" in method.needs:
        inputs += [*p.require_hessians()]
    for tensor in inputs:
        for place in ((0, 0), (3, 5)):
            before = tensor[place].item()
            tensor[place] = bad
            with contextlib.suppress(InputError):
                assert not merged(method, whole)[0][place].isfinite()
            tensor[place] = before


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
    inputs = slices(tasks=tasks_of(method))
    with_needs = [
        dataclasses.replace(
            p,
            base=p.base if "base" in method.needs else None,
            hessians=p.hessians if "hessian" in method.needs else None,
            base_hessian=p.base_hessian if "hessian" in method.needs else None,
            grams=p.grams if "gram" in method.needs else None,
            kronecker=p.kronecker if "kronecker" in method.needs else None,
        )
        for p in inputs
    ]
    for expected, result in zip(merged(method, inputs), merged(method, with_needs), strict=True):
        assert torch.equal(result, expected)
    bare = dataclasses.replace(inputs[0], base=None, hessians=None)
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
