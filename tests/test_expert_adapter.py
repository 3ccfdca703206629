"""LoRA adapters with the curvature of base plus adapter beside them, and merges by it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_merge import curvature_of_checkpoint, merge, open_expert
from lit_merge.checkpoint import open_checkpoint
from lit_merge.errors import InputError
from lit_merge.expert.adapter import add_to_adapter
from lit_merge.expert.info import ExpertInfo
from lit_merge.methods import Average, GradientMatching, TaskArithmetic
from lit_merge.tasks import ClassificationModule, DatasetTask, TaskDataModule
from tests.tiny_adapters import RANK, adapted, merged_by_peft, save_adapter
from tests.tiny_models import padded_texts, tiny_bert

CONFIG: dict[str, Any] = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


def texts() -> list[tuple[dict[str, Tensor], int]]:
    batch = padded_texts((5, 3, 4, 5), seed=3)
    return [({name: value[i] for name, value in batch.items()}, i % 3) for i in range(4)]


def save_encoder(model: nn.Module, folder: Path) -> Path:
    """Write the base as the hub has it: the encoder alone, without a head."""
    encoder = model.bert.state_dict()  # type: ignore[operator, union-attr]
    save_file({name: value.clone() for name, value in encoder.items()}, folder / "base.safetensors")
    return folder / "base.safetensors"


def measure(model: nn.Module, adapter: Path, output: Path, **options: Any) -> Path:
    module = ClassificationModule(copy.deepcopy(model), 3)
    data = TaskDataModule(DatasetTask(texts(), num_classes=3), batch_size=2)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", enable_model_summary=False, **settings)  # type: ignore[arg-type]
    return curvature_of_checkpoint(
        trainer, module, data, checkpoint=adapter, output=output, labels="observed", **options
    )


def squared_gradients(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Σ of squared gradients, one text at a time, in float64."""
    model = tiny_bert().double()
    model.load_state_dict(state)
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for inputs, label in texts():
        model.zero_grad()
        logits = model(**{name: value[None] for name, value in inputs.items()}).logits
        F.cross_entropy(logits, torch.tensor([label])).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            found[name] += parameter.grad**2
    return found


def with_hessian(adapter: Path, base: Path, value: float) -> Path:
    """Give an adapter the same Hessian at every weight."""
    with open_checkpoint(base) as below, open_checkpoint(adapter, base=below) as opened:
        hessian = {name: torch.full(info.shape, value) for name, info in opened.infos.items()}
    artifacts = {"hessian": hessian}
    info = ExpertInfo(num_examples=10)
    return add_to_adapter(adapter, base, info=info, names=hessian, artifacts=artifacts)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_curvature_beside_an_adapter_is_that_of_base_plus_adapter(tmp_path: Path) -> None:
    model = tiny_bert()
    base = save_encoder(model, tmp_path)
    wrapped = adapted(model, 1, **CONFIG)
    folder = save_adapter(wrapped, tmp_path / "adapter")
    assert measure(model, folder, folder, base=base, task="one") == folder
    whole = merged_by_peft(wrapped)
    oracle = squared_gradients(whole)
    with open_checkpoint(base) as below:
        expert = open_expert(folder, base=below)
        assert expert.hessian is not None
        assert expert.info.task == "one"
        assert expert.info.num_examples == 4
        assert expert.info.head_parameters == ("classifier.weight", "classifier.bias")
        found = {name: expert.hessian.tensor(name) for name in expert.hessian}
        expert.close()
    assert set(found) == {name.removeprefix("bert.") for name in oracle}
    for name, value in oracle.items():
        own = found[name.removeprefix("bert.")]
        limit = 1e-12 + 1e-7 * float(value.max())  # that of a key's bias is zero
        torch.testing.assert_close(own.double(), value, rtol=1e-3, atol=limit)


def test_another_output_is_a_whole_expert(tmp_path: Path) -> None:
    model = tiny_bert()
    base = save_encoder(model, tmp_path)
    wrapped = adapted(model, 1, **CONFIG)
    folder = save_adapter(wrapped, tmp_path / "adapter")
    measure(model, folder, tmp_path / "expert", base=base)
    expert = open_expert(tmp_path / "expert")
    assert expert.hessian is not None
    for name, value in merged_by_peft(wrapped).items():
        torch.testing.assert_close(expert.weights.tensor(f"model.{name}"), value)
    expert.close()
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors") == [
        "adapter_model.safetensors"
    ]


