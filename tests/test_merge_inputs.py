from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, write_expert
from lit_merge.methods import (
    TIES,
    Average,
    FisherAverage,
    GradientMatching,
    TaskArithmetic,
)
from lit_merge.streaming import merge, merge_state_dicts
from tests.merge_files import (
    TASKS,
    hessian,
    save_base,
    save_expert,
    save_experts,
    tensors,
    tied_models,
    weights,
)


def test_a_missing_hessian_is_an_error_naming_the_expert(tmp_path: Path) -> None:
    experts = {
        "svhn": save_expert(tmp_path, "svhn", 1),
        "dtd": save_expert(tmp_path, "dtd", 2, with_hessian=False),
    }
    message = r"dtd/model\.safetensors: must have a Hessian for FisherAverage \(task 'dtd'\)"
    with pytest.raises(InputError, match=message):
        merge(save_base(tmp_path), experts, FisherAverage(), tmp_path / "merged")
    with pytest.raises(InputError, match=r"experts\['a'\]: must have a Hessian .*lit-merge curv"):
        merge_state_dicts(weights(0), {"a": weights(1)}, GradientMatching())


def test_tied_weights_are_in_the_file_under_both_names(tmp_path: Path) -> None:
    states, curvature = tied_models()
    for task, state, entries in zip(("base", *TASKS), states, curvature, strict=True):
        write_expert(
            tmp_path / task,
            weights=state,
            hessian=entries,
            info=ExpertInfo(
                tied_parameters=(("emb.weight", "lm.decoder.weight"),),
                head_parameters=("head.weight", "head.bias"),
            ),
        )
    experts = [tmp_path / task for task in TASKS]
    result = merge(tmp_path / "base", experts, output=tmp_path / "merged")
    merged = tensors(result.path / "model.safetensors")
    assert torch.equal(merged["emb.weight"], merged["lm.decoder.weight"])
    assert not torch.equal(merged["emb.weight"], states[0]["emb.weight"])
    plan = next(plan for plan in result.record if plan.name == "lm.decoder.weight")
    assert (plan.action, plan.alias_of) == ("merge", "emb.weight")


def test_weights_that_are_tied_in_name_only_are_refused(tmp_path: Path) -> None:
    extra = {"lm.decoder.weight": torch.ones(11, 4)}
    info = {"tied_parameters": (("emb.weight", "lm.decoder.weight"),)}
    experts = save_experts(tmp_path, changes=extra, **info)
    base = save_expert(tmp_path, "base", 0, changes=extra)
    with pytest.raises(
        InputError, match=r"tied tensors 'emb\.weight' and 'lm\.decoder\.weight' must"
    ):
        merge(base, experts, TaskArithmetic(), tmp_path / "merged")


def with_nan(name: str, *index: int, value: float = float("nan")) -> dict[str, Tensor]:
    tensor = weights(1)[name]
    tensor[index] = value
    return {name: tensor}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_in_weights_are_named_by_file_tensor_and_index(
    tmp_path: Path, value: float
) -> None:
    experts = {"svhn": save_expert(tmp_path, "svhn", 1), "dtd": tmp_path / "dtd"}
    experts["dtd"].mkdir()
    bad = weights(2) | with_nan("linear.weight", 5, 2, value=value)
    save_file(bad, tmp_path / "dtd" / "model.safetensors")
    message = (
        rf"dtd/model\.safetensors: tensor 'linear\.weight' must be finite; got {value} at \[5, 2\]"
    )
    with pytest.raises(InputError, match=message):
        merge(save_base(tmp_path), experts, TIES(), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "dtd", "svhn"]


def test_nan_in_state_dicts_is_named_by_model_and_tensor() -> None:
    bad = weights(2) | with_nan("linear.bias", 3)
    with pytest.raises(InputError, match=r"^experts\['b'\]: tensor 'linear\.bias' .* nan at \[3\]"):
        merge_state_dicts(weights(0), {"a": weights(1), "b": bad}, Average())
    with pytest.raises(InputError, match=r"^base: tensor 'linear\.bias' .* nan at \[3\]"):
        merge_state_dicts(bad, [weights(1)], TaskArithmetic())
    running = with_nan("norm.running_mean", 0, value=float("inf"))
    with pytest.raises(InputError, match=r"^experts\[0\]: tensor 'norm\.running_mean' .* inf at"):
        merge_state_dicts(weights(0), [weights(1) | running], Average())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"must be finite; got nan at \[1, 2\]"),
        (float("inf"), r"must be finite; got inf at \[1, 2\]"),
        (-0.5, r"must not be negative; got -0\.5 at \[1, 2\]"),
    ],
)
def test_wrong_hessian_entries_are_named(value: float, message: str) -> None:
    entries = hessian(weights(1), 1)
    entries["linear.weight"][1, 2] = value
    with pytest.raises(InputError, match=rf"^hessians\[0\]: tensor 'linear\.weight' {message}"):
        merge_state_dicts(weights(0), [weights(1)], FisherAverage(), hessians=[entries])
    with pytest.raises(InputError, match=rf"^base_hessian: tensor 'linear\.weight' {message}"):
        merge_state_dicts(
            weights(0),
            [weights(1)],
            GradientMatching(),
            hessians=[hessian(weights(1), 1)],
            base_hessian=entries,
        )
