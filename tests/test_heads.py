from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from lit_merge.heads import detect_heads
from lit_merge.parameters import detect_heads as from_parameters

BERT: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
}
GPT: dict[str, Any] = {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}


class Wrapper(nn.Module):
    """A LightningModule's shape: a model somewhere inside, and a loss with weights of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.criterion = nn.PReLU()
        self.inner = nn.ModuleDict({"net": model})


def bert(kind: Any) -> Any:
    return kind(BertConfig(**BERT))


def distilbert() -> Any:
    config = DistilBertConfig(vocab_size=20, dim=8, n_layers=1, n_heads=2, hidden_dim=8)
    return DistilBertForSequenceClassification(config)


def vit() -> Any:
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    return ViTForImageClassification(config)


def timm_vit(num_classes: int) -> Any:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        embed_dim=24,
        depth=1,
        num_heads=2,
        num_classes=num_classes,
    )


def plain() -> nn.Module:
    parts = {"body": nn.Linear(3, 4), "head": nn.Sequential(nn.ReLU(), nn.Linear(4, 2))}
    return nn.ModuleDict(parts)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: timm_vit(3), ("head.weight", "head.bias")),
        (lambda: timm_vit(0), ()),
        (lambda: timm.create_model("resnet10t", num_classes=3), ("fc.weight", "fc.bias")),
        (
            lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1),
            ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias"),
        ),
        (lambda: bert(BertForSequenceClassification), ("classifier.weight", "classifier.bias")),
        (lambda: bert(BertModel), ()),
        (lambda: bert(BertForMaskedLM), ()),
        (
            distilbert,
            (
                "pre_classifier.weight",
                "pre_classifier.bias",
                "classifier.weight",
                "classifier.bias",
            ),
        ),
        (vit, ("classifier.weight", "classifier.bias")),
        (lambda: GPT2ForSequenceClassification(GPT2Config(**GPT)), ("score.weight",)),
        (lambda: GPT2LMHeadModel(GPT2Config(**GPT)), ()),
        (plain, ("head.1.weight", "head.1.bias")),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ()),
    ],
)
def test_heads_are_found_in_models_of_every_library(
    build: Any, expected: tuple[str, ...], wrapped: bool
) -> None:
    torch.manual_seed(0)
    model = Wrapper(build()) if wrapped else build()
    prefix = "inner.net." if wrapped else ""
    found = detect_heads(model)
    assert found == tuple(prefix + name for name in expected)
    assert set(found) <= {name for name, _ in model.named_parameters()}


def test_a_head_that_is_tied_to_the_body_is_no_head() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embed"].weight
    assert detect_heads(model) == ("head.bias",)


def test_an_embedding_called_head_is_not_taken_for_a_layer() -> None:
    assert detect_heads(nn.ModuleDict({"head": nn.Embedding(5, 3)})) == ()


def test_the_name_is_also_in_parameters() -> None:
    assert from_parameters is detect_heads
