"""Inputs for the proof of an export."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from lit_merge.errors import InputError
from lit_merge.export.example_inputs import made_up_inputs, num_examples, task_inputs
from lit_merge.tasks import DatasetTask
from lit_merge.tasks.classification import read_logits
from tests.corrected_folders import tiny_gpt2
from tests.tiny_models import tiny_bert, tiny_vit


def made_up(model: nn.Module) -> Any:
    return made_up_inputs(model, lambda inputs: read_logits(model, inputs))


def test_a_task_gives_its_first_examples() -> None:
    examples = [(torch.full((2,), float(i)), 0) for i in range(10)]
    inputs = task_inputs(DatasetTask(examples, num_classes=2))
    assert inputs[:, 0].tolist() == list(range(8))
    tested = task_inputs(DatasetTask(None, None, examples[:3], num_classes=2))
    assert num_examples(tested) == 3


def test_a_task_without_examples_is_refused() -> None:
    with pytest.raises(InputError, match="DatasetTask: must have examples for the proof"):
        task_inputs(DatasetTask(num_classes=2))


def test_timm_says_its_size_and_channels() -> None:
    assert made_up(tiny_vit()).shape == (8, 3, 32, 32)
    net = timm.create_model("resnet10t", in_chans=1, num_classes=3).eval()
    assert made_up(net).shape[:2] == (8, 1)


def test_texts_are_padded_where_there_is_a_token_for_it() -> None:
    for model in (tiny_bert(), tiny_gpt2()):
        inputs = made_up(model)
        mask = inputs["attention_mask"].bool()
        assert not bool(mask.all())
        assert bool((inputs["input_ids"][~mask] == 0).all())
        assert bool((inputs["input_ids"][mask] != 0).all())
        assert int(inputs["input_ids"].max()) < 50


def test_a_model_that_takes_one_text_at_a_time_gets_one() -> None:
    model: Any = tiny_gpt2()
    model.config.pad_token_id = None
    assert num_examples(made_up(model)) == 1


def test_images_of_transformers_have_the_configured_size() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=8, num_channels=1, num_labels=2,
    )  # fmt: skip
    assert made_up(ViTForImageClassification(config).eval())["pixel_values"].shape == (8, 1, 16, 16)


def test_a_lightning_example_goes_first() -> None:
    net: Any = nn.Linear(3, 2)
    net.example_input_array = torch.randn(5, 3)
    assert made_up(net) is net.example_input_array


def test_a_network_that_says_nothing_needs_examples() -> None:
    with pytest.raises(InputError, match="examples: must be given for the proof, as nothing tells"):
        made_up(nn.Linear(3, 2))
