"""Every supported module type, in every configuration, against a loop over single examples.

Warnings are errors, so a parameter that is not covered at its module would fail here too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, RmsNorm
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_merge.curvature import PerExampleFisher
from lit_merge.curvature.layers import layer_of
from tests.references import squared_gradients_by_loop


class Averaged(nn.Module):
    """A module under test with something before it that needs gradients, and logits after it."""

    def __init__(self, *modules: nn.Module, channels_second: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(*modules)
        self.dims = slice(2, None) if channels_second else slice(1, -1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.5)
            for buffer in self.buffers():
                if buffer.is_floating_point():
                    buffer.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        dims = tuple(range(y.dim()))[self.dims]
        return (y.sin().mean(dims) if dims else y.sin())[:, :3]


def cross_entropy(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def assert_exact(model: nn.Module, *inputs: Tensor) -> None:
    model = model.double()
    batches = [(x, torch.arange(len(x)) % 3) for x in inputs]
    estimator = PerExampleFisher(model, cross_entropy, labels="observed")
    for batch in batches:
        estimator.update(batch)
    sums = estimator.sums()
    for name, expected in squared_gradients_by_loop(model, batches, cross_entropy).items():
        assert expected.abs().sum() > 0
        torch.testing.assert_close(sums[name], expected, rtol=1e-9, atol=1e-20, msg=name)


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 7, 6), (4, 2, 5, 6)])
def test_linear_with_any_dimensions_between(shape: tuple[int, ...]) -> None:
    assert_exact(Averaged(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), normal(*shape))


def test_linear_without_bias() -> None:
    assert_exact(Averaged(nn.Linear(6, 5, bias=False)), normal(4, 6))


def test_linear_on_windows_and_on_flattened_tokens() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 5)
            self.flat = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            windows = self.inner(x.unflatten(1, (4, 2)).flatten(0, 1))  # [4·B, 2, 6]
            tokens = self.flat(windows.flatten(0, 1).tanh())  # [8·B, 3]
            return tokens.unflatten(0, (len(x), 8)).mean(1)

    assert_exact(Windows(), normal(5, 8, 6), normal(2, 8, 6))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
        {"kernel_size": 3, "groups": 2},
        {"kernel_size": 3, "groups": 4, "dilation": 2, "padding": 2},
        {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
        {"kernel_size": 2, "padding": "valid"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": "same", "padding_mode": "replicate", "groups": 2},
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 1, "padding": 1, "bias": False},
        {"kernel_size": (7, 8)},  # one place: T = 1
        {"kernel_size": (6, 8)},  # two places: pairs
    ],
    ids=str,
)
def test_two_dimensional_convolution(settings: dict[str, Any]) -> None:
    model = Averaged(nn.Conv2d(4, 4, **settings), channels_second=True)
    assert_exact(model, normal(5, 4, 7, 8), normal(2, 4, 7, 8))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "stride": 2, "padding": 2},
        {"kernel_size": 4, "padding": "same", "dilation": 2, "groups": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ],
    ids=str,
)
def test_one_dimensional_convolution(settings: dict[str, Any]) -> None:
    model = Averaged(nn.Conv1d(4, 6, **settings), channels_second=True)
    assert_exact(model, normal(5, 4, 11))


def test_convolution_on_patches_of_the_examples() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            patches = x.unflatten(2, (2, 5)).movedim(2, 1).flatten(0, 1)  # [2·B, 2, 5, 6]
            return self.conv(patches).tanh().mean((2, 3)).unflatten(0, (len(x), 2)).mean(1)[:, :3]

    assert_exact(Patches(), normal(4, 2, 10, 6), normal(3, 2, 10, 6))


def test_a_large_convolution_is_computed_one_example_at_a_time() -> None:
    model = Averaged(nn.Conv2d(24, 160, 3), channels_second=True)
    assert model.body[0].weight.numel() > 1 << 15
    assert_exact(model, normal(3, 24, 6, 5))


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_embedding_with_repeated_tokens(padding_idx: int | None) -> None:
    tokens = torch.tensor([[1, 2, 2, 0], [2, 2, 2, 2], [0, 0, 3, 1]])
    assert_exact(Averaged(nn.Embedding(5, 4, padding_idx=padding_idx), nn.Tanh()), tokens)


def test_embedding_of_one_token_per_example() -> None:
    assert_exact(Averaged(nn.Embedding(5, 4)), torch.tensor([1, 1, 3]))


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(6),
        nn.LayerNorm(6, bias=False),
        nn.LayerNorm((5, 6)),
        nn.RMSNorm(6),
        nn.RMSNorm((5, 6), eps=0.1),
        RmsNorm(6),
    ],
    ids=str,
)
def test_norms_over_the_last_dimensions(norm: nn.Module) -> None:
    assert_exact(Averaged(nn.Linear(6, 6), norm), normal(4, 5, 6))


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(6), nn.GroupNorm(3, 6), nn.GroupNorm(1, 6), LayerNorm2d(6)],
    ids=str,
)
def test_norms_with_channels_in_the_second_dimension(norm: nn.Module) -> None:
    model = Averaged(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), channels_second=True)
    assert_exact(model, normal(4, 3, 6, 5))


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5)])
def test_one_dimensional_batch_norm(shape: tuple[int, ...]) -> None:
    assert_exact(Averaged(nn.BatchNorm1d(6), channels_second=True), normal(*shape))


def test_the_transposed_linear_of_transformers() -> None:
    assert_exact(Averaged(Conv1D(5, 6), nn.Tanh(), Conv1D(4, 5)), normal(4, 3, 6))


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(5, 4, max_norm=1.0),
        nn.Embedding(5, 4, scale_grad_by_freq=True),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.ConvTranspose2d(2, 2, 3),
        nn.Bilinear(2, 2, 2),
        nn.PReLU(),
    ],
    ids=str,
)
def test_other_modules_are_not_described(module: nn.Module) -> None:
    assert layer_of(module) is None


@pytest.mark.parametrize(
    ("module", "x", "y"),
    [
        (nn.Linear(4, 3), (2, 4), (2, 5)),
        (nn.Linear(4, 3), (4,), (3,)),
        (nn.Conv2d(2, 3, 3), (2, 5, 5), (3, 3, 3)),
        (nn.Conv2d(2, 3, 3), (2, 2, 5, 5), (2, 3, 5, 5)),  # padded by somebody else
        (nn.Embedding(5, 4), (2, 3), (2, 4)),
        (nn.LayerNorm(4), (4,), (4,)),
        (nn.GroupNorm(2, 4), (2, 4, 3), (2, 4, 6)),
    ],
    ids=str,
)
def test_calls_of_unusual_shapes_do_not_fit(
    module: nn.Module, x: tuple[int, ...], y: tuple[int, ...]
) -> None:
    layer = layer_of(module)
    assert layer is not None
    assert not layer.fits(torch.zeros(x), torch.zeros(y))
