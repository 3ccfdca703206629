"""Small models with LoRA adapters, made and saved by PEFT."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.tiny_models import tiny_bert

RANK = 4


class Layers(nn.Module):
    """One of each layer that is no Linear, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.point = nn.Conv2d(8, 6, 1)
        self.signal = nn.Conv1d(4, 10, 5)
        self.table = nn.Embedding(13, 6)
        self.attention = nn.MultiheadAttention(8, 2)
        self.square = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x


def layers() -> nn.Module:
    torch.manual_seed(0)
    return Layers()


def gpt2() -> nn.Module:
    """A GPT-2, whose weights are [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model.eval()


def bert() -> nn.Module:
    return tiny_bert()


def save_base(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model's state dict, tied tensors once, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    state, seen = {}, set()
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            state[name] = value.to(dtype) if value.is_floating_point() else value
    save_file(state, folder / "base.safetensors")
    return folder / "base.safetensors"


def adapted(model: nn.Module, seed: int, **config: Any) -> Any:
    """Return a copy of a model with an adapter of PEFT, none of whose tensors is as it began."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"r": RANK, "lora_alpha": 6, **config}
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return wrapped


def save_adapter(wrapped: Any, folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder, **options)
    return folder


def merged_by_peft(wrapped: Any) -> dict[str, Tensor]:
    """Return the tensors of PEFT's own merge_and_unload."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = copy.deepcopy(wrapped).merge_and_unload()
    return {name: value.detach() for name, value in model.state_dict().items()}
