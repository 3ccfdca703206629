from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_merge.errors import InputError
from lit_merge.methods import (
    FisherAverage,
    GradientMatching,
)
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming import merge_in_memory, merge_state_dicts
from tests.merge_files import (
    hessian,
    save_base,
    save_experts,
    tensors,
    weights,
)


def test_a_missing_hessian_entry_is_an_error_naming_task_and_tensor() -> None:
    partial = hessian(weights(2), 2)
    del partial["linear.weight"]
    message = (
        r"^hessians\['dtd'\]: must have an entry for tensor 'linear\.weight' \(task 'dtd'\), which "
        r"the expert of task 'svhn' has changed; got none\. .*\{linear\.weight: keep\}"
    )
    with pytest.raises(InputError, match=message):
        merge_state_dicts(
            weights(0),
            {"svhn": weights(1), "dtd": weights(2)},
            GradientMatching(),
            hessians={"svhn": hessian(weights(1), 1), "dtd": partial},
        )


def test_a_tensor_that_nobody_changed_needs_no_hessian_entry() -> None:
    states = [weights(seed) for seed in range(3)]
    curvature = [hessian(state, seed) for seed, state in enumerate(states)]
    for state, entries in zip(states, curvature, strict=True):
        state["emb.weight"] = states[0]["emb.weight"].clone()
        del entries["emb.weight"]
    for base, method in ((states[0], GradientMatching()), (None, FisherAverage())):
        merged = merge_state_dicts(base, states[1:], method, hessians=curvature[1:])
        assert torch.equal(merged["emb.weight"], states[0]["emb.weight"])
        assert not torch.equal(merged["linear.weight"], states[0]["linear.weight"])


def test_kept_tensors_without_curvature_are_noted(tmp_path: Path) -> None:
    same = {"emb.weight": weights(0)["emb.weight"]}
    experts = save_experts(tmp_path, changes=same)
    for path in experts.values():
        curvature = tensors(path / "hessian.safetensors")
        del curvature["emb.weight"]
        save_file(curvature, path / "hessian.safetensors")
    merged = merge_in_memory(save_base(tmp_path), experts)
    assert any("Hessian has no entry: emb.weight" in note for note in merged.notes)
    plans = {plan.name: (plan.action, plan.reason) for plan in merged.record}
    assert plans["emb.weight"] == ("keep", "equal in all models, without an entry in a Hessian")


def test_frozen_tensors_are_kept(tmp_path: Path) -> None:
    same = {"emb.weight": weights(0)["emb.weight"]}
    experts = save_experts(tmp_path, changes=same, frozen_parameters=("emb.weight",))
    merged = merge_in_memory(save_base(tmp_path), experts)
    assert torch.equal(merged.state["emb.weight"], same["emb.weight"])


def test_a_base_hessian_must_cover_what_is_merged() -> None:
    states, curvature = [weights(s) for s in range(3)], [hessian(weights(s), s) for s in range(3)]
    del curvature[0]["linear.bias"]
    with pytest.raises(
        InputError, match=r"^base_hessian: must have an entry for tensor 'linear\.bias'"
    ):
        merge_state_dicts(
            states[0],
            states[1:],
            GradientMatching(),
            hessians=curvature[1:],
            base_hessian=curvature[0],
        )


def test_unknown_rules_and_empty_merges_are_refused(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    with pytest.raises(InputError, match=r"rules\['liner\.\*'\]: must fit a tensor"):
        merge_in_memory(base, experts, policy=ParametersPolicy(rules={"liner.*": "keep"}))
    with pytest.raises(InputError, match=r"^policy: must leave tensors to merge; got 10 tensors"):
        merge_in_memory(base, experts, policy=ParametersPolicy(rules={"*": "keep"}))
