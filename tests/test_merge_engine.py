"""What goes wrong with a merge that is interrupted, resumed or fed with oddities."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_merge.checkpoint import open_checkpoint
from lit_merge.errors import InputError
from lit_merge.methods import (
    EMR,
    TIES,
    TSVM,
    Average,
    FisherAverage,
    GradientMatching,
    KroneckerMatching,
    MergeMethod,
    ModelStock,
    ParameterSlice,
    RegMean,
    TALLMasks,
    TaskArithmetic,
)
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming import (
    Override,
    merge,
    merge_all,
    merge_state_dicts,
    pieces,
    plan_all,
    unfinished,
)
from lit_merge.streaming.unfinished import UnfinishedFolder
from tests.merge_files import METHODS, save_base, save_experts, weights


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the tiny models into many pieces, batches and parts."""
    monkeypatch.setattr(pieces, "CHUNK", 8)
    monkeypatch.setattr(pieces, "BATCH", 20)
    monkeypatch.setattr(pieces, "PART", 32)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of tensors."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")}


def interrupt_after(
    monkeypatch: pytest.MonkeyPatch, parts: int, call: Callable[[], object]
) -> None:
    """Interrupt a merge from the keyboard when some of its parts are done."""
    mark_done = UnfinishedFolder.mark_done
    left = parts

    def marked(self: UnfinishedFolder, label: str, record: Any) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        mark_done(self, label, record)

    with monkeypatch.context() as patch:
        patch.setattr(UnfinishedFolder, "mark_done", marked)
        with pytest.raises(KeyboardInterrupt):
            call()


@pytest.mark.usefixtures("small_pieces")
def test_other_task_names_are_another_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    renamed = dict(zip(("one", "two"), experts.values(), strict=True))
    fresh = merge(base, renamed, TaskArithmetic(0.4), tmp_path / "fresh")
    for parts in (2, 4):
        out = tmp_path / f"out{parts}"
        interrupt_after(
            monkeypatch,
            parts,
            lambda: merge(base, experts, TaskArithmetic(0.4), out),  # noqa: B023
        )
        result = merge(base, renamed, TaskArithmetic(0.4), out)
        assert contents(result.path) == contents(fresh.path)


@pytest.mark.usefixtures("small_pieces")
def test_parts_that_another_output_cuts_otherwise_are_not_taken_for_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    alone: dict[str | Path, MergeMethod] = {tmp_path / "out": TaskArithmetic(0.4)}
    whole: dict[str | Path, MergeMethod] = {tmp_path / "whole": TSVM()}
    for outputs in (alone, alone | whole, alone):
        interrupt_after(monkeypatch, 1, lambda: merge_all(base, experts, outputs))  # noqa: B023
    assert len(list(tmp_path.glob(".out.unfinished-*"))) == 2


