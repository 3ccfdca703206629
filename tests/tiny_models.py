"""Tiny random networks of the three sorts that corrections meet: ViT, conv net, BERT."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn


def tiny_vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        depth=2,
        embed_dim=32,
        num_heads=2,
        num_classes=5,
    )
    return model.eval()


def tiny_conv_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def tiny_bert(seed: int = 0) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
    )
    model: nn.Module = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():  # the default, 0.02, leaves nothing to measure
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def images(count: int, seed: int = 0, channels: int = 3) -> Tensor:
    size = 32 if channels == 3 else 12
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def padded_texts(lengths: tuple[int, ...], seed: int = 0, pad_token: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 50, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": tokens.where(mask, pad_token), "attention_mask": mask.long()}
