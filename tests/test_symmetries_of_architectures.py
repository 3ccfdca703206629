"""Symmetries of real architectures, tiny: as many as a person counts, and those of a library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from lit_merge.alignment.symmetries import find_symmetries, search_symmetries
from tests.tiny_models import images, tiny_bert, tiny_vit

TOKENS = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
LOGITS = {"input_ids": TOKENS, "use_cache": False}


def resnet(block: Any) -> nn.Module:
    return timm.models.ResNet(block, (2, 1, 1, 1), num_classes=3, channels=(8, 12, 16, 20))


def densenet() -> nn.Module:
    return timm.models.DenseNet(4, (2, 2), num_classes=3, bn_size=2)


def convnext() -> nn.Module:
    return timm.models.ConvNeXt(num_classes=3, depths=(1, 1, 1, 1), dims=(8, 12, 16, 20))


def swin() -> nn.Module:
    return timm.models.SwinTransformer(
        img_size=32, num_classes=3, embed_dim=8, depths=(1, 1), num_heads=(2, 4), window_size=4
    )


def mixer() -> nn.Module:
    return timm.models.MlpMixer(num_classes=3, img_size=32, num_blocks=2, embed_dim=12)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=50,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
    return T5ForConditionalGeneration(config)


def hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        image_size=32,
        patch_size=8,
    )
    return ViTForImageClassification(config)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 40, batch_first=True)
    return nn.Sequential(
        nn.Linear(6, 32),
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        nn.Linear(32, 3),
    )


def logits(model: nn.Module, inputs: Any) -> Tensor:
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return output if isinstance(output, Tensor) else output.logits


CASES: dict[str, tuple[Callable[[], nn.Module], Any, int, str]] = {
    # stem, 4 streams, and 1 or 2 within each of 5 blocks
    "resnet basic": (lambda: resnet(BasicBlock), images(2), 5 + 5, "layer1.0.downsample.0.weight"),
    "resnet bottleneck": (lambda: resnet(Bottleneck), images(2), 5 + 10, "layer1.0.conv3.weight"),
    # stem, transition, and 2 within each of 4 layers
    "densenet": (densenet, images(2), 10, "features.conv0.weight"),
    # 4 streams, 4 times hidden units
    "convnext": (convnext, images(2), 8, "stages.0.blocks.0.mlp.fc2.weight"),
    # 2 streams; hidden units and heads of 2 blocks; 2 within each of 2 + 4 heads
    "swin": (swin, images(2), 2 + 4 + 12, "patch_embed.proj.weight"),
    # channels; hidden units over channels and over tokens in 2 blocks
    "mixer": (mixer, images(2), 5, "blocks.0.mlp_channels.fc2.weight"),
    # stream; in each of 2 layers hidden units, heads, and 2 within each of 2 or 4 heads
    "vit": (tiny_vit, images(2), 1 + 2 * 6, "blocks.1.attn.proj.weight"),
    "vit of transformers": (hf_vit, images(2), 1 + 2 * 10, "vit.embeddings.cls_token"),
    "encoder": (encoder, torch.zeros(2, 5, 6), 1 + 2 * 10, "1.layers.1.linear2.weight"),
    "gpt2": (gpt2, LOGITS, 1 + 2 * 10, "transformer.wte.weight"),
    # the same, and the pooler
    "bert": (
        tiny_bert,
        {"input_ids": TOKENS},
        2 + 2 * 6,
        "bert.encoder.layer.1.output.dense.weight",
    ),
    # stream; in 2 layers hidden units, 2 key-value heads, in each 2 queries' heads and its values
    "llama": (llama, LOGITS, 1 + 2 * 6, "model.layers.1.self_attn.o_proj.weight"),
    # one stream; 4 times hidden units; heads tied over the layers by the bias, but in the
    # attention from decoder to encoder; 2 within each of 4 heads in 6 attentions
    "t5": (t5, {**LOGITS, "decoder_input_ids": TOKENS}, 1 + 4 + (2 + 2) + 48, "shared.weight"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_architecture_has_the_symmetries_that_one_counts(name: str) -> None:
    build, inputs, count, stream_weight = CASES[name]
    torch.manual_seed(0)
    model = build()
    proof = search_symmetries(model, inputs, forward=logits)
    assert len(proof.proved) == count
    assert not proof.rejected
    assert proof.error < 1e-11
    assert len({s.name for s in proof.proved}) == count
    longest = max(proof.proved, key=lambda s: len(s.axes))
    in_streams = {a.name for s in proof.proved if s.inside is None for a in s.axes}
    assert stream_weight in in_streams
    assert len(longest.axes) > len(model.state_dict()) / 8


def test_rotary_embeddings_leave_the_inner_dimensions_of_queries_and_keys_in_order() -> None:
    rows = {
        axis.name.split(".")[-2]
        for s in find_symmetries(llama(), LOGITS, forward=logits)
        if s.inside and s.size == 8
        for axis in s.axes
    }
    assert rows == {"v_proj", "o_proj"}


def test_queries_heads_stay_with_their_keys_head() -> None:
    found = find_symmetries(llama(), LOGITS, forward=logits)
    pairs = [s for s in found if s.name.startswith("model.layers.0.self_attn.q_proj") and s.inside]
    assert [s.size for s in pairs] == [2, 2]
    spans = [sorted(s.axes[0].positions.flatten().tolist()) for s in pairs]
    assert spans == [list(range(16)), list(range(16, 32))]


@pytest.mark.parametrize("name", ["resnet basic", "resnet bottleneck", "convnext", "densenet"])
def test_channels_are_those_of_torch_prunings_dependency_graph(name: str) -> None:
    pruning = pytest.importorskip("torch_pruning")
    build, inputs, _, _ = CASES[name]
    torch.manual_seed(0)
    model = build().eval()
    found = [
        {(a.name, a.axis) for a in s.axes if "running" not in a.name and "gamma" not in a.name}
        for s in find_symmetries(model, inputs)
    ]
    graph = pruning.DependencyGraph().build_dependency(model, inputs, verbose=False)
    modules = {module: path for path, module in model.named_modules()}
    last = list(modules.values())[-1]
    for group in graph.get_all_groups():
        coupled = {
            pair
            for item in group
            if (path := modules.get(item.dep.target.module))
            for pair in weights_of(model, path, item.dep.handler.__name__)
        }
        if (f"{last}.weight", 0) not in coupled:
            assert coupled in found or name == "densenet"
            assert any(coupled & pairs for pairs in found)


def weights_of(model: nn.Module, path: str, function: str) -> set[tuple[str, int]]:
    module = model.get_submodule(path)
    depthwise = getattr(module, "groups", 1) > 1
    if (
        function.endswith("in_channels")
        and not depthwise
        and module.get_parameter("weight").ndim > 1
    ):
        return {(f"{path}.weight", 1)}
    return {
        (f"{path}.{name}", 0)
        for name, _ in module.named_parameters(recurse=False)
        if name != "gamma"
    }
