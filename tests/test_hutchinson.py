"""The diagonal of the true Hessian against the dense one, and against differences of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_merge.curvature.hutchinson import HessianDiagonal, without_negatives
from lit_merge.errors import InputError
from tests.references import splitmix_set, splitmix_signs
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_conv_net, tiny_vit


def cross_entropy(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
    inputs, labels = batch
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return F.cross_entropy(getattr(output, "logits", output), labels)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return x, torch.arange(count) % 3


def dense_hessian(model: nn.Module, batch: Any, size: int) -> Tensor:
    """Return the Hessian [P, P] of the summed cross-entropy in all parameters, flat."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([math.prod(shape) for shape in shapes])
        values = {n: v.view(s) for n, v, s in zip(names, parts, shapes, strict=True)}
        return size * F.cross_entropy(torch.func.functional_call(model, values, batch[0]), batch[1])

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian: Tensor = torch.autograd.functional.hessian(loss, flat)  # type: ignore[no-untyped-call]
    return hessian


def flat(sums: dict[str, Tensor]) -> Tensor:
    return torch.cat([total.flatten() for total in sums.values()])


def vectors(model: nn.Module, seed: int, sample: int, numbers: list[int]) -> list[Tensor]:
    return [
        torch.tensor(
            splitmix_signs(seed, sample, splitmix_set((splitmix_set(numbers), k)), p.numel())
        ).view(p.shape)
        for k, p in enumerate(model.parameters())
    ]


def gradient_differences(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, v: list[Tensor]
) -> list[Tensor]:
    """Return v ⊙ Hv of the mean loss by moving the weights along v and back."""
    step, parameters = 1e-5, list(model.parameters())
    sides = []
    for way in (step, -2 * step):  # to +step, then to −step
        with torch.no_grad():
            for p, direction in zip(parameters, v, strict=True):
                p.add_(direction, alpha=way)
        sides.append(torch.autograd.grad(loss(model, batch), parameters))
    with torch.no_grad():
        for p, direction in zip(parameters, v, strict=True):
            p.add_(direction, alpha=step)
    plus, minus = sides
    return [d * (a - b) / (2 * step) for d, a, b in zip(v, plus, minus, strict=True)]


class TestAgainstTheDenseHessian:
    def test_it_is_the_product_with_the_signs_of_the_batch(self) -> None:
        model, batches = mlp(), [rows(4), rows(3, seed=1)]
        estimator = HessianDiagonal(model, cross_entropy, samples=2, negative="keep", seed=5)
        expected, start = torch.zeros(31).double(), 0
        for x, y in batches:
            estimator.update((x, y))
            numbers = list(range(start, start + len(y)))
            start += len(y)
            hessian = dense_hessian(model, (x, y), len(y))
            for sample in range(2):
                v = torch.cat([v.flatten() for v in vectors(model, 5, sample, numbers)]).double()
                expected += v * (hessian @ v) / 2
        assert estimator.num_examples == 7
        torch.testing.assert_close(flat(estimator.sums()), expected, rtol=1e-9, atol=1e-12)

    def test_the_mean_over_many_vectors_is_the_diagonal(self) -> None:
        model, batch, samples = mlp(), rows(5), 400
        estimator = HessianDiagonal(model, cross_entropy, samples=samples, negative="keep")
        estimator.update(batch)
        hessian = dense_hessian(model, batch, 5)
        diagonal = hessian.diagonal()
        deviation = ((hessian.square().sum(1) - diagonal**2) / samples).sqrt()
        error = (flat(estimator.sums()) - diagonal).abs() / deviation
        assert error.max() < 4.5  # of 31 normal numbers
        assert 0.5 < error.square().mean().sqrt() < 1.5

    def test_one_vector_is_exact_where_the_hessian_is_diagonal(self) -> None:
        class Entries(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]).double())

            def forward(self, x: Tensor) -> Tensor:
                return x * self.weight

        def quadratic(model: nn.Module, batch: Tensor) -> Tensor:
            return (model(batch) - 1).square().sum(1).mean()

        batch = rows(6)[0]
        estimator = HessianDiagonal(Entries(), quadratic)
        estimator.update(batch[:4])
        estimator.update(batch[4:])
        torch.testing.assert_close(estimator.sums(), {"weight": 2 * batch.square().sum(0)})

    def test_a_loss_that_is_linear_has_none(self) -> None:
        model = nn.Linear(3, 1).double()
        estimator = HessianDiagonal(model, lambda m, b: m(b).mean())
        estimator.update(rows(4)[0])
        assert {name: float(s.abs().sum()) for name, s in estimator.sums().items()} == {
            "weight": 0,
            "bias": 0,
        }


