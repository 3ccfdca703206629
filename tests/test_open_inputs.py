from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, write_expert
from lit_merge.methods import (
    Average,
    FisherAverage,
    GradientMatching,
    TaskArithmetic,
)
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming import merge, merge_in_memory, merge_state_dicts
from lit_merge.streaming.open_inputs import tasks_of
from tests.merge_files import (
    MERGED,
    TASKS,
    hessian,
    save_base,
    save_expert,
    save_experts,
    tensors,
    tied_models,
    weights,
)


def test_lightning_checkpoints_and_bare_state_dicts_merge_under_the_names_of_the_base(
    tmp_path: Path,
) -> None:
    for seed, task in enumerate(TASKS, start=1):
        prefixed = {f"model.{name}": value for name, value in weights(seed).items()}
        checkpoint = {"state_dict": prefixed, "pytorch-lightning_version": "2.6.6", "epoch": 1}
        torch.save(checkpoint, tmp_path / f"{task}.ckpt")
    experts = [tmp_path / "svhn.ckpt", tmp_path / "dtd.ckpt"]
    policy = ParametersPolicy(heads="merge")
    result = merge(
        save_base(tmp_path), experts, TaskArithmetic(0.3), tmp_path / "merged", policy=policy
    )
    expected = merge_state_dicts(weights(0), [weights(1), weights(2)], TaskArithmetic(0.3))
    merged = tensors(result.path / "model.safetensors")
    assert result.tasks == TASKS
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_a_prefix_in_the_experts_is_removed_from_their_hessians_and_heads_too(
    tmp_path: Path,
) -> None:
    for seed, task in enumerate(TASKS, start=1):
        state = weights(seed, classes=4 + seed)
        write_expert(
            tmp_path / task,
            weights={f"net.{name}": value for name, value in state.items()},
            info=ExpertInfo(head_parameters=("net.head.weight", "net.head.bias")),
            hessian={f"net.{name}": value for name, value in hessian(state, seed).items()},
        )
    plain = save_experts(tmp_path / "plain")
    base = save_base(tmp_path)
    prefixed = merge_in_memory(base, [tmp_path / task for task in TASKS])
    expected = merge_in_memory(base, plain)
    assert prefixed.heads["dtd"].keys() == {"head.weight", "head.bias"}
    for name in MERGED:
        assert torch.equal(prefixed.state[name], expected.state[name])


def test_the_hessian_of_the_base_is_the_prior(tmp_path: Path) -> None:
    prior = save_expert(tmp_path, "prior", 0, scale=3.0)
    experts = save_experts(tmp_path)
    method = GradientMatching(base_scale=0.5)
    expected = merge_state_dicts(
        weights(0),
        [weights(1), weights(2)],
        method,
        hessians=[hessian(weights(seed), seed) for seed in (1, 2)],
        base_hessian={name: 3.0 * value for name, value in hessian(weights(0), 0).items()},
        policy=ParametersPolicy(rules={"head.*": "keep"}),
    )
    for given in (prior, prior / "hessian.safetensors"):
        merged = merge_in_memory(prior, experts, method, base_hessian=given)
        for name in MERGED:
            assert torch.equal(merged.state[name], expected[name])
    plain = merge_in_memory(prior, experts, method)
    assert not torch.equal(plain.state["linear.bias"], expected["linear.bias"])


def test_the_hessian_of_another_base_is_refused(tmp_path: Path) -> None:
    experts = save_experts(tmp_path)
    with pytest.raises(InputError, match=r"svhn/hessian\.safetensors: belongs to weights"):
        merge_in_memory(save_base(tmp_path), experts, base_hessian=experts["svhn"])


def test_the_hessian_of_other_weights_is_refused(tmp_path: Path) -> None:
    experts = save_experts(tmp_path)
    (experts["dtd"] / "hessian.safetensors").write_bytes(
        (experts["svhn"] / "hessian.safetensors").read_bytes()
    )
    with pytest.raises(InputError, match=r"dtd/hessian\.safetensors: belongs to weights \w+…, but"):
        merge(save_base(tmp_path), experts, output=tmp_path / "merged")


def test_tied_weights_are_merged_once_and_stay_tied_in_memory() -> None:
    states, curvature = tied_models()
    merged = merge_state_dicts(states[0], states[1:], GradientMatching(), hessians=curvature[1:])
    assert merged["lm.decoder.weight"] is merged["emb.weight"]
    untied = [{n: v for n, v in s.items() if n != "lm.decoder.weight"} for s in states]
    expected = merge_state_dicts(untied[0], untied[1:], GradientMatching(), hessians=curvature[1:])
    assert torch.equal(merged["emb.weight"], expected["emb.weight"])


