"""What all estimators share."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isabstract

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_merge.curvature import (
    AdamSecondMoment,
    CurvatureEstimator,
    HessianDiagonal,
    IvonHessian,
    PerExampleFisher,
    ShardedFisher,
    SquaredBatchGradient,
)
from lit_merge.curvature.beside import FisherBesideTraining
from lit_merge.curvature.estimator import example_numbers, require_count, widen, zeros_for
from lit_merge.errors import InputError

Batch = tuple[Tensor, Tensor]
Data = dict[range, Batch]  # by the numbers of the examples
Gather = Callable[[nn.Module, Data], CurvatureEstimator]

SIZE = 4  # examples in a batch


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_squares_are_summed_in_single_precision_at_least(
    dtype: torch.dtype, wide: torch.dtype
) -> None:
    assert widen(torch.ones(2, dtype=dtype)).dtype == wide
    assert zeros_for(torch.ones(2, dtype=dtype)).dtype == wide


def test_sums_of_a_convolution_are_stored_channels_last() -> None:
    zeros = zeros_for(torch.ones(8, 4, 3, 2))
    assert zeros.shape == (8, 4, 3, 2)
    assert zeros.permute(0, 2, 3, 1).is_contiguous()
    assert zeros_for(torch.ones(())).shape == ()


def test_sums_made_in_inference_mode_can_be_added_to_outside() -> None:
    with torch.inference_mode():
        zeros = zeros_for(torch.ones(2))
    assert not zeros.is_inference()


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return one with a frozen parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    model[0].bias.requires_grad_(False)
    return model


def data(batches: range, dtype: torch.dtype = torch.float32) -> Data:
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.arange(100) % 3
    numbers = [range(SIZE * i, SIZE * (i + 1)) for i in batches]
    return {rows: (x[rows.start : rows.stop], y[rows.start : rows.stop]) for rows in numbers}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    parameters = trainable(model)
    found = torch.autograd.grad(cross_entropy(model, batch), [*parameters.values()])
    return dict(zip(parameters, found, strict=True))


def set_gradients(model: nn.Module, batch: Batch) -> None:
    for name, gradient in gradients(model, batch).items():
        trainable(model)[name].grad = gradient


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def per_example(model: nn.Module, data: Data) -> CurvatureEstimator:
    estimator = PerExampleFisher(model, cross_entropy)
    for numbers, batch in data.items():
        estimator.update(batch, indices=numbers)
    return estimator


def sharded(model: nn.Module, data: Data) -> CurvatureEstimator:
    estimator = ShardedFisher(model, cross_entropy)
    estimator.probe(next(iter(data.values())))
    for numbers, batch in data.items():
        estimator.update(batch, indices=numbers)
    return estimator


def hutchinson(model: nn.Module, data: Data) -> CurvatureEstimator:
    estimator = HessianDiagonal(model, cross_entropy)
    for numbers, batch in data.items():
        estimator.update(batch, indices=numbers)
    return estimator


def hutchinson_with_negatives(model: nn.Module, data: Data) -> CurvatureEstimator:
    estimator = HessianDiagonal(model, cross_entropy, negative="keep")
    for numbers, batch in data.items():
        estimator.update(batch, indices=numbers)
    return estimator


def beside_training(model: nn.Module, data: Data) -> CurvatureEstimator:
    estimator = FisherBesideTraining(model)
    for batch in data.values():
        estimator.start(batch)
        loss = cross_entropy(model, batch)
        estimator.end_forward()
        loss.backward()  # type: ignore[no-untyped-call]
        estimator.stop()
    return estimator


def squared_batch_gradient(model: nn.Module, data: Data) -> CurvatureEstimator:
    estimator = SquaredBatchGradient()
    for batch in data.values():
        estimator.update(gradients(model, batch), num_examples=SIZE)
    return estimator


def adam(model: nn.Module, data: Data) -> CurvatureEstimator:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for batch in data.values():
        set_gradients(model, batch)
        optimizer.step()
    seen = SIZE * len(data)
    return AdamSecondMoment(optimizer, names_of(model), num_examples=seen, batch_size=SIZE)


def ivon(model: nn.Module, data: Data) -> CurvatureEstimator:
    package = pytest.importorskip("ivon")
    torch.manual_seed(0)
    optimizer = package.IVON(model.parameters(), lr=0.0, ess=100.0, beta2=0.9)
    for batch in data.values():
        with optimizer.sampled_params(train=True):
            set_gradients(model, batch)
        optimizer.step()
    return IvonHessian(optimizer, names_of(model), num_examples=SIZE * len(data))


ALL: dict[Gather, type[CurvatureEstimator]] = {
    per_example: PerExampleFisher,
    sharded: ShardedFisher,
    hutchinson: HessianDiagonal,
    beside_training: FisherBesideTraining,
    squared_batch_gradient: SquaredBatchGradient,
    adam: AdamSecondMoment,
    ivon: IvonHessian,
}
# where sums are added before negative ones are clamped
ADDED: dict[Gather, type[CurvatureEstimator]] = {
    hutchinson_with_negatives if gather is hutchinson else gather: kind
    for gather, kind in ALL.items()
    if kind.additive
}


def every(kind: type) -> set[type]:
    own = {kind} if kind.__module__.startswith("lit_merge.") and not isabstract(kind) else set()
    return own.union(*(every(child) for child in kind.__subclasses__()))


class TestLaws:
    def test_they_are_tested_of_every_estimator(self) -> None:
        assert every(CurvatureEstimator) == set(ALL.values())

    def test_names_are_different(self) -> None:
        names = [kind.name for kind in ALL.values()]
        assert len(set(names)) == len(names)
        assert all(name == name.lower() for name in names)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("gather", ALL)
    def test_sums_are_like_the_trainable_parameters(
        self, gather: Gather, dtype: torch.dtype
    ) -> None:
        model = network(dtype)
        estimator = gather(model, data(range(3), dtype))
        assert isinstance(estimator, ALL[gather])
        assert estimator.num_examples == 3 * SIZE
        expected = {name: (p.shape, dtype) for name, p in trainable(model).items()}
        assert {n: (s.shape, s.dtype) for n, s in estimator.sums().items()} == expected
        assert not any(total.requires_grad for total in estimator.sums().values())

    @pytest.mark.parametrize("gather", ALL)
    def test_half_precision_is_summed_in_single(self, gather: Gather) -> None:
        model = network(torch.bfloat16)
        sums = gather(model, data(range(2), torch.bfloat16)).sums()
        assert {total.dtype for total in sums.values()} == {torch.float32}

    @pytest.mark.parametrize("gather", ALL)
    def test_sums_are_finite_copies_that_are_not_all_zero(self, gather: Gather) -> None:
        estimator = gather(network(), data(range(3)))
        first = {name: total.clone() for name, total in estimator.sums().items()}
        for total in estimator.sums().values():
            total.fill_(-1)
        again = estimator.sums()
        assert all(torch.equal(again[name], total) for name, total in first.items())
        assert all(total.isfinite().all() for total in first.values())
        assert sum(float(total.abs().sum()) for total in first.values()) > 0

    @pytest.mark.parametrize("gather", ALL)
    def test_none_is_negative_where_that_is_claimed(self, gather: Gather) -> None:
        assert ALL[gather].non_negative  # as constructed by default: a merge takes them all
        for first in range(6):
            sums = gather(network(), data(range(first, first + 2))).sums()
            assert all((total >= 0).all() for total in sums.values())

    @pytest.mark.parametrize("gather", ADDED)
    def test_the_sums_of_parts_add_up_where_that_is_claimed(self, gather: Gather) -> None:
        model = network(torch.float64)
        whole, first, second = (
            gather(model, data(batches, torch.float64))
            for batches in (range(5), range(2), range(2, 5))
        )
        assert whole.num_examples == first.num_examples + second.num_examples
        parts = first.sums(), second.sums()
        for name, total in whole.sums().items():
            torch.testing.assert_close(parts[0][name] + parts[1][name], total)

    @pytest.mark.parametrize("gather", [g for g, kind in ALL.items() if not kind.additive])
    def test_they_do_not_where_it_is_not(self, gather: Gather) -> None:
        model = network(torch.float64)
        whole, first, second = (
            gather(model, data(batches, torch.float64)).sums()
            for batches in (range(5), range(2), range(2, 5))
        )
        assert not any(
            torch.allclose(first[name] + second[name], total) for name, total in whole.items()
        )

    @pytest.mark.parametrize("gather", [g for g, kind in ALL.items() if kind.exact])
    def test_the_exact_ones_do_not_depend_on_how_batches_are_cut(self, gather: Gather) -> None:
        model = network(torch.float64)
        batches = data(range(3), torch.float64)
        joined = [torch.cat(parts) for parts in zip(*batches.values(), strict=True)]
        together = gather(model, {range(3 * SIZE): (joined[0], joined[1])})
        torch.testing.assert_close(gather(model, batches).sums(), together.sums())

    @pytest.mark.parametrize("kind", [PerExampleFisher, HessianDiagonal])
    def test_those_that_are_wrong_on_shards_refuse_them(
        self, kind: type[PerExampleFisher | HessianDiagonal]
    ) -> None:
        model = network()
        model[0].weight.placements = ("a shard",)  # type: ignore[index,union-attr]
        if not kind.sharded:
            with pytest.raises(InputError, match="must be a whole tensor"):
                kind(model, cross_entropy)


def test_examples_are_counted_on_without_indices() -> None:
    assert example_numbers(None, 3, 7) == (7, 8, 9)
    assert example_numbers([5, 1], 2, 7) == (5, 1)
    with pytest.raises(InputError, match="one per example of the batch; got 2 for 3 examples"):
        example_numbers([5, 1], 3, 7)


def test_a_count_below_one_is_refused() -> None:
    require_count("num_examples", 1)
    with pytest.raises(InputError, match=r"num_examples: must be at least 1; got 0\. Give the"):
        require_count("num_examples", 0)
