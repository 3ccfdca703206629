"""The models and batches that the curvature benchmarks run on, and what is true of them.

All are random networks in eval mode, without dropout (some libraries work in training mode only),
with the loss ``cross_entropy(model(inputs), targets)`` (some need it as a module of its own). Every
example has the same number of terms, so the mean over all terms is the mean over the examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

BATCH = 32
Pair = tuple[Tensor, Tensor]
"""Inputs and targets."""


@dataclass(frozen=True)
class Case:
    """A model and one batch for it.

    Attributes:
        model: Maps inputs to scores, with the classes in dimension 1.
        batch: Inputs and targets of B examples.
    """

    model: nn.Module
    batch: Pair

    def first(self, count: int) -> Pair:
        """Return the batch of the first few examples."""
        return self.batch[0][:count], self.batch[1][:count]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name, tied ones once."""
        return dict(self.model.named_parameters())


def mean_loss(model: nn.Module, batch: Pair) -> Tensor:
    """Return the mean loss of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


class TextClassifier(nn.Module):
    """A BERT classifier as a function of the tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.network = BertForSequenceClassification(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores [B, K] of texts [B, T] without padding."""
        mask = torch.ones_like(tokens)
        return cast(Tensor, self.network(input_ids=tokens, attention_mask=mask).logits)


class LanguageModel(nn.Module):
    """A GPT-2 as a function of the tokens before each predicted one."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.network = GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores [B, V, T] of the next tokens."""
        return cast(Tensor, self.network(input_ids=tokens, use_cache=False).logits).transpose(1, 2)


def minilm() -> Case:
    """The shape of all-MiniLM-L6 (22.7 M parameters), 64 tokens, two classes."""
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tokens = torch.randint(1000, 30000, (BATCH, 64))
    return Case(TextClassifier(config).eval(), (tokens, torch.randint(2, (BATCH,))))


def gpt2() -> Case:
    """A small GPT-2 (13.8 M parameters), 128 predictions a text, head tied to the embedding.

    The vocabulary of 8192 is that of a model of this size; with GPT-2's 50257 the head alone would
    take most of the time.
    """
    config = GPT2Config(
        vocab_size=8192,
        n_embd=384,
        n_layer=6,
        n_head=6,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    tokens = torch.randint(8192, (BATCH, 129))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return Case(LanguageModel(config).eval(), batch)


def image_classifier(name: str, **options: int) -> Case:
    """A model of timm with ten classes on random images of 64 × 64."""
    model = timm.create_model(name, num_classes=10, **options)
    return Case(model.eval(), (torch.randn(BATCH, 3, 64, 64), torch.randint(10, (BATCH,))))


CASES: dict[str, Callable[[], Case]] = {
    "MiniLM, T=64": minilm,
    "ViT-tiny, T=65": lambda: image_classifier("vit_tiny_patch16_224", img_size=64, patch_size=8),
    "ResNet18, 64x64": lambda: image_classifier("resnet18"),
    "GPT-2, T=128": gpt2,
}


def build(name: str) -> Case:
    """Return a case; the same random numbers every time."""
    torch.manual_seed(0)
    return CASES[name]()


def single_examples(batch: Pair) -> Iterator[Pair]:
    """Yield the batches of one example."""
    yield from zip(batch[0].split(1), batch[1].split(1), strict=True)


def squares_by_loop(case: Case, batch: Pair) -> dict[str, Tensor]:
    """Return Σ_n g_n² from a backward per example, by parameter name; leaves no gradients."""
    parameters = case.parameters()
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for example in single_examples(batch):
        gradients = torch.autograd.grad(
            mean_loss(case.model, example), list(parameters.values()), materialize_grads=True
        )
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total.addcmul_(gradient, gradient)
    return sums


def truth(name: str, count: int) -> dict[str, Tensor]:
    """Return Σ_n g_n² over the first few examples of a case, in float64."""
    case = build(name)
    case.model.double()
    inputs, targets = case.first(count)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    return squares_by_loop(case, (inputs, targets))


@dataclass(frozen=True)
class Accuracy:
    """How far a result is from the truth.

    Attributes:
        error: The largest difference relative to its tensor's largest entry, among the tensors
            that are not missing.
        worst: The tensor with that error.
        wrong: How many tensors have an error that single precision does not explain.
        missing: How many tensors have no result.
    """

    error: float
    worst: str
    wrong: int
    missing: int

    @property
    def right(self) -> bool:
        """Whether single precision explains all errors, and nothing is missing."""
        return self.missing == self.wrong == 0


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Accuracy:
    """Compare sums by parameter name.

    A tensor whose true gradient is zero (the bias of attention keys) is compared on the scale of
    rounding, 1e-12 of the largest square of all.
    """
    floor = 1e-12 * max(float(value.max()) for value in expected.values())
    errors = {
        name: float((found[name].double() - value).abs().max()) / max(float(value.max()), floor)
        for name, value in expected.items()
        if name in found
    }
    missing = sum(name not in found for name in expected)
    if not errors:
        return Accuracy(math.nan, "", 0, missing)
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    wrong = sum(not error < 1e-3 for error in errors.values())  # NaN is wrong, too
    return Accuracy(errors[worst], worst, wrong, missing)
