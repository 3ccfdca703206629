"""What can be solved and what its skip is: by hand, on networks of all sorts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_merge.correction.forward import run_model
from lit_merge.errors import InputError
from lit_merge.least_squares.layer_plan import Event, LayerPlan, plan_layers
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_vit


def plan(
    model: nn.Module,
    inputs: Any,
    wanted: Callable[[str, nn.Module], bool] = lambda name, module: True,
) -> LayerPlan:
    return plan_layers(model.eval(), lambda: run_model(model, inputs), wanted)


def weights_only(name: str, module: nn.Module) -> bool:
    return module.get_parameter("weight").ndim > 1 and not isinstance(module, nn.Embedding)


def skips(found: LayerPlan) -> dict[str, Event]:
    return {name: layer.skip for name, layer in found.layers.items() if layer.skip}


def test_a_resnet_has_its_convolutions_with_their_norms_and_skips() -> None:
    import timm

    model = timm.create_model("test_resnet", num_classes=3)
    found = plan(model, images(2))
    convolutions = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {*found.layers} == convolutions | {"fc"}
    assert all((layer.norm is not None) == (name != "fc") for name, layer in found.layers.items())
    assert found.layers["layer1.0.conv1"].norm == "layer1.0.bn1"
    assert not any(layer.activates for layer in found.layers.values())
    assert skips(found) == {
        "layer1.0.conv2": Event("layer1.0.conv1", before=True),
        # The shortcut runs last, so it is what makes up for the branch.
        "layer2.0.downsample.1": Event("layer2.0.bn2", before=False),
        "layer3.0.downsample.1": Event("layer3.0.bn3", before=False),
        "layer4.0.downsample.1": Event("layer4.0.bn2", before=False),
    }
    assert not found.left


def test_a_vit_has_skips_at_the_ends_of_its_branches() -> None:
    found = plan(tiny_vit(), images(2))
    layers = [
        f"blocks.{block}.{layer}"
        for block in (0, 1)
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    ]
    assert list(found.layers) == ["patch_embed.proj", *layers, "norm", "head"]
    assert {*skips(found)} == {
        f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.proj", "mlp.fc2")
    }
    assert skips(found)["blocks.1.mlp.fc2"] == Event("blocks.1.norm2", before=True)


def test_a_bert_has_skips_before_its_layer_norms() -> None:
    found = plan(tiny_bert(), padded_texts((5, 3)))
    layers = {
        f"bert.encoder.layer.{block}.{layer}"
        for block in (0, 1)
        for layer in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "attention.output.LayerNorm",
            "intermediate.dense",
            "output.dense",
            "output.LayerNorm",
        )
    }
    ends = {"bert.pooler.dense", "classifier", "bert.embeddings.LayerNorm"}
    assert {*found.layers} == layers | ends
    assert {*found.embeddings} == {
        f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")
    }
    assert {*skips(found)} == {name for name in layers if name.endswith("output.dense")}


def test_a_gpt2_has_its_transposed_layers() -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2, pad_token_id=0, num_labels=3
    )
    model = GPT2ForSequenceClassification(config)
    found = plan(model, padded_texts((5, 3)), weights_only)
    block = "transformer.h.0"
    layers = [f"{block}.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert list(found.layers) == [*layers, "score"]
    assert {*skips(found)} == {f"{block}.attn.c_proj", f"{block}.mlp.c_proj"}


def test_a_convnext_has_grouped_convolutions_and_no_skip_behind_its_scale() -> None:
    import timm

    model = timm.create_model("test_convnext", num_classes=3)
    found = plan(model, images(2), weights_only)
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert {*found.layers} == layers
    assert not skips(found)


class Standardised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight / self.weight.norm(), self.bias)


class Odd(nn.Module):
    """A layer of every sort that cannot be solved, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fine = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.functional = nn.Linear(4, 4)
        self.both = nn.Linear(4, 4)
        self.standardised = Standardised(4, 4)
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.twice(self.fine(x))))
        x = F.linear(torch.tanh(x), self.functional.weight)
        x = self.both(torch.tanh(x)) @ self.both.weight
        output: Tensor = self.standardised(x)
        return output


def test_what_cannot_be_solved_is_left_with_its_reason() -> None:
    found = plan(Odd(), torch.randn(3, 4))
    assert list(found.layers) == ["fine"]
    assert found.left == {
        "twice": "it is called 2 times as a module",
        "functional": "it is called 0 times as a module",
        "both": "its weights are used elsewhere too",
        "standardised": "its output is not its weight times its input",
        "never": "it is called 0 times as a module",
    }


def test_nothing_that_can_be_solved_is_an_error_with_reasons() -> None:
    with pytest.raises(
        InputError, match=r"layer of Odd to solve; got none \(never: it is called 0"
    ):
        plan(Odd(), torch.randn(3, 4), lambda name, module: name == "never")


class Additions(nn.Module):
    """One addition, in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        if self.kind == "functional":  # seen for the first time where the layer takes it
            return h + self.one(h)
        if self.kind == "in place":
            out = self.one(h)
            out += x
            return out
        if self.kind == "module":
            h = self.act(self.one(x))
            return self.two(torch.tanh(h)) + h
        if self.kind == "changed later":
            h = self.one(x)
            out = self.two(torch.tanh(h))
            h.mul_(2)
            return out + h
        if self.kind == "activated":
            h = self.one(x)
            return self.act(self.two(h)) + h
        if self.kind == "norm":
            return self.bn(self.one(x)) + x
        out = self.one(h)  # the skip is made behind the layer
        return out + torch.tanh(torch.sin(h))


ADDITIONS = {
    "functional": ("one", Event("one", before=True)),
    "in place": None,  # x itself is given to no module
    "module": ("two", Event("act", before=False)),
    "changed later": None,
    "activated": None,
    "norm": ("one", Event("one", before=True)),
    "later": None,
}


@pytest.mark.parametrize("kind", ADDITIONS)
def test_a_skip_is_what_exists_unchanged_before_the_layer(kind: str) -> None:
    expected = ADDITIONS[kind]
    found = skips(plan(Additions(kind), torch.randn(3, 4), weights_only))
    assert found == ({} if expected is None else dict([expected]))


class SharedActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.one(x))
        output: Tensor = self.two(torch.sin(self.act(torch.cos(h)))) + h
        return output


def test_a_module_that_runs_twice_does_not_tell_which_of_its_outputs_is_meant() -> None:
    found = skips(plan(SharedActivation(), torch.randn(3, 4)))
    assert found == {}


def test_a_norm_with_an_activation_is_solved_but_its_output_is_not_linear() -> None:
    from timm.layers import BatchNormAct2d

    class Net(nn.Module):
        def __init__(self, apply_act: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = BatchNormAct2d(3, apply_act=apply_act)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.norm(self.conv(x)) + x
            return output

    plain = plan(Net(False), images(2)).layers["conv"]
    active = plan(Net(True), images(2)).layers["conv"]
    assert (plain.norm, plain.activates, plain.skip) == ("norm", False, Event("conv", before=True))
    assert (active.norm, active.activates, active.skip) == ("norm", True, None)
