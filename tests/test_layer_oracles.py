"""Every kind of layer against a loop over single examples, and whether it is computed at once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from tests.oracle_nets import Case, Net, assert_exact

ALL = ("layer.*",)


def through(net: Any, x: Tensor) -> Tensor:
    return net.layer(x)


def of(layer: nn.Module, *, stem: int = 6) -> Net:
    return Net(through, stem=stem, layer=layer)


def of_tokens(layer: nn.Module) -> Net:
    return of(layer, stem=0)


LINEAR = {
    "rows": Case(lambda: of(nn.Linear(6, 5)), (6,)),
    "tokens": Case(lambda: of(nn.Linear(6, 5))),
    "two tokens": Case(lambda: of(nn.Linear(6, 5)), (2, 6)),
    "many tokens": Case(lambda: of(nn.Linear(6, 5)), (40, 6)),
    "maps": Case(lambda: of(nn.Linear(6, 5)), (2, 3, 6)),
    "without bias": Case(lambda: of(nn.Linear(6, 5, bias=False))),
    "GPT-2's": Case(lambda: of(Conv1D(5, 6))),
    "on the input": Case(lambda: of(nn.Linear(6, 5), stem=0)),
    "transposed tokens": Case(lambda: Net(lambda m, x: m.layer(x.mT), layer=nn.Linear(4, 5))),
    "examples second": Case(
        lambda: Net(lambda m, x: m.layer(x.transpose(0, 1)).transpose(0, 1), layer=nn.Linear(6, 5)),
        one_by_one=ALL,
    ),
    "windows": Case(
        lambda: Net(
            lambda m, x: m.layer(x.unflatten(1, (2, 2)).flatten(0, 1)).unflatten(0, (-1, 2)),
            layer=nn.Linear(6, 5),
        )
    ),
    "a choice of tokens": Case(
        lambda: Net(
            lambda m, x: m.layer(x[:, :2]) + m.layer(x[:, 2:]).tanh(), layer=nn.Linear(6, 5)
        )
    ),
}

_CONVOLUTIONS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "1d": (nn.Conv1d, (4, 6), {"kernel_size": 3}),
    "1d dilated, strided": (
        nn.Conv1d,
        (4, 6),
        {"kernel_size": 2, "dilation": 2, "stride": 2, "padding": 1},
    ),
    "1d grouped": (nn.Conv1d, (4, 6), {"kernel_size": 3, "groups": 2, "bias": False}),
    "1d same": (nn.Conv1d, (4, 6), {"kernel_size": 3, "padding": "same", "dilation": 2}),
    "2d": (nn.Conv2d, (4, 5, 6), {"kernel_size": 3, "padding": 1}),
    "2d pointwise": (nn.Conv2d, (4, 5, 6), {"kernel_size": 1}),
    "2d patches": (nn.Conv2d, (4, 6, 6), {"kernel_size": 3, "stride": 3}),
    "2d grouped": (nn.Conv2d, (4, 5, 6), {"kernel_size": 3, "groups": 2, "stride": (2, 1)}),
    "2d depthwise": (nn.Conv2d, (4, 5, 6), {"kernel_size": 3, "groups": 4, "padding": 1}),
    "2d dilated": (nn.Conv2d, (4, 5, 6), {"kernel_size": (3, 2), "dilation": (1, 3)}),
    "2d same": (nn.Conv2d, (4, 5, 6), {"kernel_size": (3, 5), "padding": "same"}),
    "2d circular": (
        nn.Conv2d,
        (4, 5, 6),
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ),
    "2d reflect": (
        nn.Conv2d,
        (4, 5, 6),
        {"kernel_size": 3, "padding": "same", "padding_mode": "reflect", "groups": 4},
    ),
    "2d replicate": (
        nn.Conv2d,
        (4, 5, 6),
        {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"},
    ),
    "2d in one place": (nn.Conv2d, (4, 5, 6), {"kernel_size": (5, 6)}),
    "3d": (nn.Conv3d, (4, 3, 4, 6), {"kernel_size": 2}),
    "3d grouped": (nn.Conv3d, (4, 3, 4, 6), {"kernel_size": 3, "groups": 2, "padding": (1, 1, 0)}),
    "3d same": (nn.Conv3d, (4, 3, 4, 6), {"kernel_size": 3, "padding": "same", "dilation": 2}),
    "1d transposed": (nn.ConvTranspose1d, (4, 6), {"kernel_size": 3, "stride": 2}),
    "2d transposed": (nn.ConvTranspose2d, (4, 5, 6), {"kernel_size": 3, "padding": 1}),
    "2d transposed, output padding": (
        nn.ConvTranspose2d,
        (4, 5, 6),
        {"kernel_size": 3, "stride": 2, "output_padding": (1, 0), "dilation": 2},
    ),
    "2d transposed, grouped": (
        nn.ConvTranspose2d,
        (4, 5, 6),
        {"kernel_size": 2, "stride": 2, "groups": 2, "bias": False},
    ),
    "3d transposed": (nn.ConvTranspose3d, (4, 2, 3, 6), {"kernel_size": 2, "groups": 2}),
}


def _convolution(name: str) -> Case:
    kind, shape, settings = _CONVOLUTIONS[name]
    return Case(lambda: of(kind(4, 4, **settings)), shape)


CONVOLUTIONS = {name: _convolution(name) for name in _CONVOLUTIONS} | {
    "channels last": Case(
        lambda: Net(
            lambda m, x: m.layer(x.contiguous(memory_format=torch.channels_last)),
            layer=nn.Conv2d(4, 4, 3),
        ),
        (4, 5, 6),
    ),
    "standardised weight": Case(lambda: of(timm.layers.StdConv2d(4, 4, 3)), (4, 5, 6)),
    "scaled standardised weight": Case(lambda: of(timm.layers.ScaledStdConv2d(4, 4, 3)), (4, 5, 6)),
}


def _bags(mode: str, **settings: Any) -> Net:
    return of_tokens(nn.EmbeddingBag(9, 5, mode=mode, **settings))


def _bags_by_offsets(mode: str) -> Net:
    def use(net: Any, x: Tensor) -> Tensor:
        return net.layer(x.flatten(), torch.arange(0, x.numel(), x.shape[1]))

    return Net(use, stem=0, layer=nn.EmbeddingBag(9, 5, mode=mode))


def _weighted_bags() -> Net:
    return Net(
        lambda m, x: m.layer(x, per_sample_weights=m.score(x)[..., 0]),
        stem=0,
        layer=nn.EmbeddingBag(9, 5, mode="sum"),
        score=nn.Embedding(9, 1),
    )


EMBEDDINGS = {
    "embedding": Case(lambda: of_tokens(nn.Embedding(9, 5)), (4,), tokens=9),
    "embedding with padding": Case(
        lambda: of_tokens(nn.Embedding(9, 5, padding_idx=1)), (4,), tokens=9
    ),
    "embedding of one token": Case(lambda: of_tokens(nn.Embedding(9, 5)), (), tokens=9),
    "bags: sum": Case(lambda: _bags("sum"), (4,), tokens=9),
    "bags: mean, padding": Case(lambda: _bags("mean", padding_idx=2), (4,), tokens=9),
    "bags: max": Case(lambda: _bags("max"), (4,), ALL, tokens=9),
    "bags: sum by offsets": Case(lambda: _bags_by_offsets("sum"), (4,), ALL, tokens=9),
    "bags: mean by offsets": Case(lambda: _bags_by_offsets("mean"), (4,), ALL, tokens=9),
    "bags: weighted": Case(_weighted_bags, (4,), tokens=9),
}

NORMS = {
    "layer norm": Case(lambda: of(nn.LayerNorm(6))),
    "layer norm of two dimensions": Case(lambda: of(nn.LayerNorm((4, 6))), (3, 4, 6)),
    "layer norm without bias": Case(lambda: of(nn.LayerNorm(6, bias=False)), (6,)),
    "layer norm of channels": Case(lambda: of(timm.layers.LayerNorm2d(4)), (4, 5, 6)),
    "group norm": Case(lambda: of(nn.GroupNorm(2, 4)), (4, 5, 6)),
    "group norm of rows": Case(lambda: of(nn.GroupNorm(3, 6)), (6,)),
    "instance norm 1d": Case(lambda: of(nn.InstanceNorm1d(4, affine=True)), (4, 6)),
    "instance norm 2d": Case(lambda: of(nn.InstanceNorm2d(4, affine=True)), (4, 5, 6)),
    "instance norm with statistics": Case(
        lambda: of(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), (4, 5, 6)
    ),
    "batch norm of rows": Case(lambda: of(nn.BatchNorm1d(6)), (6,)),
    "batch norm 1d": Case(lambda: of(nn.BatchNorm1d(4)), (4, 6)),
    "batch norm 2d": Case(lambda: of(nn.BatchNorm2d(4)), (4, 5, 6)),
    "batch norm 3d": Case(lambda: of(nn.BatchNorm3d(4)), (4, 2, 3, 6)),
    "batch norm before tokens": Case(
        lambda: Net(lambda m, x: m.layer(x).flatten(2).mT.cos(), layer=nn.BatchNorm2d(4)),
        (4, 5, 6),
    ),
    "batch norm and activation": Case(lambda: of(timm.layers.BatchNormAct2d(4)), (4, 5, 6)),
    "RMS norm": Case(lambda: of(nn.RMSNorm(6))),
    "RMS norm of two dimensions": Case(lambda: of(nn.RMSNorm((4, 6), eps=1e-3)), (3, 4, 6)),
    "timm's RMS norm": Case(lambda: of(timm.layers.RmsNorm(6))),
    "timm's simple norm": Case(lambda: of(timm.layers.SimpleNorm(6))),
    "Llama's RMS norm": Case(lambda: of(LlamaRMSNorm(6)), rtol=1e-6),
    "T5's RMS norm": Case(lambda: of(T5LayerNorm(6)), rtol=1e-6),
    "Gemma's RMS norm": Case(lambda: of(GemmaRMSNorm(6)), rtol=1e-6),
}


def _attention(*, weights: bool = False, batch_first: bool = True, **settings: Any) -> Net:
    def use(net: Any, x: Tensor) -> Tensor:
        x = x if batch_first else x.transpose(0, 1)
        y = net.layer(x, x, x, need_weights=weights)[0]
        return y if batch_first else y.transpose(0, 1)

    return Net(use, layer=nn.MultiheadAttention(6, 2, batch_first=batch_first, **settings))


def _cross_attention(*, masked: bool = False, **widths: int) -> Net:
    def use(net: Any, x: Tensor) -> Tensor:
        keys, values = net.keys(x), net.values(x)
        mask = x[..., 0] < -0.5 if masked else None
        if mask is not None:
            mask = mask & (torch.arange(x.shape[1]) > 0)
        return net.layer(x[:, :2], keys, values, key_padding_mask=mask, need_weights=False)[0]

    attention = nn.MultiheadAttention(6, 2, batch_first=True, **widths)
    keys = nn.Linear(6, widths.get("kdim", 6))
    return Net(use, layer=attention, keys=keys, values=nn.Linear(6, widths.get("vdim", 6)))


def _transformer_layer(kind: type[nn.Module], **settings: Any) -> Net:
    def use(net: Any, x: Tensor) -> Tensor:
        return net.layer(x, x.flip(1)) if kind is nn.TransformerDecoderLayer else net.layer(x)

    return Net(use, layer=kind(6, 2, dim_feedforward=8, **settings))


ATTENTION = {
    "self": Case(_attention),
    "self, weights asked for": Case(lambda: _attention(weights=True)),
    "self, examples second": Case(lambda: _attention(batch_first=False)),
    "self, biases to keys": Case(
        lambda: _attention(add_bias_kv=True, add_zero_attn=True),
        one_by_one=ALL,
    ),
    "self without bias": Case(lambda: _attention(bias=False)),
    "cross": Case(_cross_attention),
    "cross, masked": Case(lambda: _cross_attention(masked=True)),
    "cross, other widths": Case(
        lambda: _cross_attention(kdim=5, vdim=3),
    ),
    "encoder layer": Case(
        lambda: _transformer_layer(nn.TransformerEncoderLayer, batch_first=True),
    ),
    "encoder layer, norm first": Case(
        lambda: _transformer_layer(nn.TransformerEncoderLayer, batch_first=True, norm_first=True),
    ),
    "decoder layer": Case(
        lambda: _transformer_layer(nn.TransformerDecoderLayer, batch_first=True),
    ),
}


def _recurrent(kind: type[nn.Module], **settings: Any) -> Net:
    return Net(lambda m, x: m.layer(x)[0], layer=kind(6, 5, batch_first=True, **settings))


def _bilinear() -> Net:
    return Net(lambda m, x: m.layer(x[:, 0], x[:, 1].sin()), layer=nn.Bilinear(6, 6, 5))


def _wrapped(wrap: Any, layer: nn.Module) -> Net:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return of(wrap(layer))


def _lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["layer", "table"], lora_dropout=0.3)
    net = Net(
        lambda m, x: m.layer(x) + m.table(torch.arange(x.shape[1])),
        layer=nn.Linear(6, 5),
        table=nn.Embedding(4, 5),
    )
    return get_peft_model(net, config)


def _frozen() -> Net:
    net = Net(lambda m, x: m.norm(m.layer(x)), layer=nn.Linear(6, 5), norm=nn.LayerNorm(5))
    net.layer.weight.requires_grad_(False)
    net.norm.bias.requires_grad_(False)
    net.stem.requires_grad_(False)
    return net


def _checkpointed() -> Net:
    block = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.LayerNorm(5))
    return Net(lambda m, x: checkpoint(m.layer, x, use_reentrant=False), layer=block)


def _in_parallel(net: Any, x: Tensor) -> Tensor:
    return torch.cat([net.layer(x), net.layer(x[:, :3].sin())], 1)


OTHERS = {
    "PReLU": Case(lambda: of(nn.PReLU())),
    "PReLU of channels": Case(lambda: of(nn.PReLU(4)), (4, 5, 6)),
    "bilinear": Case(_bilinear, one_by_one=ALL),
    "LSTM": Case(lambda: _recurrent(nn.LSTM), one_by_one=ALL),
    "LSTM, two directions": Case(
        lambda: _recurrent(nn.LSTM, bidirectional=True, num_layers=2), one_by_one=ALL
    ),
    "GRU": Case(lambda: _recurrent(nn.GRU), one_by_one=ALL),
    "GRU cell": Case(
        lambda: Net(lambda m, x: m.layer(x[:, 1], m.layer(x[:, 0])), layer=nn.GRUCell(6, 6)),
        one_by_one=ALL,
    ),
    "weight norm": Case(lambda: _wrapped(parametrizations.weight_norm, nn.Linear(6, 5))),
    "weight norm of a convolution": Case(
        lambda: _wrapped(parametrizations.weight_norm, nn.Conv1d(4, 4, 3))
    ),
    "spectral norm": Case(lambda: _wrapped(parametrizations.spectral_norm, nn.Linear(6, 5))),
    "orthogonal": Case(lambda: _wrapped(parametrizations.orthogonal, nn.Linear(6, 5))),
    "LoRA": Case(_lora),
    "frozen parameters": Case(_frozen),
    "activation checkpointing": Case(_checkpointed),
    "ReLU in place": Case(
        lambda: of(nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)))
    ),
    "ReLU in place on a norm": Case(
        lambda: of(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True))), (4, 5, 6)
    ),
    "twice in sequence": Case(
        lambda: Net(lambda m, x: m.layer(m.layer(x).tanh()), layer=nn.Linear(6, 6))
    ),
    "twice in parallel": Case(lambda: Net(_in_parallel, layer=nn.Linear(6, 5))),
    "convolution twice": Case(
        lambda: Net(lambda m, x: m.layer(m.layer(x).tanh()), layer=nn.Conv2d(4, 4, 3)), (4, 5, 6)
    ),
    "norm twice": Case(lambda: Net(_in_parallel, layer=nn.LayerNorm(6))),
}

CASES = {
    f"{group}: {name}": case
    for group, cases in {
        "linear": LINEAR,
        "convolution": CONVOLUTIONS,
        "embedding": EMBEDDINGS,
        "norm": NORMS,
        "attention": ATTENTION,
        "other": OTHERS,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_the_loop(name: str) -> None:
    case = CASES[name]
    model = case.model()
    assert_exact(model, case.batches(), one_by_one=case.one_by_one, rtol=case.rtol)
