"""The squared gradient of a mean over B examples, times B², is an unbiased Fisher information."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lit_merge.curvature import SquaredBatchGradient, adam_second_moment
from lit_merge.curvature.labels import SampledLabels
from lit_merge.errors import InputError
from tests.processes import on_ranks
from tests.references import softmax_fisher_by_enumeration


def softmax_regression() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 3).double()


def examples(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_its_mean_over_sampled_labels_is_the_fisher_at_any_batch_size(size: int) -> None:
    model, x, rounds = softmax_regression(), examples(16), 1200 * size // 16
    estimator = SquaredBatchGradient()
    for i in range(rounds):
        for start in range(0, 16, size):
            rows = x[start : start + size]
            with SampledLabels(0, range(16 * i + start, 16 * i + start + size), {}):
                loss = F.cross_entropy(model(rows), torch.zeros(size).long())
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            named = dict(zip(("weight", "bias"), gradients, strict=True))
            estimator.update(named, num_examples=size)
    assert estimator.num_examples == 16 * rounds
    for name, fisher in softmax_fisher_by_enumeration(model, x, 3).items():
        mean = estimator.sums()[name] / rounds
        assert (mean.sum() / fisher.sum()).item() == pytest.approx(1, abs=0.06)


def test_with_observed_labels_it_is_the_fisher_at_the_optimum() -> None:
    x = examples(20_000)
    truth = softmax_regression()
    model = nn.Linear(3, 3).double()
    labels = torch.distributions.Categorical(logits=truth(x).detach(), validate_args=False).sample()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    estimator = SquaredBatchGradient()
    for rows, y in zip(x.split(20), labels.split(20), strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(rows), y), list(model.parameters()))
        estimator.update(dict(zip(("weight", "bias"), gradients, strict=True)), num_examples=20)
    with torch.no_grad():
        p = model(x).softmax(-1)
    fisher = torch.einsum("nc,ni->ci", p * (1 - p), x**2)
    ratio = estimator.sums()["weight"].sum() / fisher.sum()
    assert ratio.item() == pytest.approx(1, abs=0.05)


def test_one_step_adds_the_square_of_the_gradient_of_the_sum() -> None:
    estimator = SquaredBatchGradient()
    estimator.update({"w": torch.tensor([0.5, -2.0])}, num_examples=4)
    estimator.update({"w": torch.tensor([1.0, 0.0])}, num_examples=3)
    assert estimator.sums()["w"].tolist() == [4 + 9, 64]
    assert estimator.num_examples == 7


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_and_counted() -> None:
    estimator = SquaredBatchGradient()
    estimator.update({"a": torch.ones(2), "b": torch.ones(1)}, num_examples=2)
    for bad in (float("nan"), float("inf")):
        estimator.update({"a": torch.ones(2), "b": torch.tensor([bad])}, num_examples=2)
    assert estimator.sums()["a"].tolist() == [4, 4]
    assert (estimator.num_examples, estimator.skipped_steps) == (2, 2)


def test_several_optimizers_each_add_their_parameters() -> None:
    estimator = SquaredBatchGradient()
    for _ in range(3):
        estimator.update({"generator": torch.ones(1)}, num_examples=2)
        estimator.update({"critic": torch.ones(1)}, num_examples=2)
    assert estimator.num_examples == 6
    assert {name: s.item() for name, s in estimator.sums().items()} == {
        "generator": 12,
        "critic": 12,
    }


def test_half_precision_gradients_are_summed_in_single_precision() -> None:
    estimator = SquaredBatchGradient()
    estimator.update({"w": torch.full((1,), 1e-6, dtype=torch.float16)}, num_examples=1)
    assert estimator.sums()["w"].dtype == torch.float32
    assert estimator.sums()["w"].item() == pytest.approx(1e-12, rel=0.1)


def test_an_interrupted_run_continues_as_if_it_had_not_stopped() -> None:
    steps = [torch.randn(3, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    whole, first, second = (SquaredBatchGradient() for _ in range(3))
    for i, gradient in enumerate(steps):
        whole.update({"w": gradient}, num_examples=5)
        if i < 2:
            first.update({"w": gradient}, num_examples=5)
    first.update({"w": torch.tensor([float("nan")] * 3)}, num_examples=5)
    second.resume(first.sums(), num_examples=10, skipped_steps=1)
    for gradient in steps[2:]:
        second.update({"w": gradient}, num_examples=5)
    assert torch.equal(second.sums()["w"], whole.sums()["w"])
    assert (second.num_examples, second.skipped_steps) == (20, 1)


def test_sums_are_copies_and_gradients_are_not_changed() -> None:
    estimator, gradient = SquaredBatchGradient(), torch.ones(2)
    estimator.update({"w": gradient}, num_examples=2)
    estimator.sums()["w"].zero_()
    assert estimator.sums()["w"].tolist() == [4, 4]
    assert gradient.tolist() == [1, 1]


def test_a_number_of_examples_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="num_examples: must be at least 1; got 0"):
        SquaredBatchGradient().update({"w": torch.ones(1)}, num_examples=0)


def test_no_gradients_are_refused() -> None:
    with pytest.raises(InputError, match=r"gradients: must hold .* got none. Call it after"):
        SquaredBatchGradient().update({}, num_examples=1)


@pytest.mark.distributed
def test_shards_of_a_gradient_add_up_to_the_whole_and_are_skipped_together(tmp_path: Path) -> None:
    gradient = torch.arange(10.0).view(5, 2)
    broken = gradient.clone()
    broken[4, 1] = float("nan")  # on the last rank only

    def run(rank: int) -> Any:
        mesh = init_device_mesh("cpu", (2,))
        shards = [distribute_tensor(g, mesh, [Shard(0)]) for g in (gradient, broken)]
        estimator = SquaredBatchGradient()
        for shard in shards:
            estimator.update({"w": shard}, num_examples=3)
        weight = nn.Parameter(shards[0])
        optimizer = torch.optim.AdamW([weight])
        weight.grad = shards[0]
        optimizer.step()
        moment = adam_second_moment(optimizer, {weight: "w"}, num_examples=4, batch_size=3)
        whole = (estimator.sums()["w"].full_tensor(), moment["w"].full_tensor())
        return estimator.skipped_steps, *(tensor.tolist() for tensor in whole)

    for skipped, sums, moment in on_ranks(run, world_size=2, folder=tmp_path):
        assert skipped == 1
        torch.testing.assert_close(torch.tensor(sums), 9 * gradient**2)
        torch.testing.assert_close(torch.tensor(moment), 12 * gradient**2, rtol=1e-4, atol=0)
