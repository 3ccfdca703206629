"""Architectures of timm with random weights against a loop over single examples in float64."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm import models
from timm.layers import GatedMlp, GroupNormAct, StdConv2d
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, Pooling, SepConv
from timm.models.mlp_mixer import Affine, ResBlock, SpatialGatingBlock
from torch import Tensor, nn

from tests.oracle_nets import assert_exact, randomise


class Vision(NamedTuple):
    """One architecture.

    Attributes:
        create: A name in timm's registry, or of a class in timm.models.
        settings: What makes it small.
        size: Height and width of the images.
    """

    create: str
    settings: dict[str, Any]
    size: int = 32

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        make = (
            partial(timm.create_model, self.create)
            if timm.is_model(self.create)
            else getattr(models, self.create)
        )
        model: nn.Module = make(num_classes=3, **self.settings).double().eval()
        randomise(model, 0.05)
        return model

    def batch(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (count, 3, self.size, self.size)
        images = torch.randn(shape, generator=generator, dtype=torch.float64)
        return images, torch.arange(count) % 3


_PLAIN = {"embed_dim": 32, "depth": 2, "num_heads": 2}
_VIT = {"img_size": 32, "patch_size": 8, **_PLAIN}
_WINDOWS = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
}
_STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)}
_THIN = {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32)}
_BASIC = {"channels": (16, 16, 32, 32)}
_MLP = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 32}
_PYRAMID = {
    "depths": (1, 1, 1, 1),
    "embed_dims": (8, 16, 24, 32),
    "num_heads": (1, 2, 2, 2),
}
_MAXVIT = {"img_size": 64, "embed_dim": (32, 32, 32, 64), "depths": (1, 1, 1, 1)}
_CROSS = {
    "img_size": 48,
    "img_scale": (1.0, 2 / 3),
    "patch_size": (12, 16),
    "embed_dim": (16, 32),
    "depth": ((1, 1, 0),),
    "num_heads": (2, 2),
    "mlp_ratio": (2.0, 2.0, 1.0),
}
_VOLO = {
    "img_size": 32,
    "layers": (1, 1, 1, 1),
    "embed_dims": (16, 32, 32, 32),
    "num_heads": (2, 2, 2, 2),
    "outlook_attention": (True, False, False, False),
    "mlp_ratio": 2,
}

FAST = {
    "vit": Vision("vit_tiny_patch16_224", {**_VIT, "init_values": 0.1, "qk_norm": True}),
    "deit distilled": Vision("deit_tiny_distilled_patch16_224", _VIT),
    "beit": Vision("beit_base_patch16_224", _VIT),
    "eva02": Vision("eva02_tiny_patch14_224", _VIT),
    "swin": Vision("swin_tiny_patch4_window7_224", _WINDOWS),
    "convnext": Vision("convnext_atto", _STAGES),
    "convnextv2": Vision("convnextv2_atto", _STAGES),
    "resnet": Vision("resnet18", {"channels": (8, 12, 16, 20), "stem_width": 8}),
    "resnetv2": Vision("resnetv2_50", {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64)}),
    "resnext": Vision("resnext50_32x4d", {**_THIN, "cardinality": 4, "base_width": 16}),
    "efficientnet": Vision("test_efficientnet", {}),
    "mlp-mixer": Vision("MlpMixer", _MLP),
    "densenet": Vision("densenet121", {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    "hiera": Vision(
        "hiera_tiny_224",
        {"img_size": (64, 64), "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)},
        64,
    ),
}

SLOW = {
    "vit with registers, mean": Vision(
        "vit_medium_patch16_reg4_gap_256", {**_VIT, "init_values": 0.1}
    ),
    "vit with attention pooling": Vision(
        "vit_tiny_patch16_224", {**_VIT, "global_pool": "map", "class_token": False}
    ),
    "vit rope": Vision("vit_small_patch16_rope_224", _VIT),
    "vit relative positions": Vision("vit_relpos_small_patch16_224", _VIT),
    "vit hybrid": Vision("vit_tiny_r_s16_p8_224", {"img_size": 32, **_PLAIN}),
    "vit siglip": Vision("vit_base_patch16_siglip_224", _VIT),
    "vit dinov3": Vision("vit_tiny_patch16_dinov3_qkvb", _VIT),
    "vit sam": Vision(
        "samvit_base_patch16_224", {**_VIT, "global_attn_indexes": (1,), "window_size": 2}
    ),
    "naflexvit": Vision("naflexvit_base_patch16_gap", _VIT),
    "test_vit": Vision("test_vit", {"img_size": 32}),
    "test_vit2": Vision("test_vit2", {"img_size": 32}),
    "test_vit3": Vision("test_vit3", {"img_size": 32}),
    "test_vit4": Vision("test_vit4", {"img_size": 32}),
    "test_vit_relpos": Vision("test_vit_relpos", {"img_size": 32}),
    "deit3": Vision("deit3_small_patch16_224", _VIT),
    "cait": Vision("cait_xxs24_224", _VIT),
    "beitv2": Vision("beitv2_base_patch16_224", _VIT),
    "eva": Vision("eva_giant_patch14_224", _VIT),
    "swinv2": Vision("swinv2_tiny_window8_256", _WINDOWS),
    "swinv2_cr": Vision("swinv2_cr_tiny_224", _WINDOWS),
    "convnext, convolutions": Vision("convnext_atto", {**_STAGES, "conv_mlp": True}),
    "convnext, overlapping stem": Vision("convnext_atto_ols", {}),
    "test_convnext": Vision("test_convnext", {}),
    "resnet bottleneck": Vision("resnet50", {**_THIN, "stem_width": 8}),
    "resnet pre-activation, standardised": Vision(
        "ResNetV2",
        {
            "layers": (1, 1, 1, 1),
            "channels": (16, 32, 48, 64),
            "stem_chs": 16,
            "conv_layer": StdConv2d,
            "norm_layer": partial(GroupNormAct, num_groups=4),
        },
    ),
    "resnet wide": Vision("wide_resnet50_2", _THIN),
    "resnet squeeze-excite": Vision("seresnet18", _BASIC),
    "resnet channel attention": Vision("ecaresnet26t", _THIN),
    "resnet selective kernel": Vision("skresnet18", _BASIC),
    "resnest": Vision("resnest14d", _BASIC),
    "res2net": Vision("res2net50_26w_4s", _THIN),
    "test_resnet": Vision("test_resnet", {}),
    "regnetx": Vision("regnetx_002", {}),
    "regnety": Vision("regnety_002", {}),
    "efficientnet, group norm": Vision("efficientnet_b0_gn", {"channel_multiplier": 0.5}),
    "efficientnet, layer norm": Vision("test_efficientnet_ln", {}),
    "efficientnet, evo norm": Vision("test_efficientnet_evos", {}),
    "efficientnet lite": Vision("efficientnet_lite0", {}),
    "mobilenetv2": Vision("mobilenetv2_050", {}),
    "mobilenetv3": Vision("mobilenetv3_small_050", {}),
    "mobilenetv4": Vision("mobilenetv4_conv_small_050", {}),
    "mobilenetv4 hybrid": Vision("mobilenetv4_hybrid_medium_075", {}, 64),
    "mnasnet": Vision("mnasnet_small", {}),
    "lcnet": Vision("lcnet_035", {}),
    "tinynet": Vision("tinynet_e", {}),
    "vgg": Vision("VGG", {"cfg": [8, "M", 12, 12, "M"], "mlp_ratio": 0.01}),
    "vgg, batch norm": Vision(
        "VGG", {"cfg": [8, "M", 12, 12, "M"], "mlp_ratio": 0.01, "norm_layer": nn.BatchNorm2d}
    ),
    "resmlp": Vision(
        "MlpMixer", {**_MLP, "mlp_ratio": 4, "block_layer": ResBlock, "norm_layer": Affine}
    ),
    "gmlp": Vision(
        "MlpMixer",
        {**_MLP, "mlp_ratio": 4, "block_layer": SpatialGatingBlock, "mlp_layer": GatedMlp},
    ),
    "convmixer": Vision("ConvMixer", {"dim": 24, "depth": 2, "kernel_size": 3, "patch_size": 4}),
    "poolformer": Vision(
        "MetaFormer",
        {**_STAGES, "token_mixers": Pooling, "layer_scale_init_values": 0.1},
        64,
    ),
    "caformer": Vision(
        "MetaFormer",
        {
            "depths": (1, 1, 1, 1),
            "dims": (32, 32, 32, 64),
            "token_mixers": (SepConv, SepConv, Attention, Attention),
            "norm_layers": (LayerNorm2dNoBias,) * 2 + (LayerNormNoBias,) * 2,
        },
        64,
    ),
    "maxvit": Vision("test_maxvit", {"img_size": 64}, 64),
    "maxvit, position network": Vision("maxvit_rmlp_pico_rw_256", _MAXVIT, 64),
    "coatnet": Vision("coatnet_nano_rw_224", _MAXVIT, 64),
    "edgenext": Vision("edgenext_xx_small", {}),
    "mobilevit": Vision("mobilevit_xxs", {}, 64),
    "mobilevitv2": Vision("mobilevitv2_050", {}, 64),
    "xcit": Vision("xcit_nano_12_p16_224", {"img_size": 32, **_PLAIN}),
    "pvt_v2": Vision("pvt_v2_b0", {**_PYRAMID, "embed_dims": (8, 16, 20, 32)}, 64),
    "twins svt": Vision("twins_svt_small", {**_PYRAMID, "img_size": 64, "wss": (4, 4, 2, 1)}, 64),
    "twins pcpvt": Vision("twins_pcpvt_small", {**_PYRAMID, "img_size": 64}, 64),
    "crossvit": Vision("CrossVit", _CROSS, 48),
    "volo": Vision("VOLO", _VOLO),
    "davit": Vision("davit_tiny", _PYRAMID),
    "fastvit": Vision("fastvit_sa12", {"layers": (1, 1, 1, 1), "embed_dims": (32, 32, 32, 64)}),
    "hrnet": Vision("hrnet_w18_small", {}),
    "inception-next": Vision("inception_next_atto", _STAGES),
    "dla": Vision("dla46_c", {}),
    "nfnet": Vision("test_nfnet", {}),
    "nf_regnet": Vision("nf_regnet_b0", {}),
    "repvgg": Vision("repvgg_a0", {}),
    "byobnet": Vision("test_byobnet", {}),
    "gernet": Vision("gernet_s", {}),
    "ghostnet": Vision("ghostnet_050", {}),
    "visformer": Vision(
        "visformer_tiny",
        {"img_size": 32, "init_channels": 8, "embed_dim": 32, "depth": (1, 1, 1), "num_heads": 2}
        | {"group": 4},
    ),
    "mambaout": Vision("test_mambaout", {}),
    "convit": Vision("convit_tiny", {**_VIT, "local_up_to_layer": 1}),
    "gcvit": Vision(
        "GlobalContextVit",
        {"img_size": 64, "embed_dim": 16, "window_size": (4, 4, 4, 2), "layer_scale": 0.1}
        | {"depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 4)},
        64,
    ),
    "nest": Vision(
        "Nest",
        {"img_size": 32, "embed_dims": (16, 32, 32), "depths": (1, 1, 1), "num_heads": (1, 2, 2)}
        | {"patch_size": 2},
    ),
    "pit distilled": Vision(
        "pit_ti_distilled_224",
        {"img_size": 32, "patch_size": 8, "stride": 4, "base_dims": (8, 8, 8)}
        | {"depth": (1, 1, 1), "heads": (2, 2, 2)},
    ),
    "sequencer": Vision(
        "sequencer2d_s",
        {"layers": (1, 1, 1, 1), "embed_dims": (16,) * 4, "hidden_sizes": (8,) * 4},
    ),
    "focalnet": Vision(
        "FocalNet", {"depths": (1, 1, 1, 1), "embed_dim": 8, "layerscale_value": 0.1}
    ),
    "coat": Vision("coat_lite_tiny", {"img_size": 32}),
    "tnt": Vision(
        "tnt_s_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "inner_dim": 12, "depth": 2}
        | {"num_heads_outer": 2},
    ),
    "vovnet": Vision("ese_vovnet19b_slim", {}),
    "starnet": Vision("starnet_s050", {}),
    "swiftformer": Vision("swiftformer_xs", {}, 64),
    "hgnet": Vision("hgnetv2_b0", {}),
    "efficientvit": Vision("efficientvit_b0", {}),
    "fasternet": Vision("fasternet_t0", {}),
    "efficientvim": Vision("efficientvim_m1", {}, 64),
    "botnet": Vision("botnet26t_256", {"img_size": 64}, 64),
    "repvit": Vision("repvit_m0_9", {"embed_dim": (8, 16, 24, 32), "depth": (1, 1, 1, 1)}),
    "levit": Vision("levit_128s", {"img_size": 64}, 64),
    "tiny_vit": Vision("tiny_vit_5m_224", {**_PYRAMID, "embed_dims": (32, 32, 64, 64)}, 64),
    "efficientformerv2": Vision(
        "EfficientFormerV2",
        {"img_size": 64, "depths": (1, 1, 1, 2), "embed_dims": (8, 16, 24, 32), "num_vit": 1},
        64,
    ),
    "efficientvit m": Vision("efficientvit_m0", {"img_size": 64}, 64),
}


ONE_BY_ONE = {
    "*.rel_pos_[hw]": ("vit sam",),
    "LSTM.*": ("sequencer",),
}
"""Patterns of the parameters that may be computed one example at a time, and in which models."""


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_architecture_equals_the_loop(name: str) -> None:
    case = (FAST | SLOW)[name]
    slow = [pattern for pattern, names in ONE_BY_ONE.items() if name in names]
    assert_exact(case.model(), [case.batch(3, 0), case.batch(2, 1)], one_by_one=slow, rtol=1e-7)
