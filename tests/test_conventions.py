"""The settings that docs/methods.md gives for public implementations give what those compute.

PEFT is called itself; of the others the steps that were read in their code are written out here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lit_merge import methods
from lit_merge.methods import DARE, MergeMethod, ParameterSlice
from lit_merge.methods.method import looking_at

PAGE = " ".join((Path(__file__).parent.parent / "docs" / "methods.md").read_text().split())
Array = npt.NDArray[np.float64]
Model = dict[str, Array]
SHAPES = {"encoder.weight": (6, 5), "encoder.bias": (6,)}
WEIGHTS = (1.0, 2.0, 0.5)


def model(seed: int) -> Model:
    numbers = np.random.default_rng(seed)
    return {name: numbers.standard_normal(shape) for name, shape in SHAPES.items()}


BASE = model(0)
FISHERS = [{name: values**2 for name, values in model(seed).items()} for seed in (11, 12, 13)]


def experts(number: int) -> list[Model]:
    return [model(seed) for seed in range(1, number + 1)]


def task_vectors(number: int = 3) -> list[Model]:
    return [{name: e[name] - BASE[name] for name in SHAPES} for e in experts(number)]


def grams() -> list[Array]:
    inputs = [np.random.default_rng(seed).standard_normal((20, 5)) for seed in (21, 22, 23)]
    return [x.T @ x / 20 for x in inputs]


def slices(number: int = 3) -> list[ParameterSlice]:
    def tensor(values: Array) -> torch.Tensor:
        return torch.from_numpy(values.copy())

    return [
        ParameterSlice(
            name,
            ("a", "b", "c")[:number],
            experts=tuple(tensor(e[name]) for e in experts(number)),
            base=tensor(BASE[name]),
            hessians=tuple(tensor(f[name]) for f in FISHERS[:number]),
            grams=tuple(map(tensor, grams())) if name == "encoder.weight" else None,
        )
        for name in SHAPES
    ]


def on_the_page(call: str, **changed: Any) -> MergeMethod:
    """Return the method of a call that must stand on the page, with some numbers changed."""
    assert f"`{call}`" in PAGE
    names = {name: getattr(methods, name) for name in methods.__all__}
    method = dataclasses.replace(eval(call, names), **changed)
    assert isinstance(method, MergeMethod)
    return method


@pytest.fixture(scope="module")
def merge_utils() -> ModuleType:
    """PEFT's file of merge functions, without the rest of PEFT, which takes long to import."""
    package = importlib.util.find_spec("peft")
    if package is None or package.origin is None:
        pytest.skip("needs PEFT")
    path = Path(package.origin).parent / "utils" / "merge_utils.py"
    spec = importlib.util.spec_from_file_location("merge_utils", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def merged(method: MergeMethod, number: int = 3) -> Model:
    pieces = slices(number)
    fact = method.survey(looking_at(pieces))
    return {p.name: method(dataclasses.replace(p, fact=fact)).numpy() for p in pieces}


def check(result: Model, expected: Model) -> None:
    for name in SHAPES:
        np.testing.assert_allclose(result[name], expected[name], rtol=1e-10, atol=1e-12)


def per_tensor(merge: Callable[[Array, Sequence[Array]], Array], number: int = 3) -> Model:
    """Return the base plus what a function of one tensor and its task vectors gives."""
    return {
        name: BASE[name] + merge(BASE[name], [t[name] for t in task_vectors(number)])
        for name in SHAPES
    }


def flat(each: Model) -> Array:
    return np.concatenate([each[name].ravel() for name in SHAPES])


def unflat(vector: Array) -> Model:
    parts = np.split(vector, [30])
    return {n: part.reshape(s) for part, (n, s) in zip(parts, SHAPES.items(), strict=True)}


# --- TIES and what is pruned -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "reduce"),
    [
        ('TIES(density=0.2, keep="floor+1")', "mean"),
        ('TIES(density=0.2, keep="floor+1", divide="none")', "sum"),
    ],
)
def test_ties_of_its_authors(call: str, reduce: str) -> None:
    rows = np.stack([flat(t) for t in task_vectors()])
    drop = rows.shape[1] - int(rows.shape[1] * 0.7)
    for row in rows:
        row[np.abs(row) < np.sort(np.abs(row))[drop - 1]] = 0  # the authors count from one
    sign = np.sign(rows.sum(axis=0))
    agree = (np.sign(rows) == sign) & (rows != 0)
    total = (rows * agree).sum(axis=0)
    if reduce == "mean":
        total /= np.maximum(agree.sum(axis=0), 1)
    check(merged(on_the_page(call, density=0.7)), unflat(flat(BASE) + total))