def test_names_that_share_memory_by_accident_are_merged_apart() -> None:
    zeros = torch.zeros(2)
    base = {"a": zeros, "b": zeros}
    experts = [{"a": torch.ones(2), "b": torch.full((2,), 3.0)}]
    merged = merge_state_dicts(base, experts, TaskArithmetic(0.5))
    assert merged["a"].tolist() == [0.5, 0.5]
    assert merged["b"].tolist() == [1.5, 1.5]


@pytest.mark.parametrize(
    ("paths", "tasks"),
    [
        (["runs/svhn", "runs/dtd/"], ["svhn", "dtd"]),
        (["runs/svhn/expert", "runs/dtd/checkpoints/expert"], ["svhn", "dtd"]),
        (["svhn/lightning_logs/version_3/checkpoints/epoch=2-step=90.ckpt"], ["svhn"]),
        (["a/svhn.ckpt", "b/dtd/model.safetensors", Path("c/last.ckpt")], ["svhn", "dtd", "c"]),
    ],
)
def test_experts_in_a_list_are_called_after_their_folders(
    paths: list[str | Path], tasks: list[str]
) -> None:
    assert tasks_of(paths) == dict(zip(tasks, paths, strict=True))


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([], r"^experts: must be one path or more"),
        ({}, r"^experts: must be one path or more"),
        ("runs/svhn", r"^experts: must be one path or more, .*; got 'runs/svhn'"),
        (7, r"^experts: must be one path or more, .*; got 7"),
        (["a/svhn", "b/svhn"], r"got 'a/svhn' and 'b/svhn', both of which are called 'svhn'"),
        (["/expert"], r"^experts: must be in folders that name their tasks; got '/expert'"),
        ({"../svhn": "a"}, r"task names that can name a file; got '\.\./svhn'"),
        ({"a/b": "a"}, r"task names that can name a file; got 'a/b'"),
        ({"": "a"}, r"task names that can name a file; got ''"),
        ({1: "a"}, r"task names that can name a file; got 1"),
        ({"svhn": None}, r"^experts\['svhn'\]: must be a path; got None"),
    ],
)
def test_experts_without_usable_names_are_refused(experts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tasks_of(experts)


def test_a_base_hessian_needs_a_base(tmp_path: Path) -> None:
    experts = save_experts(tmp_path)
    with pytest.raises(InputError, match=r"^base_hessian: must come with a base; got '.*svhn' and"):
        merge_in_memory(None, experts, FisherAverage(), base_hessian=experts["svhn"])
    with pytest.raises(InputError, match=r"^base_hessian: must come with a base; got None as base"):
        merge_state_dicts(None, [weights(1)], Average(), base_hessian=hessian(weights(0), 0))


def test_a_folder_for_the_base_hessian_must_hold_one(tmp_path: Path) -> None:
    base = save_expert(tmp_path, "base", 0, with_hessian=False)
    experts = save_experts(tmp_path)
    with pytest.raises(
        InputError, match=r"base: must hold hessian\.safetensors for a base_hessian"
    ):
        merge_in_memory(base, experts, base_hessian=base)


@pytest.mark.parametrize(
    ("hessians", "message"),
    [
        ({"a": {}}, r"^hessians: must be given as the experts are, one per expert \(a, b\); got a"),
        ([{}, {}], r"^hessians: must be given as the experts are"),
        ([], r"^hessians: must be state dicts"),
        ({"a": {}, "b": None}, r"^hessians\['b'\]: must be a dict of tensors by name; got a NoneT"),
        (
            {"a": {"linear.wait": torch.zeros(2)}, "b": {}},
            r"^hessians\['a'\]: must have the names of experts\['a'\]; got 'linear\.wait'",
        ),
        (
            {"a": {"linear.bias": torch.zeros(2)}, "b": {}},
            r"^hessians\['a'\]: tensor 'linear\.bias' must .* \[6\] of experts\['a'\]; got .*\[2\]",
        ),
        (
            {"a": {"linear.bias": torch.zeros(6, dtype=torch.int64)}, "b": {}},
            r"^hessians\['a'\]: tensor 'linear\.bias' must be of a floating .*got torch\.int64",
        ),
    ],
)
def test_hessians_in_memory_must_fit_the_experts(hessians: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        merge_state_dicts(
            weights(0), {"a": weights(1), "b": weights(2)}, GradientMatching(), hessians=hessians
        )


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([], r"^experts: must be state dicts"),
        ([3], r"^experts\['0'\]: must be a dict of tensors by name; got a int"),
        ({"a": {"linear.weight": "text"}}, r"^experts\['a'\]: .*'linear\.weight' .*got str"),
    ],
)
def test_experts_in_memory_must_be_state_dicts(experts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        merge_state_dicts(weights(0), experts, Average())
