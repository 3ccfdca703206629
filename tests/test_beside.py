"""Per-example gradients beside training against a loop over examples and against training alone."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_merge.curvature import FisherBesideTraining, PerExampleFisher
from lit_merge.errors import InputError
from tests.references import squared_gradients_by_loop


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def vision_transformer() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2,
        num_classes=3, init_values=0.5,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double()


def images(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.float64)
    return x, torch.arange(size) % 3


def step(
    estimator: FisherBesideTraining, model: nn.Module, batch: Any, loss_scale: float = 1.0
) -> None:
    estimator.start(batch, loss_scale=loss_scale)
    loss = cross_entropy(model, batch) * loss_scale
    estimator.end_forward()
    loss.backward()
    estimator.stop()


@pytest.mark.parametrize("loss_scale", [1.0, 1024 / 3])
def test_sums_over_steps_equal_the_loop(loss_scale: float) -> None:
    model = vision_transformer().train()  # without dropout it is as in eval mode
    estimator = FisherBesideTraining(model)
    batches = [images(5), images(3, seed=1)]
    for batch in batches:
        step(estimator, model, batch, loss_scale)
    expected = squared_gradients_by_loop(model, batches, cross_entropy)
    sums = estimator.sums()
    assert estimator.num_examples == 8
    assert sums.keys() == expected.keys()
    for name, squares in expected.items():
        torch.testing.assert_close(
            sums[name], squares, rtol=1e-9, atol=1e-9 * float(squares.max()) + 1e-30
        )


def test_the_gradients_of_training_are_the_same() -> None:
    model = vision_transformer().train()
    batch = images(5)
    cross_entropy(model, batch).backward()
    alone = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    step(FisherBesideTraining(model), model, batch)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, alone[name], rtol=1e-10, atol=1e-14)


def test_nothing_is_taken_between_the_steps_it_is_told_of() -> None:
    model = vision_transformer()
    estimator = FisherBesideTraining(model)
    step(estimator, model, images(4))
    before = estimator.sums()
    cross_entropy(model, images(4, seed=1)).backward()
    for name, total in estimator.sums().items():
        torch.testing.assert_close(total, before[name], rtol=0, atol=0)


def test_two_halves_of_a_run_add_up() -> None:
    model = vision_transformer()
    whole, first, second = (FisherBesideTraining(model) for _ in range(3))
    for estimators, batch in (((whole, first), images(4)), ((whole, second), images(3, seed=1))):
        for estimator in estimators:
            step(estimator, model, batch)
    second.resume(first.sums(), num_examples=first.num_examples)
    assert second.num_examples == whole.num_examples
    for name, total in whole.sums().items():
        torch.testing.assert_close(second.sums()[name], total)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(x)).relu())


def test_batch_statistics_are_refused() -> None:
    model = Normed().train()
    with pytest.raises(InputError, match=r"norm\.weight: must be one whose .* batch_norm\(\)"):
        step(FisherBesideTraining(model), model, (torch.randn(4, 4), torch.arange(4) % 3))


def test_running_statistics_are_taken() -> None:
    model = Normed().double().train()
    model.norm.eval()
    batch = (torch.randn(4, 4, dtype=torch.float64), torch.arange(4) % 3)
    estimator = FisherBesideTraining(model)
    step(estimator, model, batch)
    expected = squared_gradients_by_loop(model.eval(), [batch], cross_entropy)
    for name, total in estimator.sums().items():
        torch.testing.assert_close(total, expected[name])


class DroppedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, 0.5, self.training))


def test_random_numbers_before_the_examples_are_refused() -> None:
    model = DroppedWeight().train()
    with pytest.raises(InputError, match=r"weight: .* random numbers"):
        step(FisherBesideTraining(model), model, (torch.randn(4, 4), torch.arange(4) % 3))


class TestTryingOut:
    def test_a_model_that_is_covered_passes_and_is_left_as_it_was(self) -> None:
        model = vision_transformer().train()
        random = torch.get_rng_state()
        FisherBesideTraining(model).try_out(images(4), cross_entropy)
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        assert model.training
        assert torch.equal(torch.get_rng_state(), random)

    def test_what_needs_the_loop_is_refused_by_name(self) -> None:
        class Recurrent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rnn = nn.GRU(4, 5, batch_first=True)
                self.head = nn.Linear(5, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.rnn(x)[0][:, -1])

        batch = (torch.randn(3, 2, 4), torch.arange(3))
        with (
            pytest.warns(match="one example at a time"),
            pytest.raises(InputError, match=r"rnn\.weight_ih_l0: must be one whose"),
        ):
            FisherBesideTraining(Recurrent()).try_out(batch, cross_entropy)

    def test_a_step_that_fails_leaves_nothing_behind(self) -> None:
        model = vision_transformer()

        def broken(model: nn.Module, batch: Any) -> Tensor:
            raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            FisherBesideTraining(model).try_out(images(4), broken)
        PerExampleFisher(model, cross_entropy, labels="observed").update(images(2))


def test_examples_hidden_from_it_do_not_go_unnoticed() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.from_numpy(x.detach().numpy().copy())

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            return gradients[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(Hidden.apply(self.first(x)))

    batch = (torch.randn(4, 4), torch.arange(4) % 3)
    with pytest.raises(InputError, match="must be one whose"):
        FisherBesideTraining(Model()).try_out(batch, cross_entropy)