def test_matching_the_gradients_of_one_adapter_returns_base_plus_adapter(tmp_path: Path) -> None:
    model = tiny_bert()
    base = save_encoder(model, tmp_path)
    wrapped = adapted(model, 1, **CONFIG)
    folder = save_adapter(wrapped, tmp_path / "adapter")
    measure(model, folder, folder, base=base)
    merge(base, {"one": folder}, GradientMatching(), tmp_path / "merged", progress=False)
    whole = merged_by_peft(wrapped)
    for name, value in weights_of(tmp_path / "merged").items():
        torch.testing.assert_close(value, whole[f"bert.{name}"], rtol=0, atol=1e-6)
    head = load_file(tmp_path / "merged" / "heads" / "one.safetensors")
    assert torch.equal(head["classifier.weight"], whole["classifier.weight"])


def test_with_equal_hessians_matching_gradients_is_the_mean_of_the_updates(tmp_path: Path) -> None:
    model = tiny_bert()
    base = save_encoder(model, tmp_path)
    adapters = {
        task: with_hessian(
            save_adapter(adapted(model, seed, **CONFIG), tmp_path / task), base, value=3.0
        )
        for seed, task in enumerate(("one", "two"), start=1)
    }
    merge(base, adapters, GradientMatching(), tmp_path / "matched", progress=False)
    merge(base, adapters, TaskArithmetic(0.5), tmp_path / "mean", progress=False)
    mean = weights_of(tmp_path / "mean")
    stored = load_file(base)
    assert any(not torch.equal(mean[name], value) for name, value in stored.items())
    for name, value in weights_of(tmp_path / "matched").items():
        torch.testing.assert_close(value, mean[name], rtol=0, atol=1e-6)

    # The same as one adapter again, whose rank can hold both.
    options: dict[str, Any] = {"format": "adapter", "rank": 2 * RANK, "progress": False}
    merge(base, adapters, GradientMatching(), tmp_path / "lora", **options)
    # PEFT would look for a head in one of type SEQ_CLS; each task's is in heads/.
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["task_type"] is None
    assert (tmp_path / "lora" / "heads" / "two.safetensors").is_file()
    with (
        open_checkpoint(base) as below,
        open_checkpoint(tmp_path / "lora", base=below) as lora,
    ):
        for name, value in mean.items():
            torch.testing.assert_close(lora.tensor(name), value, rtol=0, atol=1e-5)


def test_the_surer_adapter_counts_for_more(tmp_path: Path) -> None:
    model = tiny_bert()
    base = save_encoder(model, tmp_path)
    one, two = (
        save_adapter(adapted(model, seed, **CONFIG), tmp_path / task)
        for seed, task in enumerate(("one", "two"), start=1)
    )
    adapters = {"one": with_hessian(one, base, 3.0), "two": with_hessian(two, base, 1.0)}
    merge(base, adapters, GradientMatching(), tmp_path / "merged", progress=False)
    found = weights_of(tmp_path / "merged")
    with open_checkpoint(base) as below:
        experts = [open_checkpoint(folder, base=below) for folder in (one, two)]
        for name in below:
            first, second = (expert.tensor(name).double() for expert in experts)
            expected = (3 * first + second) / 4
            torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-6)
        for expert in experts:
            expert.close()


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    model = tiny_bert()
    base = save_encoder(model, tmp_path)
    folder = save_adapter(adapted(model, 1, **CONFIG), tmp_path / "adapter")
    save_file({n: v.clone() for n, v in model.state_dict().items()}, tmp_path / "whole.safetensors")
    with pytest.raises(InputError, match=r"base: must be left out where .*whole\.safetensors"):
        measure(model, tmp_path / "whole.safetensors", tmp_path / "expert", base=base)
    with pytest.raises(InputError, match=r"adapter: must hold the weights of a whole model"):
        measure(model, folder, tmp_path / "expert")
    with_hessian(folder, base, 1.0)
    with pytest.raises(InputError, match=r"hessian\.safetensors: must not exist yet"):
        measure(model, folder, folder, base=base)
    measure(model, folder, folder, base=base, replace=True)

    other = save_adapter(adapted(model, 2, **CONFIG), tmp_path / "other")
    shutil.copy(other / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"hessian\.safetensors: belongs to weights .*, but "):
        merge(base, {"one": folder}, GradientMatching(), tmp_path / "merged", progress=False)
    merge(base, {"one": other}, Average(), tmp_path / "merged", progress=False)