@pytest.mark.parametrize("sort", ["vit", "conv", "bert"])
def test_real_architectures_agree_with_differences_of_gradients(sort: str) -> None:
    model, inputs = {
        "vit": lambda: (tiny_vit(), images(3).double()),  # attention by a fused kernel
        "conv": lambda: (tiny_conv_net(), images(3, channels=1).double()),
        "bert": lambda: (tiny_bert(), padded_texts((5, 3, 4))),
    }[sort]()
    model, batch = model.double(), (inputs, torch.tensor([0, 2, 1]))
    estimator = HessianDiagonal(model, cross_entropy, negative="keep")
    estimator.update(batch, indices=[4, 9, 2])
    products = gradient_differences(model, cross_entropy, batch, vectors(model, 0, 0, [2, 4, 9]))
    for (name, got), product in zip(estimator.sums().items(), products, strict=True):
        scale = float(product.abs().max())
        torch.testing.assert_close(got, 3 * product, rtol=1e-3, atol=1e-4 * scale + 1e-9, msg=name)


class TestReproducible:
    def sums(self, batches: list[list[int]]) -> Tensor:
        x, y = rows(6)
        estimator = HessianDiagonal(mlp(), cross_entropy, negative="keep")
        for numbers in batches:
            estimator.update((x[numbers], y[numbers]), indices=numbers)
        return flat(estimator.sums())

    def test_the_order_of_batches_and_within_them_does_not_matter(self) -> None:
        torch.testing.assert_close(
            self.sums([[0, 1, 2], [3, 4, 5]]), self.sums([[5, 3, 4], [2, 0, 1]])
        )

    def test_the_ranks_parts_add_up(self) -> None:
        parts = self.sums([[0, 1]]) + self.sums([[2, 3, 4]])
        torch.testing.assert_close(parts, self.sums([[0, 1], [2, 3, 4]]))

    def test_batches_have_vectors_of_their_own(self) -> None:
        x, y = rows(1)
        estimator = HessianDiagonal(mlp(), cross_entropy, negative="keep")
        estimator.update((x, y), indices=[0])
        once = flat(estimator.sums())
        estimator.update((x, y), indices=[1])
        assert not torch.allclose(flat(estimator.sums()), 2 * once, rtol=1e-3)


def test_texts_of_different_lengths_with_their_own_means() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 50)).double()
    tokens = padded_texts((5, 2))["input_ids"]

    def next_tokens(model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(
            model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), ignore_index=0
        )

    def by_text(model: nn.Module, batch: Tensor) -> Tensor:
        losses = [next_tokens(model, batch[:1]), next_tokens(model, batch[1:, :2])]
        return torch.stack(losses).mean()

    estimator = HessianDiagonal(model, next_tokens, reduction="mean", negative="keep")
    estimator.update(tokens)
    products = gradient_differences(model, by_text, tokens, vectors(model, 0, 0, [0, 1]))
    for got, product in zip(estimator.sums().values(), products, strict=True):
        torch.testing.assert_close(got, 2 * product, rtol=1e-4, atol=1e-7)
    with pytest.raises(InputError, match=r"must be the mean over .*reduction=\"mean\" or"):
        HessianDiagonal(model, next_tokens).update(tokens)


