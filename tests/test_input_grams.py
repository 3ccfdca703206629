"""Gram matrices against loops over the rows that plain module hooks see, in float64.

The rows of a convolution come from the same call with the identity for its weight: its output at a
place is then the patch itself, whatever stride, padding and dilation are.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lit_merge.correction import attention_mask_of, run_model
from lit_merge.curvature.input_grams import LayerGrams
from lit_merge.curvature.layer_matrices import NOT_LINEAR
from lit_merge.errors import InputError
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_conv_net, tiny_vit


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return the rows [r, n] that a layer multiplies by its weight."""
    if not isinstance(module, _ConvNd):
        return x.reshape(-1, x.shape[-1])
    size = module.weight[0].numel()
    probe = copy.deepcopy(module)
    probe._forward_pre_hooks.clear()
    probe.bias = None
    probe.weight = nn.Parameter(torch.eye(size, dtype=x.dtype).view(size, *module.weight.shape[1:]))
    patches: Tensor = probe(x)
    dims = module.weight.dim() - 2
    return patches.reshape(-1, size, math.prod(patches.shape[-dims:])).mT.reshape(-1, size)


def outer_sum(rows: Tensor) -> Tensor:
    """Return Σ x xᵀ by a loop over Python numbers."""
    n = rows.shape[1]
    sums = [[0.0] * n for _ in range(n)]
    for x in rows.double().tolist():
        for i in range(n):
            for j in range(n):
                sums[i][j] += x[i] * x[j]
    return torch.tensor(sums, dtype=torch.float64)


def grams_by_hooks(model: nn.Module, inputs: Any, kept: Tensor | None = None) -> dict[str, Tensor]:
    """Return the Grams of all layers that run as modules; only tokens that are kept count."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, layers):

            def hook(module: nn.Module, args: Any, name: str = name) -> None:
                x = args[0].detach()
                if kept is not None and x.dim() == 3:
                    x = x[kept.bool()]
                seen.setdefault(f"{name}.weight", []).append(input_rows(module, x).double())

            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        run_model(model, inputs)
    for handle in handles:
        handle.remove()
    found = {name: torch.cat(parts) for name, parts in seen.items()}
    return {name: rows.mT @ rows for name, rows in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert sorted(found) == sorted(expected)
    for name, gram in expected.items():
        close = rtol * float(gram.abs().max())
        torch.testing.assert_close(found[name].double(), gram.double(), rtol=0, atol=close)
        assert torch.equal(found[name], found[name].mT)


def gathered(model: nn.Module, *batches: Any, **settings: Any) -> dict[str, Tensor]:
    grams = LayerGrams(model, run_model, **settings)
    for batch in batches:
        grams.update(batch)
    return grams.matrices()


def test_a_gram_is_the_sum_over_all_positions_of_all_batches() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2), torch.randn(5, 4, 3)
    found = gathered(layer, x[:2], x[2:])
    assert_same(found, {"weight": outer_sum(x.reshape(-1, 3))})
    assert found["weight"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(2, 3, 3, stride=2, padding=1), (4, 2, 9)),
        (nn.Conv2d(2, 3, 1), (3, 2, 4, 5)),
        (nn.Conv2d(2, 3, 1, stride=2), (3, 2, 4, 5)),
        (nn.Conv2d(2, 3, (2, 3), padding=(1, 0), dilation=(1, 2)), (3, 2, 6, 7)),
        (nn.Conv2d(2, 3, (2, 4), padding="same"), (3, 2, 5, 6)),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (3, 2, 5, 6)),
        (nn.Conv3d(1, 2, 2, stride=(1, 2, 1)), (2, 1, 3, 4, 3)),
        (nn.Conv2d(2, 3, 3), (2, 5, 6)),
    ],
    ids=str,
)
def test_the_inputs_of_a_convolution_are_its_patches(layer: nn.Module, shape: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    assert_same(gathered(layer, x), {"weight": outer_sum(input_rows(layer, x.detach()).detach())})


def test_large_inputs_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_merge.curvature.linear_calls._ELEMENTS", 40)
    model, x = tiny_conv_net(), images(7, channels=1)
    assert_same(gathered(model, x), grams_by_hooks(model, x))
    torch.manual_seed(0)
    layer, texts = nn.Conv1d(3, 2, 3, padding=1), torch.randn(5, 3, 6)
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 5, 2])[:, None]
    rows = input_rows(layer, texts).detach().reshape(5, 6, -1)[mask]
    assert_same(gathered(layer, texts, mask=lambda batch: mask), {"weight": outer_sum(rows)})


@pytest.mark.parametrize(
    ("model", "batch"),
    [(tiny_vit(), images(3)), (tiny_conv_net(), images(4, channels=1))],
    ids=["vit", "conv net"],
)
def test_whole_networks_are_covered(model: nn.Module, batch: Tensor) -> None:
    assert_same(gathered(model, batch), grams_by_hooks(model, batch), rtol=1e-4)


def test_padding_counts_only_where_it_is_wanted() -> None:
    model, texts = tiny_bert(), padded_texts((7, 3, 1, 5))
    tokens = gathered(model, texts, mask=attention_mask_of)
    assert_same(tokens, grams_by_hooks(model, texts, texts["attention_mask"]), rtol=1e-4)
    everything = gathered(model, texts)
    assert_same(everything, grams_by_hooks(model, texts), rtol=1e-4)
    name = "bert.encoder.layer.1.output.dense.weight"
    assert everything[name].trace() > 1.2 * tokens[name].trace()


class Twice(nn.Module):
    """Calls one layer twice, and shares its weight with another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(self.first(x)))
        return result