class Scaled(MergeMethod):
    """A method of somebody else's, which is no dataclass."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, p: ParameterSlice) -> Tensor:
        return p.experts[0] * self.scale


@pytest.mark.usefixtures("small_pieces")
def test_other_settings_of_any_method_are_another_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    out = tmp_path / "out"
    interrupt_after(monkeypatch, 2, lambda: merge(base, experts, Scaled(0.5), out))
    result = merge(base, experts, Scaled(0.25), out)
    made = load_file(out / "model.safetensors")["emb.weight"]
    assert torch.equal(made, weights(1)["emb.weight"] * 0.25)
    record = json.loads((out / "merge.json").read_text())
    assert record["method"]["init_args"] == {"scale": 0.25}
    assert any("left by another merge" in note for note in result.notes)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("form", ["lightning", "distributed"])
@pytest.mark.parametrize("at", ["before", "after"])
def test_a_kill_while_the_weights_are_brought_into_form_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any, at: str
) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    unlink = Path.unlink

    def killed(self: Path, missing_ok: bool = False) -> None:
        if self.name.startswith("model-0") and self.suffix == ".safetensors":
            if at == "after":
                unlink(self)
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    def run(name: str) -> Path:
        out = tmp_path / name
        merge(base, experts, GradientMatching(), out, format=form, shard_bytes=200)
        return out

    fresh = run("fresh")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # nothing is cleaned up by a kill
        patch.setattr(unfinished, "_remove", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            run("out")
    (left,) = tmp_path.glob(".out.*")
    (left / ".model.partial-1-ab.ckpt").touch()
    out = run("out")
    assert sorted(f.name for f in out.rglob("*")) == sorted(f.name for f in fresh.rglob("*"))
    with open_checkpoint(out) as one, open_checkpoint(fresh) as other:
        assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in other)
    assert list(tmp_path.glob(".out.*")) == []


def test_outputs_must_lie_apart(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    out = tmp_path / "out"
    for other in (str(out), tmp_path / "x" / ".." / "out", out / "inner"):
        outputs: dict[str | Path, MergeMethod] = {out: Average(), other: TaskArithmetic()}
        with pytest.raises(InputError, match=r"^outputs: must be folders apart .*Name other"):
            merge_all(base, experts, outputs)
        with pytest.raises(InputError, match=r"^outputs: must be folders apart"):
            plan_all(base, experts, outputs)
    assert not out.exists()


def test_two_methods_with_masks_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    monkeypatch.setattr(EMR, "survey", lambda *_: pytest.fail("surveyed"))
    with pytest.raises(InputError, match=r"^overrides: must leave one method .*EMR and TALLMasks"):
        merge(
            base, experts, EMR(), tmp_path / "out",
            overrides={"linear.*": Override(method=TALLMasks())},
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "method",
    [TSVM(), ModelStock(), TIES(0.5), EMR(), GradientMatching(), FisherAverage()],
    ids=repr,
)
def test_tensors_without_elements_are_merged_with_the_others(method: MergeMethod) -> None:
    states = [
        {"none.weight": torch.empty(0, 3), "w": torch.randn(3, 2), "t": torch.tensor(float(i))}
        for i in range(3)
    ]
    hessians = [{name: value.square() + 1 for name, value in s.items()} for s in states[1:]]
    merged = merge_state_dicts(states[0], states[1:], method, hessians=hessians)
    assert {name: tuple(value.shape) for name, value in merged.items()} == {
        "none.weight": (0, 3),
        "w": (3, 2),
        "t": (),
    }


def test_a_plan_can_be_made_of_methods_that_look_first(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    chosen = [*METHODS, EMR(), TALLMasks(), ModelStock(), TSVM()]
    outputs: dict[str | Path, MergeMethod] = {
        tmp_path / f"out{i}": method for i, method in enumerate(chosen)
    }
    reports = plan_all(base, experts, outputs)
    assert len(reports) == len(chosen)


def test_outputs_may_treat_a_tensor_differently(tmp_path: Path) -> None:
    base = save_base(tmp_path)
    same = {"norm.bias": weights(0)["norm.bias"]}
    experts = save_experts(tmp_path, changes=same, frozen_parameters=())
    for path in experts.values():  # curvature that lacks a tensor no expert has changed
        state = load_file(path / "hessian.safetensors")
        state.pop("norm.bias")
        save_file(state, path / "hessian.safetensors")
    methods = [TaskArithmetic(0.3), GradientMatching(), TSVM()]
    alone = [
        contents(merge(base, experts, method, tmp_path / f"alone{i}").path)
        for i, method in enumerate(methods)
    ]
    for order in ((0, 1, 2), (2, 1, 0)):
        results = merge_all(base, experts, {tmp_path / f"{order}{i}": methods[i] for i in order})
        assert [contents(result.path) for result in results] == [alone[i] for i in order]


def test_frozen_tensors_of_float8_are_compared(tmp_path: Path) -> None:
    eight = {"emb.weight": weights(0)["emb.weight"].to(torch.float8_e4m3fn)}
    save_file(weights(0) | eight, tmp_path / "base.safetensors")
    experts = save_experts(tmp_path, changes=eight, frozen_parameters=("emb.weight",))
    result = merge(tmp_path / "base.safetensors", experts, Average(), tmp_path / "out")
    made = load_file(result.path / "model.safetensors")["emb.weight"]
    assert torch.equal(made.float(), eight["emb.weight"].float())
    other = {"emb.weight": (eight["emb.weight"].float() * 2).to(torch.float8_e4m3fn)}
    experts = save_experts(tmp_path / "b", changes=other, frozen_parameters=("emb.weight",))
    with pytest.raises(InputError, match=r"which expert\.json says was frozen, must equal"):
        merge(tmp_path / "base.safetensors", experts, Average(), tmp_path / "no")


def test_float8_experts_are_merged_and_written_in_float8(tmp_path: Path) -> None:
    states = [
        {"w": (torch.randn(40, 3, generator=torch.Generator().manual_seed(i))).to(
            torch.float8_e4m3fn
        )}
        for i in range(3)
    ]  # fmt: skip
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for state, file in zip(states, files, strict=True):
        save_file(state, file)
    result = merge(files[0], {"a": files[1], "b": files[2]}, Average(), tmp_path / "out")
    made = load_file(result.path / "model.safetensors")["w"]
    exact = (states[1]["w"].float() + states[2]["w"].float()) / 2
    assert torch.equal(made.float(), exact.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("kind", ["gram", "kronecker"])
def test_factors_that_one_expert_lacks_are_an_error(tmp_path: Path, kind: str) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    for task, path in experts.items():
        names = ["linear.weight"] + ["head.weight"] * (task == "svhn") + ["emb.weight"]
        shapes = {name: weights(0)[name].shape for name in names}
        entries = (
            {name: torch.eye(n) for name, (_, n) in shapes.items()}
            if kind == "gram"
            else {f"{k}.input": torch.eye(n) for k, (_, n) in shapes.items()}
            | {f"{k}.output": torch.eye(m) for k, (m, _) in shapes.items()}
        )
        save_file(entries, path / f"{kind}.safetensors")
    method = RegMean() if kind == "gram" else KroneckerMatching()
    merge(base, experts, method, tmp_path / "out")  # heads are not merged
    policy = ParametersPolicy(heads="merge")
    message = rf"dtd/{kind}\.safetensors: must have an entry for tensor 'head\.weight'.*overrides"
    with pytest.raises(InputError, match=message):
        merge(base, experts, method, tmp_path / "no", policy=policy)
    average = {"head.weight": Override(method=Average())}
    merge(base, experts, method, tmp_path / "yes", policy=policy, overrides=average)


def test_a_full_disk_leaves_none_of_several_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    pwrite, left = os.pwrite, 20

    def full(*args: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", full)
    outputs: dict[str | Path, MergeMethod] = {tmp_path / "a": Average(), tmp_path / "b": TIES()}
    with pytest.raises(InputError, match=r"must have room on its disk; got 'No space left"):
        merge_all(base, experts, outputs)
    assert not list(tmp_path.glob("[ab]"))
    assert not list(tmp_path.glob(".[ab].*"))


def test_models_of_empty_tensors_are_written(tmp_path: Path) -> None:
    for file in "bxy":
        save_file({"w": torch.empty(0, 3)}, tmp_path / f"{file}.safetensors")
    base, *experts = (tmp_path / f"{file}.safetensors" for file in "bxy")
    result = merge(base, experts, TaskArithmetic(), tmp_path / "out")
    assert load_file(result.path / "model.safetensors")["w"].shape == (0, 3)


def test_there_must_be_an_output(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    for call in (merge_all, plan_all):
        with pytest.raises(InputError, match=r"^outputs: must be one folder or more; got none"):
            call(base, experts, {})


def test_a_long_merge_holds_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        """Return the most bytes that Python and torch's buffers held at once, less the headers."""
        for seed, file in enumerate("bxy"):
            generator = torch.Generator().manual_seed(seed)
            state = {"w": torch.randn(count, 1 << 16, generator=generator)}
            save_file(state, tmp_path / f"{file}{count}.safetensors")
        base, *experts = (tmp_path / f"{file}{count}.safetensors" for file in "bxy")
        tracemalloc.start()
        merge(base, experts, TIES(0.3), tmp_path / f"out{count}", threads=1)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1)  # imports
    short, long = peak(32), peak(200)  # 8 pieces and 50
    assert (long - short) / 42 < 1000  # bytes a piece


def test_what_a_rule_keeps_is_not_made_infinite_by_a_narrower_type(tmp_path: Path) -> None:
    save_file(weights(0) | {"linear.bias": torch.full((6,), 1e6)}, tmp_path / "base.safetensors")
    experts = save_experts(tmp_path)
    policy = ParametersPolicy(rules={"linear.bias": "keep"})

    def run(name: str, **options: Any) -> Path:
        base = tmp_path / "base.safetensors"
        return Path(merge(base, experts, Average(), tmp_path / name, policy=policy, **options).path)

    with pytest.raises(InputError, match=r"^dtype: must hold .* got 1e\+06 at \[0\] of .*bias"):
        run("narrow", dtype="float16")
    made = load_file(run("wide", dtype="bfloat16") / "model.safetensors")["linear.bias"]
    assert made.tolist() == torch.full((6,), 1e6).bfloat16().tolist()
