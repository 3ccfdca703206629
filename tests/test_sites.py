import pytest
import timm
import torch
from torch import nn

from lit_merge.correction.sites import Site, channel_layout, find_sites
from lit_merge.errors import InputError
from tests.tiny_models import images, tiny_bert, tiny_conv_net, tiny_vit


def names(model: nn.Module, **options: object) -> list[str]:
    return [site.name for site in find_sites(model, **options)]


def test_auto_takes_every_linear_of_a_vit_but_its_head():
    inner = [
        f"blocks.{block}.{layer}"
        for block in (0, 1)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert names(tiny_vit(), exclude=("head.weight", "head.bias")) == inner
    assert names(tiny_vit(), exclude=("head",)) == inner
    assert names(tiny_vit()) == [*inner, "head"]


def test_auto_takes_the_batch_norms_of_a_conv_net():
    assert find_sites(tiny_conv_net()) == (Site("1", 6, 1), Site("4", 8, 1))


def test_auto_takes_group_norms_only_beside_convolutions():
    conv = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.Linear(4, 2))
    mlp = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2))
    assert names(conv) == ["1"]
    assert names(mlp) == ["0", "2"]


def test_auto_takes_convolutions_and_linears_of_a_net_without_norms():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 2)
    )
    assert find_sites(net, exclude=["4.weight"]) == (Site("0", 4, 1), Site("3", 8, -1))


def test_auto_takes_every_linear_of_bert_but_its_classifier():
    found = names(tiny_bert(), exclude=("classifier.weight", "classifier.bias"))
    assert len(found) == 2 * 6 + 1
    assert found[-1] == "bert.pooler.dense"
    assert "classifier" not in found


def test_norm_and_patterns_select_by_kind_and_name():
    vit = tiny_vit()
    assert names(vit, where="norm") == [
        "blocks.0.norm1",
        "blocks.0.norm2",
        "blocks.1.norm1",
        "blocks.1.norm2",
        "norm",
    ]
    assert names(vit, where="blocks.*.mlp.fc1") == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    assert names(vit, where=["norm", "blocks.0.mlp.*"]) == [
        "blocks.0.norm1",
        "blocks.0.norm2",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
        "blocks.1.norm1",
        "blocks.1.norm2",
        "norm",
    ]
    assert names(vit, where="patch_embed.proj") == ["patch_embed.proj"]


def test_every_known_kind_says_where_its_channels_are():
    conv_1d = type("Conv1D", (nn.Module,), {})()
    conv_1d.weight = nn.Parameter(torch.zeros(3, 7))
    next_norm = type("ConvNextLayerNorm", (nn.Module,), {"data_format": "channels_first"})()
    next_norm.weight = nn.Parameter(torch.ones(3))
    for module, layout in (
        (nn.Linear(2, 3), (3, -1)),
        (nn.Conv1d(2, 3, 1), (3, 1)),
        (nn.ConvTranspose2d(2, 3, 1), (3, 1)),
        (nn.Embedding(5, 3), (3, -1)),
        (nn.BatchNorm1d(3), (3, 1)),
        (nn.InstanceNorm2d(3), (3, 1)),
        (nn.GroupNorm(1, 3), (3, 1)),
        (nn.LayerNorm(3, elementwise_affine=False), (3, -1)),
        (nn.RMSNorm(3), (3, -1)),
        (timm.layers.LayerNorm2d(3), (3, 1)),
        (next_norm, (3, 1)),
        (conv_1d, (7, -1)),
        (nn.LayerNorm((2, 3)), None),
        (nn.GELU(), None),
    ):
        assert channel_layout(module) == layout, module


def test_outputs_of_a_conv_next_have_the_layouts_it_is_said_to_have():
    model = timm.create_model("test_convnext", num_classes=2).eval()
    seen = {}
    for site in find_sites(model, where=["norm", "linear"]):
        module = model.get_submodule(site.name)
        module.register_forward_hook(lambda _, __, out, site=site: seen.update({site: out.shape}))
    model(images(1))
    assert {site.channel_dim for site in seen} == {1, -1}
    assert all(shape[site.channel_dim] == site.num_features for site, shape in seen.items())


def test_the_projection_that_multihead_attention_never_calls_is_no_site():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert names(model) == ["linear1", "linear2"]
    assert names(model, where="*") == ["linear1", "linear2", "norm1", "norm2"]
    with pytest.raises(InputError, match=r"'self_attn.out_proj' must be a layer with a known"):
        find_sites(model, where="self_attn.out_proj")


def test_shared_modules_are_found_once():
    layer = nn.Linear(3, 3)
    assert names(nn.Sequential(layer, nn.ReLU(), layer)) == ["0"]


def test_a_pattern_without_matches_is_refused_with_names_near_it():
    with pytest.raises(InputError, match=r"got 'blocks.0.mlp.fc9'.*Near it are: .*blocks.0.mlp.fc"):
        find_sites(tiny_vit(), where="blocks.0.mlp.fc9")


def test_a_container_matched_alone_is_refused_by_name():
    with pytest.raises(InputError, match=r"'blocks.0' must be a layer.*got a Block"):
        find_sites(tiny_vit(), where="blocks.0")


def test_a_layer_with_parameters_of_unknown_kind_is_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.PReLU())
    with pytest.raises(InputError, match=r"'1' must be a layer.*got a PReLU"):
        find_sites(model, where="*")


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_an_uninitialised_layer_is_refused_by_name():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(InputError, match=r"'0' must have its shape.*Run one batch"):
        find_sites(model, where="0")


def test_nothing_but_heads_is_refused():
    with pytest.raises(InputError, match=r"at least one site of Sequential outside \['0'\]"):
        find_sites(nn.Sequential(nn.Linear(2, 2)), exclude=["0"])
    with pytest.raises(InputError, match="at least one site of Sequential; got"):
        find_sites(nn.Sequential(nn.ReLU()))