def test_calls_and_layers_with_one_weight_are_added_up() -> None:
    model, x = Twice().double(), torch.randn(4, 3, dtype=torch.float64)
    one = model.first(x)
    rows = torch.cat([x, one, model.first(one)]).detach()
    assert_same(gathered(model, x), {"first.weight": outer_sum(rows)}, rtol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_projections_of_attention_are_covered(batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=batch_first).eval()
    x = torch.randn(3, 5, 4)
    found = gathered(layer, x)
    assert sorted(found) == [
        "linear1.weight",
        "linear2.weight",
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
    ]
    expected = outer_sum(x.reshape(-1, 4))
    assert_same({"w": found["self_attn.in_proj_weight"]}, {"w": expected})


class Odd(nn.Module):
    """Weights that have no Gram."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.grouped = nn.Conv1d(4, 4, 1, groups=2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.wide = nn.Linear(6, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.unused = nn.Linear(2, 2)
        self.transposed = Conv1D(4, 4)  # type: ignore[no-untyped-call]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.grouped(self.table(tokens).mT).mT
        x = self.frozen(self.transposed(self.normed(x)))
        result: Tensor = self.head(self.wide(F.pad(x, (0, 2))))
        return result


def test_what_is_left_out_is_named_with_its_reason() -> None:
    grams = LayerGrams(Odd(), run_model, largest=5)
    grams.update(torch.arange(6).view(2, 3))
    assert grams.found == ()
    message = r"parameters: must name the weight of at least one linear layer.*table\.weight: it is"
    with pytest.raises(InputError, match=message):
        grams.matrices()
    parametrization = "normed.parametrizations.weight"
    assert grams.left_out == {
        "table.weight": "it is also a table that rows are looked up in",
        "grouped.weight": "a grouped convolution has a matrix per group",
        f"{parametrization}.original0": NOT_LINEAR,
        f"{parametrization}.original1": NOT_LINEAR,
        "wide.weight": "its matrix would have 6 rows, more than 5",
        "unused.weight": NOT_LINEAR,
        "transposed.weight": NOT_LINEAR,
    }


def test_the_sums_are_taken_in_the_type_that_is_asked_for() -> None:
    layer = nn.Linear(1, 1, bias=False)
    small, large = torch.full((1, 1), 0.01), torch.full((1, 1), 100.0)
    narrow = gathered(layer, large, *[small] * 20)["weight"]
    wide = gathered(layer, large, *[small] * 20, dtype=torch.float64)["weight"]
    assert (narrow.dtype, wide.dtype) == (torch.float32, torch.float64)
    assert narrow.item() == 1e4  # 1e-4 is less than half of its last place
    assert wide.item() == pytest.approx(1e4 + 20e-4, rel=1e-9)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    model[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.inference_mode():
        first = gathered(model, torch.ones(2, 3))
    assert_same(gathered(model, torch.ones(2, 3)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model[1].training
    assert model[0].weight.requires_grad
    assert not model[0].bias.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_parts_under_activation_checkpointing_count_once() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.layer, x, use_reentrant=False)

    model, x = Checkpointed(), torch.randn(4, 3)
    assert_same(gathered(model, x), {"layer.weight": outer_sum(x)})


def test_half_precision_inputs_are_summed_in_float32() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(50, 3, generator=torch.Generator().manual_seed(0))

    def forward(model: nn.Module, batch: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(batch)

    grams = LayerGrams(layer, forward)
    grams.update(x.bfloat16())
    assert_same(grams.matrices(), {"weight": outer_sum(x.bfloat16())})


def test_products_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match=r"weight: must have finite inputs and gradients; got NaN"):
        gathered(nn.Linear(2, 2), torch.tensor([[1.0, torch.inf]]))


def test_sums_of_parts_of_the_data_add_up() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    parts = [LayerGrams(layer, run_model), LayerGrams(layer, run_model)]
    parts[0].update(x[:2])
    parts[1].update(x[2:])
    totals = {"weight": parts[0].totals["weight"] + parts[1].totals["weight"]}
    parts[0].replace(totals, num_examples=6, refused={})
    assert parts[0].num_examples == 6
    assert_same(parts[0].matrices(), {"weight": outer_sum(x)})
    assert_same(parts[0].matrices(2.5), {"weight": 2.5 * outer_sum(x)})
