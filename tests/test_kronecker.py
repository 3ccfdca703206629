"""Kronecker factors against loops over examples and positions, and dense Hessians, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_merge.correction import attention_mask_of
from lit_merge.curvature.kronecker import KroneckerFisher
from lit_merge.curvature.layer_matrices import NOT_LINEAR
from lit_merge.errors import InputError
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_conv_net, tiny_vit


def cross_entropy(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
    inputs, labels = batch
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return F.cross_entropy(getattr(output, "logits", output), labels)


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def factors_of(
    model: nn.Module, loss: Callable[..., Tensor], *batches: Any, **settings: Any
) -> dict[str, Tensor]:
    fisher = KroneckerFisher(model, loss, **settings)
    for batch in batches:
        fisher.update(batch)
    return fisher.matrices()


def dense_hessian(model: nn.Module, name: str, loss: Callable[..., Tensor], batch: Any) -> Tensor:
    """Return the Hessian of the SUMMED loss in a row-major flattened weight."""
    weight = dict(model.named_parameters())[name]

    def summed(flat: Tensor) -> Tensor:
        def call(inputs: Tensor) -> Tensor:
            changed = {name: flat.view_as(weight)}
            result: Tensor = torch.func.functional_call(model, changed, inputs)
            return result

        return len(batch[1]) * loss(call, batch)

    flat = weight.detach().flatten()
    hessian: Tensor = torch.autograd.functional.hessian(summed, flat)  # type: ignore[no-untyped-call]
    return hessian


def by_loop(
    model: nn.Module, name: str, loss: Callable[..., Tensor], examples: list[Any], kept: Any = None
) -> tuple[Tensor, Tensor]:
    """Return both factors of a linear layer, from one backward per example.

    Args:
        model: In eval mode, float64.
        name: Of the layer.
        loss: Of a batch of one.
        examples: Batches of one example.
        kept: By example, which positions count; None for all.
    """
    layer = model.get_submodule(name)
    inputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for number, example in enumerate(examples):
        seen: list[tuple[Tensor, Tensor]] = []

        def hook(
            module: nn.Module, args: Any, output: Tensor, seen: list[tuple[Tensor, Tensor]] = seen
        ) -> None:
            seen.append((args[0].detach(), output))

        handle = layer.register_forward_hook(hook)
        value = loss(model, example)
        handle.remove()
        arrived = torch.autograd.grad(value, [output for _, output in seen])
        for (x, _), g in zip(seen, arrived, strict=True):
            counts = slice(None) if kept is None else kept[number].bool()
            inputs += x.reshape(-1, x.shape[-1])[counts].unbind()
            gradients += g.reshape(-1, g.shape[-1])[counts].unbind()
    a = sum(torch.outer(x, x) for x in inputs)
    b = sum(torch.outer(g, g) for g in gradients)
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return a, b / len(gradients)


def assert_close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    close = rtol * float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=close)


def rows(count: int, features: int = 3, outputs: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, features, generator=generator, dtype=torch.float64)
    return x, torch.randn(count, outputs, generator=generator, dtype=torch.float64)


def test_of_a_linear_model_with_squared_loss_the_product_is_the_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    batch = rows(7)
    found = factors_of(model, squared_error, batch, labels="expected")
    product = torch.kron(found["weight.output"], found["weight.input"])
    assert_close(product, dense_hessian(model, "weight", squared_error, batch))


def test_of_one_example_the_product_is_its_squared_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = rows(1)
    found = factors_of(model, squared_error, batch, labels="observed")
    for name in ("0.weight", "2.weight"):
        weight = dict(model.named_parameters())[name]
        (gradient,) = torch.autograd.grad(squared_error(model, batch), weight)
        product = torch.kron(found[f"{name}.output"], found[f"{name}.input"])
        assert_close(product, torch.outer(gradient.flatten(), gradient.flatten()))


def test_where_all_inputs_are_alike_the_product_is_the_hessian_of_a_classifier() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4, bias=False).double()
    batch = rows(1)[0].expand(5, 3).clone(), torch.arange(5) % 4
    found = factors_of(model, cross_entropy, batch, labels="expected")
    product = torch.kron(found["weight.output"], found["weight.input"])
    assert_close(product, dense_hessian(model, "weight", cross_entropy, batch))


def test_a_product_is_applied_to_a_weight_from_both_sides() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    found = factors_of(model, squared_error, rows(4))
    a, b = found["weight.input"], found["weight.output"]
    v = torch.randn(2, 3, dtype=torch.float64)
    assert_close((torch.kron(b, a) @ v.flatten()).view(2, 3), b @ v @ a)


def test_every_position_is_an_example_of_its_own() -> None:
    model = tiny_vit().double()
    batch = images(3).double(), torch.tensor([0, 4, 2])
    examples = [(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(3)]
    found = factors_of(model, cross_entropy, batch, labels="observed")
    for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2", "head"):
        a, b = by_loop(model, name, cross_entropy, examples)
        assert_close(found[f"{name}.weight.input"], a)
        assert_close(found[f"{name}.weight.output"], b)


def test_padding_is_in_neither_factor() -> None:
    lengths = (6, 2, 4)
    model, labels = tiny_bert().double(), torch.tensor([2, 0, 1])
    texts = padded_texts(lengths)
    batch = texts, labels
    examples = [
        ({key: value[i : i + 1] for key, value in texts.items()}, labels[i : i + 1])
        for i in range(3)
    ]
    kept = [row.flatten() for row in texts["attention_mask"]]
    found = factors_of(model, cross_entropy, batch, labels="observed", mask=attention_mask_of)
    name = "bert.encoder.layer.0.intermediate.dense"
    a, b = by_loop(model, name, cross_entropy, examples, kept)
    assert_close(found[f"{name}.weight.input"], a)
    assert_close(found[f"{name}.weight.output"], b)
    a, b = by_loop(model, "classifier", cross_entropy, examples)
    assert_close(found["classifier.weight.input"], a)
    assert_close(found["classifier.weight.output"], b)


def test_the_places_of_a_convolution_are_positions() -> None:
    model = tiny_conv_net().double()
    batch = images(3, channels=1).double(), torch.tensor([1, 3, 0])
    found = factors_of(model, cross_entropy, batch, labels="observed")
    layer = model[3]
    first = model[:3](batch[0]).detach()
    patches = F.unfold(first, 3, stride=2)  # [B, n, L]
    sums = torch.zeros(8, 8, dtype=torch.float64)
    for x, label in zip(first, batch[1], strict=True):
        y = layer(x[None]).detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model[4:](y), label[None]), y)
        for column in g[0].flatten(1).unbind(1):
            sums += torch.outer(column, column)
    assert_close(found["3.weight.input"], torch.einsum("bil,bjl->ij", patches, patches))
    assert_close(found["3.weight.output"], sums / (3 * patches.shape[2]))


def test_batches_do_not_matter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = rows(7)
    whole = factors_of(model, squared_error, (x, y), seed=3)
    parts = factors_of(
        model, squared_error, (x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:]), seed=3
    )
    assert sorted(parts) == [
        "0.weight.input",
        "0.weight.output",
        "2.weight.input",
        "2.weight.output",
    ]
    for name, factor in whole.items():
        assert_close(parts[name], factor)


def test_sampled_labels_have_the_expected_ones_for_their_mean() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    batch = rows(20)[0], torch.zeros(20, dtype=torch.int64)
    expected = factors_of(model, cross_entropy, batch, labels="expected")
    sampled = factors_of(model, cross_entropy, batch, labels="sampled", samples=100)
    assert_close(sampled["weight.input"], expected["weight.input"])
    assert_close(sampled["weight.output"], expected["weight.output"], rtol=0.1)
    once = factors_of(model, cross_entropy, batch, labels="sampled")
    assert (once["weight.output"] - expected["weight.output"]).abs().max() > 0.01


def test_terms_of_an_example_may_be_put_together_first() -> None:
    """The mean over all tokens is no mean over texts; with a reduction each text has its own."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    x = torch.randn(2, 3, 3, dtype=torch.float64)
    labels = torch.tensor([[1, 2, 0], [3, -100, -100]])

    def over_tokens(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    with pytest.raises(InputError, match="loss: must be the mean over the examples"):
        factors_of(model, over_tokens, (x, labels), labels="observed")
    found = factors_of(model, over_tokens, (x, labels), labels="observed", reduction="sum")
    sums = torch.zeros(4, 4, dtype=torch.float64)
    for example, own in zip(x, labels, strict=True):
        for token, label in zip(example, own, strict=True):
            if label >= 0:
                g = model(token).softmax(-1) - F.one_hot(label, 4)
                sums += torch.outer(g, g).detach()
    assert_close(found["weight.output"], sums / 6)


class Branches(nn.Module):
    """A layer called twice, one under checkpointing, one without gradients and one for nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice = nn.Linear(3, 3)
        self.checkpointed = nn.Linear(3, 2)
        self.detached = nn.Linear(3, 3)
        self.idle = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            x = self.detached(x)
        x = self.twice(self.twice(x).tanh())
        self.idle(x)
        return checkpoint(self.checkpointed, x, use_reentrant=False)


def test_only_what_the_loss_depends_on_counts_and_each_call_once() -> None:
    model = Branches().double()
    x, y = rows(4)
    fisher = KroneckerFisher(model, squared_error, labels="observed")
    fisher.update((x, y))
    examples = [(x[i : i + 1], y[i : i + 1]) for i in range(4)]
    found = fisher.matrices()
    for name in ("twice", "checkpointed"):
        a, b = by_loop(model, name, squared_error, examples)
        assert_close(found[f"{name}.weight.input"], a)
        assert_close(found[f"{name}.weight.output"], b)
    assert fisher.left_out == {"detached.weight": NOT_LINEAR, "idle.weight": NOT_LINEAR}


def test_a_large_side_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 2)).double()
    fisher = KroneckerFisher(model, squared_error, largest=8)
    fisher.update(rows(2))
    assert set(fisher.left_out.values()) == {"its matrix would have 9 rows, more than 8"}
    with pytest.raises(InputError, match=r"got none \(0\.weight: its matrix would have 9 rows"):
        fisher.matrices()


def test_sums_of_parts_of_the_data_add_up() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = rows(7)
    whole = factors_of(model, squared_error, (x, y), labels="observed")
    parts = [KroneckerFisher(model, squared_error, labels="observed") for _ in range(2)]
    parts[0].update((x[:2], y[:2]))
    parts[1].update((x[2:], y[2:]))
    totals = {key: value + parts[1].totals[key] for key, value in parts[0].totals.items()}
    parts[0].replace(totals, num_examples=7, refused={})
    assert_close(parts[0].matrices(3.0)["weight.input"], 3 * whole["weight.input"])
    assert_close(parts[0].matrices(3.0)["weight.output"], whole["weight.output"])


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double().train()
    model[0].bias.requires_grad_(False)
    state = torch.get_rng_state()
    with torch.no_grad():
        factors_of(model, squared_error, rows(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model[1].training
    assert not model[0].bias.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model[2].weight.requires_grad


def test_gradients_in_half_precision_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x, y = (value.float() for value in rows(6))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch[0])
        return F.mse_loss(output.float(), batch[1])

    found = factors_of(model, loss, (x, y), labels="observed")
    exact = factors_of(model, squared_error, (x, y), labels="observed")
    for name, factor in found.items():
        assert factor.dtype == torch.float32
        assert_close(factor, exact[name].double(), rtol=2e-2)


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(InputError, match="labels: must be"):
        KroneckerFisher(nn.Linear(2, 2), squared_error, labels="guessed")  # type: ignore[arg-type]