def test_ties_of_mergekit() -> None:
    call = 'TIES(density=0.2, scope="tensor", divide="weights", weigh="votes")'
    method = on_the_page(call, density=0.7, weights=WEIGHTS)

    def ties(_: Array, vectors: Sequence[Array]) -> Array:
        kept = []
        for vector, weight in zip(vectors, WEIGHTS, strict=True):
            order = np.argsort(-np.abs(vector), axis=None)[: int(0.7 * vector.size)]
            mask = np.zeros(vector.size)
            mask[order] = 1
            kept.append(weight * vector * mask.reshape(vector.shape))
        sign = np.where(np.sum(kept, axis=0) >= 0, 1, -1)
        agree = [np.sign(vector) == sign for vector in kept]
        share = np.sum([w * a for w, a in zip(WEIGHTS, agree, strict=True)], axis=0)
        total = np.sum([v * a for v, a in zip(kept, agree, strict=True)], axis=0)
        return np.asarray(total / np.where(share == 0, 1, share))

    check(merged(method), per_tensor(ties))


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties_of_peft(sign: str, merge_utils: ModuleType) -> None:
    call = 'TIES(density=0.2, scope="tensor", divide="count", weigh="values")'
    method = on_the_page(call, density=0.7, weights=WEIGHTS, sign=sign)

    def ties(_: Array, vectors: Sequence[Array]) -> Array:
        tensors = [torch.from_numpy(vector) for vector in vectors]
        return np.asarray(merge_utils.ties(tensors, torch.tensor(WEIGHTS), 0.7, sign))

    check(merged(method), per_tensor(ties))


def test_magnitude_pruning_of_peft(merge_utils: ModuleType) -> None:
    method = on_the_page('MagnitudePrune(density=0.2, scope="tensor")')

    def prune(_: Array, vectors: Sequence[Array]) -> Array:
        tensors = [torch.from_numpy(vector) for vector in vectors]
        return np.asarray(merge_utils.magnitude_prune(tensors, torch.ones(3), 0.2))

    check(merged(method), per_tensor(prune))


def test_breadcrumbs_of_mergekit() -> None:
    method = on_the_page("Breadcrumbs(density=0.9, outliers=0.01)", density=0.5, outliers=0.2)

    def crumbs(_: Array, vectors: Sequence[Array]) -> Array:
        total = np.zeros_like(vectors[0])
        for vector in vectors:
            top = int(0.2 * vector.size)
            bottom = vector.size - int(0.5 * vector.size) - top
            order = np.argsort(np.abs(vector), axis=None)[bottom : vector.size - top]
            total.flat[order] += vector.flat[order]
        return total

    check(merged(method), per_tensor(crumbs))


