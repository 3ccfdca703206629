"""Layers as linear maps: every reading reproduces its module, and goes back to its weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_merge.least_squares.linear_layers import AffineLayer, linear_layer

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(5, 3), (4, 5)),
    (nn.Linear(5, 3, bias=False), (2, 7, 5)),
    (Conv1D(3, 5), (2, 7, 5)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 11)),
    (nn.Conv2d(4, 6, 3, padding=1, bias=False), (2, 4, 5, 6)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2), (2, 4, 7, 6)),
    (nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect", groups=4), (2, 4, 5, 6)),
    (nn.Conv2d(3, 5, 2, padding="valid"), (2, 3, 5, 6)),
    (nn.Conv3d(2, 4, 2, padding=(1, 0, 1)), (2, 2, 3, 4, 5)),
    (nn.LayerNorm(5), (2, 7, 5)),
    (nn.RMSNorm(5), (2, 7, 5)),
    (nn.GroupNorm(2, 4), (3, 4, 5)),
    (nn.BatchNorm2d(4), (3, 4, 5, 6)),
]


def generic(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    module = module.double().eval()
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.5
    return module


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=lambda v: str(v)[:40])
def test_the_rows_times_the_matrix_are_the_output(
    module: nn.Module, shape: tuple[int, ...]
) -> None:
    module = generic(module)
    layer = linear_layer("layer", module)
    assert layer is not None
    x = torch.randn(shape).double()
    y = module(x)
    made = layer.inputs(x, None) @ layer.matrix(module.weight)
    if layer.has_bias:
        made = made + layer.offset(module.bias)[:, None]
    torch.testing.assert_close(made, layer.outputs(y, None))
    assert layer.explains(x, y)
    assert not layer.explains(x, y + 0.01)


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=lambda v: str(v)[:40])
def test_setting_matrix_and_offset_is_setting_weight_and_bias(
    module: nn.Module, shape: tuple[int, ...]
) -> None:
    module = generic(module)
    layer = linear_layer("layer", module)
    assert layer is not None
    weight = torch.randn_like(module.weight)
    bias = torch.randn_like(module.bias) if layer.has_bias else None
    torch.testing.assert_close(layer.weight(layer.matrix(weight)), weight)
    layer.set_(layer.matrix(weight), None if bias is None else layer.offset(bias))
    torch.testing.assert_close(module.weight, weight)
    if bias is not None:
        torch.testing.assert_close(module.bias, bias)


def test_masked_tokens_are_no_rows() -> None:
    layer = linear_layer("fc", nn.Linear(3, 2))
    assert layer is not None
    x, mask = torch.randn(2, 3, 3), torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = torch.stack([x[0, 0], x[0, 1], x[1, 0]])[None]
    torch.testing.assert_close(layer.inputs(x, mask), expected)


def test_reading_a_norm_leaves_its_weights_and_hooks_alone() -> None:
    norm = generic(nn.LayerNorm(4))
    before = [p.clone() for p in norm.parameters()]
    called: list[Tensor] = []
    norm.register_forward_hook(lambda *_: called.append(torch.tensor(1)))
    AffineLayer("norm", norm).inputs(torch.randn(3, 4).double(), None)
    assert not called
    for now, then in zip(norm.parameters(), before, strict=True):
        assert torch.equal(now, then)


class Standardised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight / self.weight.norm(), self.bias)


def test_a_layer_that_uses_its_weight_otherwise_is_found_out() -> None:
    module = Standardised(3, 2)
    layer = linear_layer("fc", module)
    x = torch.randn(4, 3)
    assert layer is not None
    assert not layer.explains(x, module(x))


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.ConvTranspose2d(3, 2, 2), nn.LayerNorm(3, elementwise_affine=False)]
)
def test_others_are_not_read(module: nn.Module) -> None:
    assert linear_layer("other", module) is None
