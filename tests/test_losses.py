"""Losses reduced example by example: sequences of any length are examples of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lit_merge.curvature import PerExampleFisher, diagonal_hessian
from lit_merge.curvature.losses import LossInterception
from lit_merge.errors import InputError
from tests.tiny_models import padded_texts

LENGTHS = (6, 2, 4, 3)


def tiny_causal_lm(vocabulary: int = 50) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_positions=8,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def texts(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    batch = padded_texts(lengths)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def divided_sum(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """As the trainer of transformers calls it, with a number that fits no single text."""
    loss: Tensor = model(**batch, num_items_in_batch=11).loss
    return loss


def shifted(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """As in most training steps: T − 1 rows for every text."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows = logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(rows, batch["labels"][:, 1:].flatten())


def counted_sum(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Divided by the number of tokens of the batch, whatever they are."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows, labels = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    return F.cross_entropy(rows, labels, reduction="sum") / (labels >= 0).sum()


def squares_text_by_text(model: nn.Module, reduction: str) -> dict[str, Tensor]:
    """Every text alone and without padding."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i, length in enumerate(LENGTHS):
        tokens = texts()["input_ids"][i : i + 1, :length]
        log_p = model(tokens).logits[0, :-1].log_softmax(-1)
        losses = -log_p[torch.arange(length - 1), tokens[0, 1:]]
        loss = losses.mean() if reduction == "mean" else losses.sum()
        for name, gradient in zip(
            sums, torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            sums[name] += gradient**2
    return sums


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare to the precision of transformers' own loss, which is single even here."""
    assert got.keys() == expected.keys()
    for name, squares in expected.items():
        atol = 1e-6 * float(squares.max()) + 1e-14
        torch.testing.assert_close(got[name], squares, rtol=1e-5, atol=atol, msg=name)


class TestTextsOfDifferentLengths:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("loss", [own_loss, divided_sum, counted_sum, shifted])
    def test_every_text_is_an_example_of_its_own(self, loss: Any, reduction: Any) -> None:
        model = tiny_causal_lm()
        got = diagonal_hessian(model, [texts()], loss, labels="observed", reduction=reduction)
        assert_equal(got, squares_text_by_text(model, reduction))

    @pytest.mark.parametrize("loss", [own_loss, shifted])
    def test_without_it_their_mean_over_tokens_is_refused(self, loss: Any) -> None:
        with pytest.raises(InputError, match="loss: must be the mean over the examples"):
            diagonal_hessian(tiny_causal_lm(), [texts()], loss, labels="observed")

    def test_texts_of_one_length_have_the_mean_anyway(self) -> None:
        batch = texts((5, 5, 5))
        plain, mean = (
            diagonal_hessian(tiny_causal_lm(), [batch], own_loss, reduction=reduction, seed=2)
            for reduction in ("loss", "mean")
        )
        assert_equal(mean, plain)

    def test_a_text_without_any_target_is_an_example_without_loss(self) -> None:
        batch = texts()
        batch["labels"][2] = -100
        loss: Any = {"loss": own_loss, "labels": "observed", "reduction": "mean"}
        with_it = diagonal_hessian(tiny_causal_lm(), [batch], **loss)
        kept = {name: value[[0, 1, 3]] for name, value in batch.items()}
        assert_equal(with_it, diagonal_hessian(tiny_causal_lm(), [kept], **loss))


class TestTokensAsExamples:
    """The sum of a sequence's sampled scores has the expected square of the tokens' apart."""

    def per_token(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return Σ over tokens of Σ_y p(y) (∇ log p(y))²."""
        sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for i, t, weights, gradients in self.scores(model, batch):
            del i, t
            for p, scores in zip(weights, gradients, strict=True):
                for name, score in zip(sums, scores, strict=True):
                    sums[name] += p * score**2
        return sums

    def scores(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        """Yield text, position, [V] probabilities and [V] lists of gradients."""
        parameters = list(model.parameters())
        for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            log_p = model(batch["input_ids"][i : i + 1, :length]).logits[0, :-1].log_softmax(-1)
            for t, row in enumerate(log_p):
                gradients = [torch.autograd.grad(v, parameters, retain_graph=True) for v in row]
                yield i, t, row.exp().tolist(), gradients

    def small(self) -> dict[str, Tensor]:
        batch = texts((4, 2))
        changed = {"input_ids": batch["input_ids"] % 3}
        changed["labels"] = changed["input_ids"].where(batch["labels"] >= 0, -100)
        return {**batch, **changed}

    def test_by_enumeration_of_all_continuations(self) -> None:
        model, batch = tiny_causal_lm(3), self.small()
        by_text: dict[int, list[Any]] = {}
        for i, _, weights, gradients in self.scores(model, batch):
            by_text.setdefault(i, []).append(list(zip(weights, gradients, strict=True)))
        sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for positions in by_text.values():
            for labels in itertools.product(*positions):
                weight = torch.tensor([p for p, _ in labels]).double().prod()
                for k, name in enumerate(sums):
                    total = sum(gradients[k] for _, gradients in labels)
                    sums[name] += weight * total**2
        for name, exact in self.per_token(model, batch).items():
            atol = 1e-6 * float(exact.max()) + 1e-14
            torch.testing.assert_close(sums[name], exact, rtol=1e-5, atol=atol, msg=name)

    def test_the_mean_over_many_draws_is_the_curvature_per_token(self) -> None:
        model, batch, repeats = tiny_causal_lm(3), self.small(), 1000
        estimator = PerExampleFisher(model, own_loss, labels="sampled", reduction="sum", seed=1)
        estimator.probe(batch)
        estimator.update({name: value.repeat(repeats, 1) for name, value in batch.items()})
        got = estimator.sums()
        for name, exact in self.per_token(model, batch).items():
            mean = got[name] / repeats
            size = float(exact.sum())
            assert float((mean - exact).abs().sum()) < 0.15 * size + 1e-12, name
            assert float(mean.sum()) == pytest.approx(size, rel=0.08, abs=1e-12), name


def rows_of(size: int, each: int) -> Tensor:
    return torch.randn(size * each, 3, generator=torch.Generator().manual_seed(0)).double()


def by_calls(
    loss: Callable[..., Tensor], size: int, tensors: tuple[Tensor, ...], **settings: Any
) -> Tensor:
    """Call torch's function for every example alone, and average."""
    parts = zip(*(tensor.chunk(size) for tensor in tensors), strict=True)
    return torch.stack([loss(*part, **settings) for part in parts]).mean()


CLASS_WEIGHT = torch.tensor([0.5, 1.0, 4.0]).double()


class TestReduction:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("asked", ["mean", "sum"])
    @pytest.mark.parametrize(
        ("loss", "settings"),
        [
            (F.cross_entropy, {}),
            (F.cross_entropy, {"weight": CLASS_WEIGHT, "ignore_index": 1}),
            (F.cross_entropy, {"weight": CLASS_WEIGHT, "label_smoothing": 0.2}),
            (F.nll_loss, {"weight": CLASS_WEIGHT}),
        ],
    )
    def test_classes(self, loss: Any, settings: Any, reduction: Any, asked: Any) -> None:
        scores = rows_of(4, 5).log_softmax(-1).requires_grad_()
        target = torch.tensor([0, 2, 1, 2] * 5)
        with LossInterception(4, reduction) as interception:
            value = loss(scores, target, reduction=asked, **settings) * 1.0
        value = interception.scaled_back(value)
        expected = by_calls(loss, 4, (scores, target), reduction=reduction, **settings)
        torch.testing.assert_close(value, expected)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize(
        "loss", [F.mse_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits]
    )
    @pytest.mark.parametrize("masked", [False, True])
    def test_elements(self, loss: Any, reduction: Any, masked: bool) -> None:
        x, y = rows_of(4, 5).sigmoid(), rows_of(4, 5).flip(0).sigmoid()
        weight = (torch.arange(60).view(20, 3) % 4).double()
        if masked:
            with LossInterception(4, reduction):
                value = loss(x, y, weight=weight)
            parts = zip(*(t.chunk(4) for t in (x, y, weight)), strict=True)
            expected = torch.stack(
                [loss(a, b, weight=w, reduction=reduction) for a, b, w in parts]
            ).mean()
        else:
            with LossInterception(4, reduction):
                value = loss(x, y)
            expected = by_calls(loss, 4, (x, y), reduction=reduction)
        torch.testing.assert_close(value, expected)

    def test_soft_targets(self) -> None:
        x, y = rows_of(4, 5), rows_of(4, 5).flip(0).softmax(-1)
        with LossInterception(4, "mean"):
            value = F.cross_entropy(x, y, weight=CLASS_WEIGHT)
        torch.testing.assert_close(value, by_calls(F.cross_entropy, 4, (x, y), weight=CLASS_WEIGHT))

    def test_classes_in_the_second_dimension(self) -> None:
        x = rows_of(4, 5).view(4, 5, 3).movedim(1, 2)
        y = torch.arange(20).view(4, 5) % 3
        with LossInterception(4, "sum"):
            value = F.cross_entropy(x, y)
        torch.testing.assert_close(value, F.cross_entropy(x, y, reduction="sum") / 4)

    def test_the_old_arguments_of_torch_are_understood(self) -> None:
        x = rows_of(4, 5).requires_grad_()
        y = torch.zeros(20).long()
        with LossInterception(4, "mean") as interception:
            summed = F.cross_entropy(x, y, size_average=False) / 7
        torch.testing.assert_close(interception.scaled_back(summed), F.cross_entropy(x, y))

    def test_other_terms_and_factors_of_means_stay(self) -> None:
        x = rows_of(4, 5).requires_grad_()
        y = torch.zeros(20).long()
        with LossInterception(4, "mean") as interception:
            value = 0.3 * F.cross_entropy(x, y) + F.mse_loss(x, x + 2) + x.square().mean()
        value = interception.scaled_back(value)
        expected = 0.3 * F.cross_entropy(x, y) + 4 + x.square().mean()
        torch.testing.assert_close(value, expected)

    def test_other_terms_beside_a_sum_stay(self) -> None:
        x = rows_of(4, 5).requires_grad_()
        y = torch.zeros(20).long()
        with LossInterception(4, "mean") as interception:
            value = F.cross_entropy(x, y, reduction="sum") / 20 + x.square().mean()
        value = interception.scaled_back(value)
        expected = F.cross_entropy(x, y) + x.square().mean()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(
            torch.autograd.grad(value, x), torch.autograd.grad(expected, x), rtol=1e-9, atol=1e-12
        )

    def test_a_sum_is_put_right_where_nothing_requires_a_gradient(self) -> None:
        x, y = rows_of(4, 5), torch.zeros(20).long()
        with LossInterception(4, "mean") as interception:
            value = F.cross_entropy(x, y, reduction="sum") / 7 + x.square().mean()
        value = interception.scaled_back(value)
        torch.testing.assert_close(value, F.cross_entropy(x, y) + x.square().mean())
        assert not value.requires_grad


class TestRefused:
    def test_a_loss_that_reduces_by_itself(self) -> None:
        with (
            LossInterception(2, "mean"),
            pytest.raises(
                InputError, match=r'reduction: must be "loss" .* got "mean" and .*"none"'
            ),
        ):
            F.cross_entropy(rows_of(2, 2), torch.zeros(4).long(), reduction="none")

    def test_rows_that_are_not_whole_examples(self) -> None:
        with (
            LossInterception(3, "sum"),
            pytest.raises(InputError, match="got 4 rows for 3 examples"),
        ):
            F.cross_entropy(rows_of(2, 2), torch.zeros(4).long())

    def test_a_loss_without_a_loss_of_torch(self) -> None:
        with pytest.raises(InputError, match=r"another reduction; got none of these calls"):
            diagonal_hessian(
                nn.Linear(3, 1),
                [torch.ones(2, 3)],
                lambda m, b: m(b).square().mean(),
                labels="observed",
                reduction="mean",
            )

    def test_an_unknown_reduction(self) -> None:
        with pytest.raises(InputError, match='reduction: must be "loss", "mean" or "sum"; got'):
            PerExampleFisher(nn.Linear(3, 1), F.mse_loss, reduction="none")  # type: ignore[arg-type]