class TestNegativeEntries:
    def estimator(self, **settings: Any) -> HessianDiagonal:
        estimator = HessianDiagonal(mlp(), cross_entropy, **settings)
        estimator.update(rows(5))
        return estimator

    def test_they_are_clamped_unless_wanted(self) -> None:
        raw = flat(self.estimator(negative="keep").sums())
        assert raw.min() < 0
        assert torch.equal(flat(self.estimator().sums()), raw.clamp(min=0))
        assert torch.equal(flat(self.estimator(negative="absolute").sums()), raw.abs())

    def test_their_share_is_told_whatever_becomes_of_them(self) -> None:
        raw = flat(self.estimator(negative="keep").sums())
        share = float(-raw[raw < 0].sum() / raw.abs().sum())
        assert 0 < share < 1
        for negative in ("keep", "clamp", "absolute"):
            assert self.estimator(negative=negative).negative_share == pytest.approx(share)
        assert HessianDiagonal(mlp(), cross_entropy).negative_share == 0

    def test_the_function_does_not_change_its_input(self) -> None:
        sums = {"w": torch.tensor([-1.0, 2.0])}
        assert without_negatives(sums, "clamp")["w"].tolist() == [0, 2]
        without_negatives(sums, "keep")["w"].zero_()
        assert sums["w"].tolist() == [-1, 2]

    def test_another_word_is_refused(self) -> None:
        with pytest.raises(InputError, match=r'negative: must be "clamp", .*; got \'drop\''):
            HessianDiagonal(mlp(), cross_entropy, negative="drop")  # type: ignore[arg-type]


class TestRefused:
    def test_no_samples(self) -> None:
        with pytest.raises(InputError, match="samples: must be at least 1; got 0"):
            HessianDiagonal(mlp(), cross_entropy, samples=0)

    def test_a_loss_that_is_no_mean(self) -> None:
        def total(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        with pytest.raises(InputError, match=r"loss: must be the mean over .* a sum instead of"):
            HessianDiagonal(mlp(), total).update(rows(4))

    def test_a_loss_that_does_not_depend_on_the_parameters(self) -> None:
        estimator = HessianDiagonal(mlp(), lambda m, b: m(b[0]).detach().square().mean())
        with pytest.raises(InputError, match="must depend on the trainable parameters; got no"):
            estimator.update(rows(4))

    def test_a_layer_without_second_derivatives(self) -> None:
        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.save_for_backward(x)
                return x**3

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return 3 * ctx.saved_tensors[0] ** 2 * grad

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            value: Tensor = Once.apply(model(batch[0])).square().mean()  # type: ignore[no-untyped-call]
            return value

        with pytest.raises(
            InputError, match="must be twice differentiable by autograd; got: a func"
        ):
            HessianDiagonal(mlp(), loss).update(rows(4))

    def test_an_operation_of_torch_without_second_derivatives(self) -> None:
        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            query = model(batch[0])[:, None, None]
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # the user insists
                return F.scaled_dot_product_attention(query, query, query).square().mean()

        with pytest.raises(InputError, match=r"got: derivative for .* is not implemented"):
            HessianDiagonal(mlp(), loss).update(rows(4))

    def test_second_derivatives_that_are_not_finite(self) -> None:
        class Root(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.tensor([0.0, 1.0]))

            def forward(self, x: Tensor) -> Tensor:
                return x * self.weight.abs() ** 1.5

        estimator = HessianDiagonal(Root(), lambda m, b: m(b).mean())
        estimator.update(torch.ones(2, 2))
        with pytest.raises(InputError, match="weight: must have finite second derivatives"):
            estimator.sums()

    def test_indices_must_match_the_batch(self) -> None:
        with pytest.raises(InputError, match="one per example of the batch; got 2 for 3 examples"):
            HessianDiagonal(mlp(), cross_entropy).update(rows(3), indices=[0, 1])


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_the_model_is_as_it_was_and_gradients_may_be_off(context: Any) -> None:
    model = tiny_vit().train()
    model.head.requires_grad_(False)
    modes = [p.requires_grad for p in model.parameters()]
    with context():
        estimator = HessianDiagonal(model, cross_entropy)
        estimator.update((images(2), torch.tensor([0, 1])))
        sums = estimator.sums()
    assert not {"head.weight", "head.bias"} & sums.keys()
    assert not any(total.is_inference() for total in sums.values())
    assert [p.requires_grad for p in model.parameters()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
