"""The two small networks of the correction benchmark, both timm's, for gray images of 28 × 28."""

from __future__ import annotations

from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

ARCHITECTURES = ("cnn", "vit")


def build(architecture: str, num_classes: int) -> nn.Module:
    """Return a network with random weights."""
    return {"cnn": resnet8, "vit": small_vit}[architecture](num_classes)


def resnet8(num_classes: int) -> nn.Module:
    """A ResNet of three blocks with 16, 32 and 64 channels and BatchNorm (78k parameters).

    timm's, with the stem that is usual for small images: one 3 × 3 convolution, no pooling.
    """
    network = ResNet(
        BasicBlock,  # type: ignore[arg-type]  # timm says block where it means its class
        (1, 1, 1),
        num_classes=num_classes,
        in_chans=1,
        channels=(16, 32, 64),
        stem_type="deep",  # makes bn1 and layer1 16 wide; the stem itself is replaced
        stem_width=8,
        zero_init_last=False,
    )
    network.add_module("conv1", nn.Conv2d(1, 16, kernel_size=3, padding=1, bias=False))
    network.add_module("maxpool", nn.Identity())
    network.add_module("layer4", nn.Identity())  # its forward_features wants four stages
    return network


def small_vit(num_classes: int) -> nn.Module:
    """A ViT of four blocks, width 64, on 16 patches of 7 × 7 pixels (138k parameters).

    timm's, but begun like PyTorch's own layers: timm's initial weights (0.02) are made for widths
    of hundreds, and 64 channels take many epochs to leave them.
    """
    network = VisionTransformer(
        img_size=28,
        patch_size=7,
        in_chans=1,
        num_classes=num_classes,
        embed_dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=2.0,
    )
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.reset_parameters()
    assert network.pos_embed is not None
    nn.init.normal_(network.pos_embed, std=0.2)
    return network
