"""Blocks, branches, attention contexts and final features: found, and what is there is right."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from lit_merge.correction.forward import run_model, watch_site
from lit_merge.correction.site import Site
from lit_merge.correction.sites import find_sites
from lit_merge.errors import InputError
from lit_merge.merged.network import check_sites
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_conv_net, tiny_vit

TEXTS = {"input_ids": torch.arange(1, 13).view(2, 6)}


def names(model: nn.Module, where: str, inputs: Any) -> list[str]:
    return [site.name for site in find_sites(model, where=where, example_inputs=inputs)]


def seen_at(model: nn.Module, where: str, inputs: Any) -> dict[str, Tensor]:
    """The activations at the sites of a kind, channels last, with the output under "logits"."""
    seen: dict[str, Tensor] = {}
    sites = find_sites(model, where=where, example_inputs=inputs)
    for site in sites:
        watch_site(model, site, lambda x, name=site.name: seen.update({name: x.clone()}))
    seen["logits"] = run_model(model, inputs)
    return seen


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
        pad_token_id=0,
    )
    model: nn.Module = LlamaForSequenceClassification(config)
    return model.eval()


def tiny_t5() -> nn.Module:
    from transformers import T5Config, T5Model

    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=50)
    model: nn.Module = T5Model(config)
    return model.eval()


class Residual(nn.Module):
    """A plain residual block of the kind that people write themselves."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(width, out, 1) if width != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        y += x if self.shortcut is None else self.shortcut(x)
        return y.relu_()


