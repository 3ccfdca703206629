"""Adapters as experts of whole merges, against PEFT's own arithmetic and by the command line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_merge import merge
from lit_merge.checkpoint import AdapterCheckpoint, fingerprint, open_checkpoint
from lit_merge.checkpoint.adapter_writer import adapted_weights, write_adapter
from lit_merge.cli import main
from lit_merge.errors import InputError
from lit_merge.methods import TIES, Average, GradientMatching, TaskArithmetic
from tests.tiny_adapters import (
    RANK,
    adapted,
    bert,
    gpt2,
    merged_by_peft,
    save_adapter,
    save_base,
)

CONFIG: dict[str, Any] = {"target_modules": ["query", "dense"]}
OF_GPT2: dict[str, Any] = {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True}


def two_adapters(model: nn.Module, folder: Path, **config: Any) -> dict[str, Path]:
    return {
        task: save_adapter(adapted(model, seed, **config), folder / task)
        for seed, task in enumerate(("one", "two"), start=1)
    }


def merged_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("make", "config"), [(bert, CONFIG), (gpt2, OF_GPT2)])
def test_task_arithmetic_of_adapters_is_pefts_concatenation(
    tmp_path: Path, make: Any, config: dict[str, Any]
) -> None:
    peft = pytest.importorskip("peft")
    model = make()
    base = save_base(model, tmp_path)
    adapters = two_adapters(model, tmp_path, **config)
    merge(base, adapters, TaskArithmetic(0.7), tmp_path / "merged", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(model, str(adapters["one"]), adapter_name="one")
        wrapped.load_adapter(str(adapters["two"]), adapter_name="two")
        wrapped.add_weighted_adapter(["one", "two"], [0.7, 0.7], "both", combination_type="cat")
        wrapped.set_adapter("both")
    expected = merged_by_peft(wrapped)
    found = merged_tensors(tmp_path / "merged")
    assert set(found) == set(load_file(base))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_a_merge_over_a_bfloat16_base_is_rounded_once(tmp_path: Path) -> None:
    model = bert().bfloat16().float()
    base = save_base(model, tmp_path, torch.bfloat16)
    adapters = two_adapters(model, tmp_path, **CONFIG)
    merge(base, adapters, TaskArithmetic(0.4), tmp_path / "merged", progress=False)
    stored = load_file(base)
    found = merged_tensors(tmp_path / "merged")
    updates = {task: updates_of(folder) for task, folder in adapters.items()}
    changed = {f"{module}.weight" for module in updates["one"]}
    assert len(changed) == 9
    rounded_otherwise = 0
    for name, value in found.items():
        assert value.dtype == stored[name].dtype
        if name not in changed:
            assert torch.equal(value, stored[name]), name
            continue
        exact = stored[name].double()
        for one in updates.values():
            exact = exact + 0.4 * one[name.removesuffix(".weight")]
        rounded_otherwise += int((value != exact.bfloat16()).sum())
    # Sums in float32 may fall on the other side of a tie, nothing more.
    assert rounded_otherwise <= 2


def updates_of(folder: Path) -> dict[str, Tensor]:
    """Return ΔW by module in float64, from the file alone."""
    tensors = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model."
    return {
        name.removeprefix(stem).removesuffix(".lora_A.weight"): 6
        / RANK
        * (tensors[name.replace("lora_A", "lora_B")].double() @ down.double())
        for name, down in tensors.items()
        if "lora_A" in name
    }


def test_a_merged_adapter_truncated_at_its_own_rank_is_that_adapter(tmp_path: Path) -> None:
    model = bert()
    base = save_base(model, tmp_path)
    folder = save_adapter(adapted(model, 1, **CONFIG), tmp_path / "one")
    merge(base, {"one": folder}, TaskArithmetic(1.0), tmp_path / "merged", progress=False)
    with (
        open_checkpoint(base) as opened,
        open_checkpoint(folder, base=opened) as expert,
        open_checkpoint(tmp_path / "merged") as merged,
    ):
        weights = adapted_weights([expert])
        (tmp_path / "two").mkdir()
        written = write_adapter(tmp_path / "two", opened, merged, rank=RANK, weights=weights)
    assert written.relative_error < 1e-5
    again = updates_of(tmp_path / "two")
    scaling = 6 / RANK  # of the first; that of the second is 1
    for module, update in updates_of(folder).items():
        torch.testing.assert_close(again[module] / scaling, update, rtol=0, atol=1e-5)


def test_two_merged_adapters_fit_into_the_sum_of_their_ranks(tmp_path: Path) -> None:
    model = gpt2()
    base = save_base(model, tmp_path)
    adapters = two_adapters(model, tmp_path, **OF_GPT2)
    merge(base, adapters, TaskArithmetic(0.5), tmp_path / "merged", progress=False)
    with open_checkpoint(base) as opened, open_checkpoint(tmp_path / "merged") as merged:
        experts = [open_checkpoint(folder, base=opened) for folder in adapters.values()]
        weights = adapted_weights(experts)
        errors = []
        for rank in (RANK, 2 * RANK):
            folder = tmp_path / f"rank{rank}"
            folder.mkdir()
            written = write_adapter(folder, opened, merged, rank=rank, weights=weights)
            errors.append(written.relative_error)
        assert errors[0] > 0.05
        assert errors[1] < 1e-5
        with open_checkpoint(tmp_path / f"rank{2 * RANK}", base=opened) as again:
            for name in again:
                value = merged.tensor(name)
                torch.testing.assert_close(again.tensor(name), value, rtol=0, atol=1e-5)


def test_an_adapter_and_a_whole_model_are_merged_together(tmp_path: Path) -> None:
    model = bert()
    base = save_base(model, tmp_path)
    folder = save_adapter(adapted(model, 1, **CONFIG), tmp_path / "one")
    whole = {name: value + 0.1 for name, value in load_file(base).items()}
    save_file(whole, tmp_path / "whole.safetensors")
    experts = {"one": folder, "whole": tmp_path / "whole.safetensors"}
    merge(base, experts, Average(), tmp_path / "merged", progress=False)
    with open_checkpoint(base) as opened, open_checkpoint(folder, base=opened) as expert:
        for name, value in merged_tensors(tmp_path / "merged").items():
            mean = (expert.tensor(name).double() + whole[name].double()) / 2
            torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-6)


def test_methods_with_a_survey_take_adapters(tmp_path: Path) -> None:
    model = bert()
    base = save_base(model, tmp_path)
    adapters = two_adapters(model, tmp_path, **CONFIG)
    merge(base, adapters, TIES(0.3), tmp_path / "merged", progress=False)
    whole = {}
    with open_checkpoint(base) as opened:
        for task, folder in adapters.items():
            with open_checkpoint(folder, base=opened) as expert:
                whole[task] = tmp_path / f"{task}.safetensors"
                save_file({name: expert.tensor(name) for name in expert}, whole[task])
    merge(base, whole, TIES(0.3), tmp_path / "expected", progress=False)
    expected = merged_tensors(tmp_path / "expected")
    for name, value in merged_tensors(tmp_path / "merged").items():
        assert torch.equal(value, expected[name]), name


def test_the_command_line_merges_adapters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = bert()
    base = save_base(model, tmp_path)
    adapters = two_adapters(model, tmp_path, **CONFIG)
    paths = json.dumps({task: str(folder) for task, folder in adapters.items()})
    output = tmp_path / "merged"
    arguments = ["--base", str(base), "--experts", paths, "--output", str(output)]
    method = ["--method", "TaskArithmetic", "--method.scale", "0.7"]
    assert main(["merge", *arguments, *method]) == 0
    capsys.readouterr()
    merge(base, adapters, TaskArithmetic(0.7), tmp_path / "library", progress=False)
    expected = merged_tensors(tmp_path / "library")
    found = merged_tensors(output)
    assert set(found) == set(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    record = json.loads((output / "merge.json").read_text())
    assert record["experts"]["one"]["source"] == "adapter"
    assert any("never factor by factor" in note for note in record["notes"])
    with open_checkpoint(base) as opened, open_checkpoint(adapters["one"], base=opened) as one:
        assert isinstance(one, AdapterCheckpoint)
        assert record["experts"]["one"]["fingerprint"] == fingerprint(one)


def test_what_cannot_be_merged_as_an_adapter_is_refused(tmp_path: Path) -> None:
    model = bert()
    base = save_base(model, tmp_path)
    wrapped = adapted(model, 1, **CONFIG)
    folder = save_adapter(wrapped, tmp_path / "one")
    broken = save_adapter(wrapped, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    torch.save({"state_dict": wrapped.state_dict()}, tmp_path / "run.ckpt")
    factors = r"run\.ckpt: must hold whole weights; got the LoRA factor '.*lora_A\.default\.weight"
    for arguments, message in (
        ((None, {"one": folder}, Average()), r"one: must hold the weights of a whole model; got a"),
        ((folder, {"one": base}, Average()), r"one: must hold the weights of a whole model; got a"),
        ((base, {"one": tmp_path / "run.ckpt"}, Average()), factors),
        ((tmp_path / "run.ckpt", {"one": base}, Average()), factors),
        (
            (base, {"one": broken}, TaskArithmetic(1.0)),
            r"broken/adapter_model\.safetensors: tensor '.*\.weight' .*finite.*; got nan",
        ),
        ((base, {"one": folder}, GradientMatching()), r"one/adapter_model.*must have a Hessian"),
    ):
        with pytest.raises(InputError, match=message):
            merge(*arguments, tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()