@pytest.mark.parametrize(
    ("call", "function"),
    [
        ("DARE(density=0.1)", "dare_linear"),
        ('DARE(density=0.1, combine="ties")', "dare_ties"),
    ],
)
def test_dare_of_peft_with_our_masks(
    call: str, function: str, merge_utils: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = dict(zip("abc", WEIGHTS, strict=True))
    method = on_the_page(call, density=0.5, scale=scale)

    def pruned(tensor: torch.Tensor, density: float, method: str, rescale: bool) -> torch.Tensor:
        assert (density, method, rescale) == (0.5, "random", True)
        return tensor  # by us, before

    monkeypatch.setattr(merge_utils, "prune", pruned)
    for p in slices():
        vectors = [
            DARE(0.5)(dataclasses.replace(p, tasks=(task,), experts=(expert,))) - p.require_base()
            for task, expert in zip(p.tasks, p.experts, strict=True)
        ]
        expected = getattr(merge_utils, function)(vectors, torch.tensor(WEIGHTS), 0.5)
        torch.testing.assert_close(method(p), p.require_base() + expected)


# --- Means, angles, maxima and masks -----------------------------------------------------------


def test_task_arithmetic_of_peft(merge_utils: ModuleType) -> None:
    method = on_the_page('TaskArithmetic({"a": 0.5, "b": 0.2})')

    def add(_: Array, vectors: Sequence[Array]) -> Array:
        tensors = [torch.from_numpy(vector) for vector in vectors]
        weights = torch.tensor([0.5, 0.2], dtype=torch.float64)
        return np.asarray(merge_utils.task_arithmetic(tensors, weights))

    check(merged(method, 2), per_tensor(add, 2))


def test_linear_of_mergekit_divides_by_the_weights() -> None:
    a, b = experts(2)
    expected = {name: (a[name] + 2 * b[name]) / 3 for name in SHAPES}
    check(merged(on_the_page("WeightedAverage([1.0, 2.0])"), 2), expected)


@pytest.mark.parametrize("near", [False, True])
def test_slerp_of_mergekit_and_fusion_bench(near: bool) -> None:
    method = on_the_page("SLERP(weight=0.5)", weight=0.3)
    for p in slices(2):
        first, second = (expert.numpy() for expert in p.experts)
        if near:
            second = 2 * first + 1e-2 * second
        cosine = (first / np.linalg.norm(first) * second / np.linalg.norm(second)).sum()
        assert (abs(cosine) > 0.9995) == near
        angle = np.arccos(cosine)
        shares = (0.7, 0.3)
        if not near:
            shares = (np.sin(0.7 * angle) / np.sin(angle), np.sin(0.3 * angle) / np.sin(angle))
        pair = dataclasses.replace(p, experts=(torch.from_numpy(first), torch.from_numpy(second)))
        expected = shares[0] * first + shares[1] * second
        np.testing.assert_allclose(method(pair), expected, rtol=1e-10)


@pytest.mark.parametrize("mean", ["cosine", "angle"])
def test_model_stock_of_mergekit_and_of_fusion_bench(mean: str) -> None:
    def stock(_: Array, vectors: Sequence[Array]) -> Array:
        cosines = []
        for i in range(3):
            for j in range(i + 1, 3):
                one, other = vectors[i].ravel(), vectors[j].ravel()
                cosines.append(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))
        cosine = np.mean(cosines) if mean == "cosine" else np.cos(np.mean(np.arccos(cosines)))
        assert cosine > 0
        return np.asarray(3 * cosine / (1 + 2 * cosine) * np.mean(vectors, axis=0))

    check(merged(on_the_page(f'ModelStock(mean="{mean}")')), per_tensor(stock))


def test_magmax_of_its_authors() -> None:
    def largest(_: Array, vectors: Sequence[Array]) -> Array:
        best = vectors[0]
        for vector in vectors[1:]:
            best = np.where(np.abs(vector) >= np.abs(best), vector, best)
        return 0.5 * best

    check(merged(on_the_page("MagMax(scale=0.5)")), per_tensor(largest))


