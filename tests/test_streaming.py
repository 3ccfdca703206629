from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from lit_merge.methods import (
    TIES,
    Average,
    FisherAverage,
    GradientMatching,
    MergeMethod,
    ParameterSlice,
    TaskArithmetic,
    WeightedAverage,
)
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming import MergeWarning, merge, merge_in_memory, merge_state_dicts
from lit_merge.streaming import stream as merge_stream
from tests.merge_files import (
    MERGED,
    METHODS,
    TASKS,
    flat,
    hessian,
    save_base,
    save_expert,
    save_experts,
    tensors,
    weights,
)
from tests.references import gradient_matching_by_entries, ties_by_sorting


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_files_merge_to_what_the_rule_says_entry_by_entry(tmp_path: Path) -> None:
    experts = save_experts(tmp_path)
    merge(save_base(tmp_path), experts, GradientMatching(0.5, damping=1e-3), tmp_path / "merged")
    exact = gradient_matching_by_entries(
        flat(weights(0)),
        [flat(weights(seed)) for seed in (1, 2)],
        [flat(hessian(weights(seed), seed)) for seed in (1, 2)],
        [1e-3] * len(flat(weights(0))),
        (0.5, 0.5),
    )
    result = flat(tensors(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(torch.tensor(result), torch.tensor(exact))


def test_global_ties_is_over_the_merged_tensors_of_all_files(tmp_path: Path) -> None:
    merge(save_base(tmp_path), save_experts(tmp_path), TIES(0.2), tmp_path / "merged")
    expected = ties_by_sorting(
        flat(weights(0)),
        [flat(weights(seed)) for seed in (1, 2)],
        density=0.2,
        scale=1.0,
        frequency=False,
    )
    result = flat(tensors(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(torch.tensor(result), torch.tensor(expected))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_files_and_state_dicts_merge_to_the_same_bits(tmp_path: Path, method: MergeMethod) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    merge(base, experts, method, tmp_path / "merged")
    policy = ParametersPolicy(rules={"head.*": "keep"})
    state = merge_state_dicts(
        weights(0),
        {task: weights(seed) for seed, task in enumerate(TASKS, start=1)},
        method,
        hessians={task: hessian(weights(s), s) for s, task in enumerate(TASKS, start=1)},
        policy=policy,
    )
    in_memory = merge_in_memory(base, experts, method)
    written = tensors(tmp_path / "merged" / "model.safetensors")
    assert list(state) == list(weights(0))
    assert written.keys() == state.keys() == in_memory.state.keys()
    for name, value in written.items():
        assert torch.equal(value, state[name])
        assert torch.equal(value, in_memory.state[name])


def test_the_folder_holds_weights_heads_and_provenance(tmp_path: Path) -> None:
    result = merge(
        save_base(tmp_path), save_experts(tmp_path), Average(), tmp_path / "deep" / "merged"
    )
    assert result.path == tmp_path / "deep" / "merged"
    assert result.tasks == TASKS
    assert result.seconds > 0
    assert files(result.path) == [
        "heads/dtd.safetensors",
        "heads/svhn.safetensors",
        "merge.json",
        "model.safetensors",
    ]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["merged"]
    for file in ("model.safetensors", "heads/dtd.safetensors"):
        with safe_open(result.path / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_every_kind_of_tensor_is_treated_by_its_rule_and_recorded(tmp_path: Path) -> None:
    result = merge(save_base(tmp_path), save_experts(tmp_path), Average(), tmp_path / "merged")
    actions = {plan.name: plan.action for plan in result.record}
    assert actions == dict.fromkeys(MERGED, "merge") | {
        "norm.running_mean": "average",
        "norm.running_var": "average",
        "norm.num_batches_tracked": "keep",
        "head.weight": "per-task",
        "head.bias": "per-task",
    }
    merged = tensors(result.path / "model.safetensors")
    one, two = weights(1), weights(2)
    torch.testing.assert_close(
        merged["norm.running_var"], (one["norm.running_var"] + two["norm.running_var"]) / 2
    )
    assert merged["norm.num_batches_tracked"].item() == 100
    for name in ("head.weight", "head.bias"):
        assert torch.equal(merged[name], weights(0)[name])
        assert torch.equal(tensors(result.path / "heads/svhn.safetensors")[name], one[name])
        assert torch.equal(tensors(result.path / "heads/dtd.safetensors")[name], two[name])


def test_heads_of_other_widths_are_kept_per_task(tmp_path: Path) -> None:
    experts = {
        "svhn": save_expert(tmp_path, "svhn", 1, classes=10),
        "dtd": save_expert(tmp_path, "dtd", 2, classes=47),
    }
    merged = merge_in_memory(save_base(tmp_path), experts, GradientMatching())
    assert merged.heads["svhn"]["head.weight"].shape == (10, 6)
    assert merged.heads["dtd"]["head.bias"].shape == (47,)
    assert merged.state["head.weight"].shape == (3, 6)


def test_without_base_heads_are_only_in_their_own_files(tmp_path: Path) -> None:
    merge(None, save_experts(tmp_path), Average(), tmp_path / "merged")
    names = tensors(tmp_path / "merged" / "model.safetensors").keys()
    assert names == weights(0).keys() - {"head.weight", "head.bias"}


def test_a_rule_can_merge_the_heads(tmp_path: Path) -> None:
    result = merge(
        save_base(tmp_path),
        save_experts(tmp_path),
        Average(),
        tmp_path / "merged",
        policy=ParametersPolicy(heads="merge"),
    )
    merged = tensors(result.path / "model.safetensors")["head.bias"]
    torch.testing.assert_close(merged, (weights(1)["head.bias"] + weights(2)["head.bias"]) / 2)
    assert not (result.path / "heads").exists()


def test_dtype_sets_the_floating_type_that_is_written(tmp_path: Path) -> None:
    result = merge(
        save_base(tmp_path),
        save_experts(tmp_path),
        Average(),
        tmp_path / "merged",
        dtype="bfloat16",
    )
    merged = tensors(result.path / "model.safetensors")
    full = merge_state_dicts(weights(0), [weights(1), weights(2)], Average())
    assert merged["norm.num_batches_tracked"].dtype == torch.int64
    for name in MERGED:
        assert torch.equal(merged[name], full[name].to(torch.bfloat16))
    head = tensors(result.path / "heads/svhn.safetensors")["head.bias"]
    assert head.dtype == torch.bfloat16


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^dtype: must be one of float32, .*; got 'half'"):
        merge(save_base(tmp_path), save_experts(tmp_path), dtype="half")


def test_a_merged_folder_is_an_input_again(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    first = merge(base, experts, Average(), tmp_path / "first")
    opened = open_expert(first.path)
    opened.close()
    merge(base, {"a": first.path, "b": experts["svhn"]}, Average(), tmp_path / "second")
    merged = tensors(tmp_path / "second" / "model.safetensors")["linear.bias"]
    expected = 0.75 * weights(1)["linear.bias"] + 0.25 * weights(2)["linear.bias"]
    torch.testing.assert_close(merged, expected)


def test_the_trace_of_every_expert_is_reported(tmp_path: Path) -> None:
    result = merge(save_base(tmp_path), save_experts(tmp_path), output=tmp_path / "merged")
    for seed, task in enumerate(TASKS, start=1):
        expected = sum(hessian(weights(seed), seed)[name].double().sum() for name in MERGED)
        assert result.traces[task] == pytest.approx(float(expected), rel=1e-6)
    assert result.warnings == ()


def test_traces_that_lie_far_apart_are_warned_of(tmp_path: Path) -> None:
    experts = {
        "svhn": save_expert(tmp_path, "svhn", 1),
        "dtd": save_expert(tmp_path, "dtd", 2, scale=100.0),
    }
    message = r"differ by a factor of \d+ \('svhn' .*, 'dtd' .*\), so that 'dtd' decides"
    with pytest.warns(MergeWarning, match=message):
        result = merge(save_base(tmp_path), experts, FisherAverage(), tmp_path / "merged")
    assert len(result.warnings) == 1
    assert json.loads((result.path / "merge.json").read_text())["warnings"] == list(result.warnings)


def test_hessians_of_different_kinds_are_warned_of(tmp_path: Path) -> None:
    experts = {
        "svhn": save_expert(tmp_path, "svhn", 1),
        "dtd": save_expert(tmp_path, "dtd", 2, estimator="adam", labels=None),
    }
    message = r"different estimators \('svhn': exact, sampled labels, 'dtd': adam\)"
    with pytest.warns(MergeWarning, match=message):
        merge_in_memory(save_base(tmp_path), experts)


def test_an_expert_without_any_curvature_is_warned_of() -> None:
    states = [weights(seed) for seed in range(3)]
    zero = {name: 0 * value for name, value in hessian(states[1], 1).items()}
    with pytest.warns(MergeWarning, match=r"differ without bound \('0' 0, '1'"):
        merge_state_dicts(
            states[0], states[1:], GradientMatching(), hessians=[zero, hessian(states[2], 2)]
        )


def test_errors_that_headers_can_tell_come_before_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("data was read")

    base, experts = save_base(tmp_path), save_experts(tmp_path)
    bare = save_expert(tmp_path, "bare", 3, with_hessian=False)
    wide = save_expert(tmp_path, "wide", 3, changes={"norm.bias": torch.zeros(9)})
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(base.read_bytes()[:-10])
    extra = tmp_path / "extra.safetensors"
    save_file(weights(1) | {"adapter.weight": torch.zeros(2)}, extra)
    short = tmp_path / "short.safetensors"
    save_file({name: value for name, value in weights(1).items() if name != "linear.bias"}, short)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "old.txt").write_text("old")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(merge_stream.MergeStream, "run", forbidden)
    monkeypatch.setattr(merge_stream.MergeStream, "survey", forbidden)
    svhn = experts["svhn"]
    for arguments, message in (
        ((tmp_path / "gone", experts), r"gone: must exist"),
        ((base, {"svhn": tmp_path / "gone"}), r"gone: must exist"),
        ((base, {"svhn": cut}), r"cut\.safetensors: must be a whole"),
        ((None, experts), r"^base: must be given for GradientMatching"),
        ((base, {"svhn": svhn, "bare": bare}), r"bare/model.*must have a Hessian"),
        ((base, {"svhn": svhn, "wide": wide}), r"wide/model.*'norm\.bias' .*\[4\].*got \[9\]"),
        ((base, {"x": extra}, Average()), r"extra\.safetensors: .*'adapter\.weight'"),
        ((base, {"x": short}, Average()), r"short\.safetensors: .*'linear\.bias'"),
        ((base, experts, Average(), taken), r"taken: must be empty or absent"),
        ((base, experts, TaskArithmetic({"svhn": 1.0})), r"scale: .*got none for 'dtd'"),
        ((base, experts, TaskArithmetic({"x": 1.0})), r"scale: .*got 'x'"),
        ((base, experts, WeightedAverage([1.0])), r"one number per expert, 2; got 1"),
    ):
        method = arguments[2] if len(arguments) > 2 else GradientMatching()
        output = arguments[3] if len(arguments) > 3 else tmp_path / "merged"
        with pytest.raises(InputError, match=message):
            merge(arguments[0], arguments[1], method, output)
    assert sorted(tmp_path.iterdir()) == before


def test_a_merge_that_fails_in_the_middle_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    merge(base, experts, Average(), tmp_path / "merged")
    old = (tmp_path / "merged" / "model.safetensors").read_bytes()

    @dataclasses.dataclass(frozen=True)
    class Failing(MergeMethod):
        def __call__(self, p: ParameterSlice) -> Tensor:
            if p.name == "linear.bias":
                raise RuntimeError("power cut")
            return p.experts[0]

    with pytest.raises(RuntimeError, match="power cut"):
        merge(base, experts, Failing(), tmp_path / "merged", replace=True)
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "base.safetensors",
        "dtd",
        "merged",
        "svhn",
    ]


def test_replacing_leaves_nothing_of_the_old_folder(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    merge(base, experts, Average(), tmp_path / "merged")
    (tmp_path / "merged" / "model-00001-of-00002.safetensors").write_text("stale")
    policy = ParametersPolicy(heads="merge")
    merge(base, experts, Average(), tmp_path / "merged", policy=policy, replace=True)
    assert files(tmp_path / "merged") == ["merge.json", "model.safetensors"]


def test_an_output_that_holds_the_inputs_is_not_replaced(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path / "base"), save_experts(tmp_path / "runs")
    for output in (tmp_path / "runs", experts["dtd"], tmp_path / "base"):
        with pytest.raises(InputError, match=r"must not hold the inputs when it is replaced"):
            merge(base, experts, Average(), output, replace=True)
    assert (experts["dtd"] / "expert.json").exists()


def test_experts_that_change_nothing_are_noted(tmp_path: Path) -> None:
    base = save_expert(tmp_path, "base", 0)
    one = save_expert(tmp_path, "svhn", 1)
    experts = {"same": base, "svhn": one, "twin": one}
    result = merge(base, experts, TaskArithmetic(0.5), tmp_path / "merged")
    assert [note for note in result.notes if note.startswith("expert")] == [
        "expert 'same' equals the base in every merged tensor: it changes nothing but the weights "
        "of the others",
        "experts 'svhn' and 'twin' equal each other in every merged tensor",
    ]
    assert json.loads((result.path / "merge.json").read_text())["notes"] == list(result.notes)


def test_merging_does_not_import_lightning_or_model_libraries() -> None:
    code = (
        "import sys, lit_merge.streaming; "
        "heavy = {'lightning', 'transformers', 'timm', 'datasets', 'rich', 'scipy'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