class PlainResNet(nn.Module):
    """Blocks as attributes, no list of them; additions and activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.block1 = Residual(4, 4)
        self.block2 = Residual(4, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block2(self.block1(self.stem(x).relu_())).mean((2, 3)))


def test_branches_are_what_the_blocks_of_a_pre_norm_transformer_add() -> None:
    given: dict[str, Tensor] = {}
    for model, inputs in ((tiny_vit(), images(2)), (tiny_llama(), TEXTS)):
        sites = find_sites(model, where="block", example_inputs=inputs)
        blocks = [site.name for site in sites]
        for name in blocks:
            site = Site(f"{name}:input", sites[0].num_features, -1)
            watch_site(model, site, lambda x, name=name: given.update({name: x.clone()}))
        branches = seen_at(model, "branch", inputs)
        outputs = seen_at(model, "block", inputs)
        assert len(blocks) == 2
        assert len(branches) == 1 + 4
        for name in blocks:
            added = sum(x for key, x in branches.items() if key.startswith(name + "."))
            torch.testing.assert_close(given[name] + added, outputs[name])


def test_the_attention_context_is_the_mean_of_the_values_under_the_attention() -> None:
    model, inputs = tiny_vit(), images(2)
    qkv: dict[str, Tensor] = {}
    for site in find_sites(model, where="*.qkv"):
        watch_site(model, site, lambda x, name=site.name: qkv.update({name: x.clone()}))
    contexts = seen_at(model, "attention", inputs)
    for block in (0, 1):
        joint = qkv[f"blocks.{block}.attn.qkv"].double()
        q, k, v = joint.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        expected = ((q @ k.mT) / 4).softmax(-1) @ v
        found = contexts[f"blocks.{block}.attn.proj:input"].double()
        torch.testing.assert_close(found, expected.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(tiny_vit(), images(2)), (timm.create_model("test_convnext").eval(), images(2))],
)
def test_the_head_makes_the_logits_of_the_final_feature(model: nn.Module, inputs: Tensor) -> None:
    ((name, feature), (_, logits)) = seen_at(model, "final", inputs).items()
    head = model.get_submodule(name.removesuffix(":input"))
    torch.testing.assert_close(head(feature), logits)


def test_the_final_feature_is_found_without_examples_and_though_heads_are_excluded() -> None:
    sites = find_sites(tiny_vit(), where="final", exclude=("head.weight", "head.bias"))
    assert sites == (Site("head:input", 32, -1),)
    assert find_sites(tiny_bert(), where="final") == (Site("classifier:input", 16, -1),)
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert find_sites(plain, where="final", exclude=["2.weight"]) == (Site("2:input", 4, -1),)


def test_post_norm_and_encoder_decoder_transformers() -> None:
    bert, texts = tiny_bert(), padded_texts((5, 3))
    layers = [f"bert.encoder.layer.{n}" for n in (0, 1)]
    dense = [f"{n}.{part}" for n in layers for part in ("attention.output.dense", "output.dense")]
    assert names(bert, "block", texts) == layers
    assert names(bert, "branch", texts) == dense
    assert names(bert, "attention", texts) == [f"{name}:input" for name in dense[::2]]
    t5, both = tiny_t5(), {**TEXTS, "decoder_input_ids": torch.ones(2, 3, dtype=torch.int64)}
    blocks = [f"{part}.block.{n}" for part in ("encoder", "decoder") for n in (0, 1)]
    assert names(t5, "block", both) == blocks
    assert len(names(t5, "branch", both)) == 2 * 2 + 2 * 3
    assert len(names(t5, "attention", both)) == 2 * 1 + 2 * 2


def test_conv_nets() -> None:
    resnet = timm.create_model("test_resnet", num_classes=3)
    assert names(resnet, "block", images(2)) == [f"layer{n}.0" for n in (1, 2, 3, 4)]
    assert names(resnet, "branch", images(2)) == [
        "layer1.0.bn2",
        "layer2.0.bn2",
        "layer2.0.downsample.2",
        "layer3.0.bn3",
        "layer3.0.downsample.2",
        "layer4.0.bn2",
        "layer4.0.downsample.2",
    ]
    plain = PlainResNet()
    assert names(plain, "block", images(2)) == ["block1", "block2"]
    assert names(plain, "branch", images(2)) == ["block1.bn2", "block2.bn2", "block2.shortcut"]
    convs = [site.name for site in find_sites(plain, where="conv")]
    assert convs[0] == "stem.0"
    assert len(convs) == 6


def test_channels_of_blocks_are_where_their_layers_have_them() -> None:
    model, inputs = timm.create_model("test_convnext"), images(2)
    for where in ("block", "branch"):
        sites = find_sites(model, where=where, example_inputs=inputs)
        assert {site.channel_dim for site in sites} == {1}  # though the last layers are Linear
        assert {site.num_features for site in sites} == {24, 32, 48, 64}
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    )
    found = find_sites(encoder, where=["branch", "block"], example_inputs=torch.randn(2, 5, 8))
    assert {(site.num_features, site.channel_dim) for site in found} == {(8, -1)}
    assert [site.name for site in found if "." not in site.name.removeprefix("layers.")] == [
        "layers.0",
        "layers.1",
    ]


def test_blocks_are_the_modules_of_stages_and_not_the_stages() -> None:
    model = timm.create_model("test_convnext", num_classes=3)
    blocks = names(model, "block", images(2))
    assert len(blocks) == sum(len(stage.blocks) for stage in model.stages) == 9
    regnet = timm.create_model("regnety_002", num_classes=3)  # blocks are no lists there
    assert len(names(regnet, "block", images(2))) == 1 + 1 + 4 + 7


def test_a_pattern_reaches_containers_and_inputs_when_a_run_shows_their_channels() -> None:
    model, inputs = tiny_vit(), images(2)
    found = find_sites(model, where="blocks.?", example_inputs=inputs)
    assert found == (Site("blocks.0", 32, -1), Site("blocks.1", 32, -1))
    both = find_sites(model, where=["blocks.0.mlp.fc2:input", "blocks.0.mlp.*"])
    assert [site.name for site in both] == [
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2:input",
        "blocks.0.mlp.fc2",
    ]
    assert both[1].num_features == 128


def test_a_run_leaves_the_model_as_it_was() -> None:
    model = tiny_conv_net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_sites(model, where="*", example_inputs=images(2, channels=1))
    find_sites(model, where="?", example_inputs=images(2, channels=1))
    with pytest.raises(InputError):
        find_sites(model, where="block", example_inputs=images(2, channels=1))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(module.training for module in model.modules())


def test_kinds_that_only_a_run_shows_are_refused_without_examples() -> None:
    for where in ("block", "branch", "attention"):
        with pytest.raises(InputError, match=f"where: '{where}' must come with example inputs"):
            find_sites(tiny_vit(), where=where)


def test_models_without_the_kind_are_refused() -> None:
    with pytest.raises(InputError, match="'attention' must lead to sites of Sequential; got none"):
        find_sites(tiny_conv_net(), where="attention", example_inputs=images(2, channels=1))
    with pytest.raises(InputError, match=r"'final' must find the head of Sequential.*got no head"):
        find_sites(tiny_conv_net(), where="final")


def test_activations_whose_channels_cannot_be_told_are_refused_by_name() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.PReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = nn.Sequential(Scaled(), Scaled())
    with pytest.raises(
        InputError, match=r"channel axis can be told; got '0', whose shape no layer"
    ):
        find_sites(model, where="block", example_inputs=torch.randn(2, 3))


def test_recorded_sites_of_every_kind_fit_their_network_and_no_other_width() -> None:
    model = tiny_vit()
    sites = find_sites(
        model, where=["block", "attention", "final", "linear"], example_inputs=images(2)
    )
    check_sites(model, sites, source="record")
    for name in ("blocks.0", "blocks.0.attn.proj:input", "head:input"):
        with pytest.raises(InputError, match=f"record: site '{name}' must have 10000000 channels"):
            check_sites(model, [Site(name, 10_000_000, -1)], source="record")