@pytest.mark.parametrize("rescale", ["tensors", "entries"])
def test_emr_of_its_authors(rescale: str) -> None:
    method = on_the_page(f'EMR(rescale="{rescale}")')
    pieces, vectors = slices(), task_vectors()
    fact = method.survey(looking_at(pieces))
    own, masked = np.zeros(3), np.zeros(3)
    expected: list[list[Array]] = []
    for name in SHAPES:
        flag = np.where(np.mean([t[name] for t in vectors], axis=0) > 0, 1, -1)
        masks = [t[name] * flag > 0 for t in vectors]
        pairs = zip(vectors, masks, strict=True)
        unified = flag * np.max([np.abs(t[name]) * mask for t, mask in pairs], axis=0)
        expected.append([mask * unified for mask in masks])
        share = 1 / unified.size if rescale == "tensors" else 1
        own += [np.abs(t[name]).sum() * share for t in vectors]
        masked += [np.abs(mask * unified).sum() * share for mask in masks]
    scales = method.task_scales(fact, ("a", "b", "c"))
    np.testing.assert_allclose(scales, own / masked)
    for p, by_task in zip(pieces, expected, strict=True):
        slice_ = dataclasses.replace(p, fact=fact)
        shared = method(slice_) - p.require_base()
        for mask, vector in zip(method.task_masks(slice_), by_task, strict=True):
            np.testing.assert_allclose(mask * shared, vector, rtol=1e-10)


def test_tall_masks_and_consensus_of_their_authors() -> None:
    tall = on_the_page('TALLMasks(threshold={"a": 0.2, "b": 0.6})')
    consensus = on_the_page('Consensus(k=2, threshold={"a": 0.2, "b": 0.6})')
    shared, agreed = merged(tall, 2), merged(consensus, 2)
    for p in slices(2):
        vectors = [t[p.name] for t in task_vectors(2)]
        multi = BASE[p.name] + np.sum(vectors, axis=0)
        masks = [
            np.abs(BASE[p.name] - e[p.name]) > limit * np.abs(multi - e[p.name])
            for e, limit in zip(experts(2), (0.2, 0.6), strict=True)
        ]
        np.testing.assert_allclose(shared[p.name], multi)
        for mask, expected in zip(tall.task_masks(p), masks, strict=True):
            np.testing.assert_array_equal(mask, expected)
        kept = np.sum(masks, axis=0) >= 2
        np.testing.assert_allclose(agreed[p.name], np.where(kept, multi, BASE[p.name]))


# --- Curvature ---------------------------------------------------------------------------------


def weighted(coefficients: Sequence[float], fishers: Sequence[Model]) -> Model:
    return {
        name: np.asarray(
            sum(
                c * f[name] * e[name]
                for c, f, e in zip(coefficients, fishers, experts(3), strict=True)
            )
            / sum(c * f[name] for c, f in zip(coefficients, fishers, strict=True))
        )
        for name in SHAPES
    }


def test_fisher_averaging_of_its_authors() -> None:
    method = on_the_page('FisherAverage(normalize="norm")', floor=0.2)
    norms = [float(np.linalg.norm(flat(f))) for f in FISHERS]
    floored = [{name: np.maximum(f[name], 0.2) for name in SHAPES} for f in FISHERS]
    check(merged(method), weighted([1 / norm for norm in norms], floored))


def test_fisher_averaging_of_mergelm_and_fusion_bench() -> None:
    call = 'FisherAverage(floor_mode="added", normalize="norm")'
    method = on_the_page(call, floor=0.2)
    inverse = np.array([1 / (np.linalg.norm(flat(f)) + 0.2) for f in FISHERS])
    added = [{name: f[name] + 0.2 for name in SHAPES} for f in FISHERS]
    check(merged(method), weighted(list(inverse / inverse.sum() / 3), added))


@pytest.mark.parametrize("factor", [0.9, 0.95])
def test_regmean_of_its_authors_and_of_fusion_bench(factor: float) -> None:
    method = on_the_page(f"RegMean(off_diagonal={factor}, ridge=0.0)")
    shrunk = [np.where(np.eye(5) == 1, gram, factor * gram) for gram in grams()]
    products = [g @ e["encoder.weight"].T for g, e in zip(shrunk, experts(3), strict=True)]
    expected = {
        "encoder.weight": (np.linalg.inv(np.sum(shrunk, axis=0)) @ np.sum(products, axis=0)).T,
        "encoder.bias": np.mean([e["encoder.bias"] for e in experts(3)], axis=0),
    }
    check(merged(method), expected)
