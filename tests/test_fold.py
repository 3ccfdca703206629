"""Folding a scale and shift into one layer, against scaling and shifting what the layer gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lit_merge.correction.fold import (
    CannotFoldError,
    fold_candidates,
    fold_input_candidates,
    fold_shift_into_mean,
)
from lit_merge.correction.site import channel_layout, input_layout


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    module = module.double().eval()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_()
            if "var" in name:
                tensor.abs_().add_(0.1)
    return module


def values(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def affine(channels: int) -> tuple[Tensor, Tensor]:
    scale, shift = values(2, channels)
    scale[0] = 0.0  # a channel that is switched off
    return scale, shift


OUTPUTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(4, 6), lambda: values(3, 5, 4)),
    "Conv1D": (lambda: Conv1D(6, 4), lambda: values(3, 5, 4)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: values(3, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), lambda: values(3, 4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: values(3, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: values(3, 4, 7, 7)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda: values(3, 4, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), lambda: values(3, 4, 5, 5)),
    "transposed and grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2),
        lambda: values(3, 4, 5, 5),
    ),
    "LayerNorm": (lambda: nn.LayerNorm(6), lambda: values(3, 5, 6)),
    "LayerNorm2d": (lambda: timm.layers.LayerNorm2d(6), lambda: values(3, 6, 5, 5)),
    "GroupNorm": (lambda: nn.GroupNorm(3, 6), lambda: values(3, 6, 5)),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(6, affine=True), lambda: values(3, 6, 5, 5)),
    "BatchNorm": (lambda: nn.BatchNorm2d(6), lambda: values(3, 6, 5, 5)),
    "Embedding": (
        lambda: nn.Embedding(7, 6, padding_idx=0),
        lambda: torch.arange(14).view(2, 7) % 7,
    ),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_layer_with_folded_tensors_gives_the_corrected_output(kind: str) -> None:
    make, inputs = OUTPUTS[kind]
    layer, x = randomised(make()), inputs()
    layout = channel_layout(layer)
    assert layout is not None
    scale, shift = affine(layout[0])
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    made = next(fold_candidates(layer, scale, shift))
    with torch.no_grad():
        expected = (layer(x).movedim(layout[1], -1) * scale + shift).movedim(-1, layout[1])
        found = functional_call(layer, made, (x,))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


class OnePlus(nn.Module):
    """An RMSNorm whose weight is counted from one, as Gemma's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.pow(2).mean(-1, keepdim=True).rsqrt() * (1 + self.weight)


@pytest.mark.parametrize(("norm", "index"), [(nn.RMSNorm(6), 0), (OnePlus(), 1)])
def test_an_rms_norm_takes_a_scale_by_one_of_two_formulas(norm: nn.Module, index: int) -> None:
    norm, x = randomised(norm), values(3, 6)
    scale, _ = affine(6)
    made = list(fold_candidates(norm, scale, torch.zeros(6)))
    with torch.no_grad():
        expected = norm(x) * scale
        found = [functional_call(norm, tensors, (x,)) for tensors in made]
    torch.testing.assert_close(found[index], expected)
    assert not torch.allclose(found[1 - index], expected)


INPUTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(6, 4), lambda: values(3, 5, 6)),
    "Conv1D": (lambda: Conv1D(4, 6), lambda: values(3, 5, 6)),
    "Conv2d": (lambda: nn.Conv2d(6, 4, 3), lambda: values(3, 6, 7, 7)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), lambda: values(3, 6, 7, 7)),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_a_layer_with_folded_tensors_takes_the_plain_input_for_the_corrected(kind: str) -> None:
    make, inputs = INPUTS[kind]
    layer, x = randomised(make()), inputs()
    layout = input_layout(layer)
    assert layout is not None
    scale, shift = affine(6)
    (made,) = fold_input_candidates(layer, scale, shift)
    corrected = (x.movedim(layout[1], -1) * scale + shift).movedim(-1, layout[1])
    with torch.no_grad():
        torch.testing.assert_close(functional_call(layer, made, (x,)), layer(corrected))


def test_a_batch_norm_with_another_mean_sees_its_input_shifted() -> None:
    norm, x, shift = randomised(nn.BatchNorm1d(6)), values(4, 6), values(6)
    with torch.no_grad():
        found = functional_call(norm, fold_shift_into_mean(norm, shift), (x,))
        torch.testing.assert_close(found, norm(x + shift))


def test_folded_tensors_keep_the_types_of_the_layer() -> None:
    layer = nn.Linear(4, 6).bfloat16()
    (made,) = fold_candidates(layer, torch.ones(6) * 2, torch.ones(6))
    assert made["weight"].dtype == made["bias"].dtype == torch.bfloat16
    assert torch.equal(made["weight"], layer.weight * 2)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(4, 6, bias=False), "no bias for the shift"),
        (nn.RMSNorm(6), "no bias for the shift"),
        (nn.LayerNorm(6, elementwise_affine=False), "no weight for the scale"),
        (nn.BatchNorm2d(6, affine=False), "no weight for the scale"),
        (nn.Embedding(5, 6, max_norm=1.0), "its rows are held to max_norm"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), "computed from other parameters"),
        (nn.Identity(), "no weight for the scale"),
    ],
    ids=["bias", "rms", "layer norm", "batch norm", "max_norm", "weight norm", "none"],
)
def test_what_a_layer_cannot_take_is_said(layer: nn.Module, reason: str) -> None:
    with pytest.raises(CannotFoldError, match=reason):
        list(fold_candidates(layer, torch.full((6,), 2.0), torch.ones(6)))


@pytest.mark.parametrize("layer", [nn.LayerNorm(6), nn.ConvTranspose2d(6, 4, 3), nn.GELU()])
def test_only_layers_that_are_linear_take_a_correction_of_their_input(layer: nn.Module) -> None:
    with pytest.raises(CannotFoldError, match="is not linear in its input"):
        list(fold_input_candidates(layer, torch.ones(6), torch.ones(6)))


def test_a_linear_layer_without_bias_takes_no_shift_of_its_input() -> None:
    with pytest.raises(CannotFoldError, match="no bias for the shift"):
        list(fold_input_candidates(nn.Linear(6, 4, bias=False), torch.ones(6), torch.ones(6)))


def test_a_batch_norm_without_statistics_takes_no_shift() -> None:
    with pytest.raises(CannotFoldError, match="no running mean"):
        fold_shift_into_mean(nn.BatchNorm1d(3, track_running_stats=False), torch.ones(3))
