"""Random batches for the architectures of transformers, and the losses that go with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TOKENS = 96


def own_loss(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    loss: Tensor = model(**batch[0], labels=batch[1], use_cache=False).loss
    return loss


def _tokens(count: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, TOKENS, (count, length), generator=generator)


def _normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _classes(count: int) -> Tensor:
    return torch.arange(count) % 3


def _padded(count: int, seed: int) -> dict[str, Tensor]:
    mask = torch.arange(9) < torch.tensor([9, 4, 7])[:count, None]
    return {
        "input_ids": _tokens(count, 9, seed).where(mask, 0),
        "attention_mask": mask.long(),
    }


def texts(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    return _padded(count, seed), _classes(count)


def whole_texts(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    return {"input_ids": _tokens(count, 9, seed)}, _classes(count)


def next_tokens(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    tokens = _tokens(count, 9, seed)
    return {"input_ids": tokens}, tokens


def masked_tokens(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    tokens, masked = _tokens(count, 9, seed), torch.arange(9) % 3 == 1
    return {"input_ids": tokens.masked_fill(masked, 2)}, tokens.masked_fill(~masked, -100)


def translations(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    return _padded(count, seed), _tokens(count, 6, seed + 1)


def images(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    return {"pixel_values": _normal(seed, count, 3, 32, 32)}, _classes(count)


def large_images(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    return {"pixel_values": _normal(seed, count, 3, 64, 64)}, _classes(count)


def waves(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    return {"input_values": _normal(seed, count, 400)}, _classes(count)


def spectra(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    return {"input_features": _normal(seed, count, 8, 24)}, _classes(count)


def spectrograms(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    return {"input_values": _normal(seed, count, 16, 8)}, _classes(count)


OWN_LOSS = (next_tokens, masked_tokens, translations)
