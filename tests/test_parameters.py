from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_merge.checkpoint import Checkpoint, open_state_dict
from lit_merge.errors import InputError
from lit_merge.parameters import ParametersPolicy, TensorPlan, plan_tensors

# A model with one of everything: embeddings, blocks, BatchNorm, counters, a head.
BASE = {
    "embed.weight": torch.zeros(10, 4),
    "blocks.0.w": torch.zeros(4, 4),
    "norm.weight": torch.zeros(4),
    "norm.bias": torch.zeros(4),
    "norm.running_mean": torch.zeros(4),
    "norm.running_var": torch.ones(4),
    "norm.num_batches_tracked": torch.tensor(7),
    "mask": torch.ones(4, 4, dtype=torch.bool),
    "head.weight": torch.zeros(5, 4),
    "head.bias": torch.zeros(5),
}


def opened(change: Mapping[str, Tensor | None] | None = None, path: str = "base") -> Checkpoint:
    state = {**BASE, **(change or {})}
    return open_state_dict({n: v for n, v in state.items() if v is not None}, path=path)


def plan(
    *changes: Mapping[str, Tensor | None],
    base: Mapping[str, Tensor | None] | None = None,
    without_base: bool = False,
    **options: Any,
) -> dict[str, TensorPlan]:
    """Plan a merge of experts that are the base with these changes (two unchanged by default)."""
    experts = {
        f"task{i}": opened(change, f"runs/{i}") for i, change in enumerate(changes or ({}, {}))
    }
    reference = None if without_base else opened(base)
    plans = plan_tensors(reference, experts, **options)
    return {p.name: p for p in plans}


def actions(plans: dict[str, TensorPlan]) -> dict[str, str]:
    return {name: p.action for name, p in plans.items()}


def test_each_kind_of_tensor_has_its_action() -> None:
    plans = plan()
    assert list(plans) == list(BASE)
    assert actions(plans) == {
        "embed.weight": "merge",
        "blocks.0.w": "merge",
        "norm.weight": "merge",
        "norm.bias": "merge",
        "norm.running_mean": "average",
        "norm.running_var": "average",
        "norm.num_batches_tracked": "keep",
        "mask": "keep",
        "head.weight": "merge",
        "head.bias": "merge",
    }
    assert plans["mask"].reason == "bool values are not weights"
    assert plans["norm.running_var"].reason == "running statistic of BatchNorm"
    assert plans["blocks.0.w"].info.shape == (4, 4)


def test_without_a_base_the_first_expert_is_the_reference() -> None:
    assert actions(plan(without_base=True)) == actions(plan())
    with pytest.raises(
        InputError, match=r"runs/1: must hold only tensors of the first expert \(run"
    ):
        plan({}, {"extra.w": torch.zeros(2)}, without_base=True)


def test_no_experts_are_refused() -> None:
    with pytest.raises(InputError, match="experts: must be at least one; got none"):
        plan_tensors(opened(), {})


def test_declared_heads_stay_with_their_tasks_whatever_their_shapes() -> None:
    heads = ("head.weight", "head.bias")
    other = {"head.weight": torch.zeros(9, 4), "head.bias": torch.zeros(9)}
    for changes in (({}, {}), ({}, other), ({"head.weight": None, "head.bias": None}, other)):
        plans = plan(*changes, heads=heads)
        assert {plans[n].action for n in heads} == {"per-task"}
        assert plans["head.weight"].reason == "head of a task"
    assert plan(heads=heads, policy=ParametersPolicy(heads="merge"))["head.bias"].action == "merge"
    with pytest.raises(
        InputError, match=r"runs/1: tensor 'head.weight' must have the shape \[5, 4\]"
    ):
        plan({}, other, heads=heads, policy=ParametersPolicy(heads="merge"))


def test_heads_that_only_experts_have_are_per_task() -> None:
    none: Mapping[str, Tensor | None] = {"head.weight": None, "head.bias": None}
    own = {"classifier.weight": torch.zeros(3, 4), "classifier.bias": torch.zeros(3)}
    declared = {"top.out.weight": torch.zeros(3, 4)}
    plans = plan({**none, **own}, {**none, **declared}, base=none, heads=("top.out.weight",))
    assert list(plans)[-3:] == ["classifier.weight", "classifier.bias", "top.out.weight"]
    assert plans["classifier.bias"].action == "per-task"
    assert plans["classifier.bias"].reason == "head of a task, by its name, that the base lacks"
    assert plans["top.out.weight"].action == "per-task"
    assert plans["top.out.weight"].info.shape == (3, 4)


def test_a_head_is_known_by_its_name_and_its_number_of_classes() -> None:
    other = {"head.weight": torch.zeros(9, 4), "head.bias": torch.zeros(9)}
    plans = plan({}, other)
    assert plans["head.weight"].action == "per-task"
    assert plans["head.bias"].action == "per-task"
    with pytest.raises(
        InputError, match=r"'head.weight' must have the shape \[5, 4\] of base; got"
    ):
        plan({}, {**other, "head.weight": torch.zeros(5, 6)})


def test_a_head_that_only_the_base_has_stays_in_the_base() -> None:
    none: Mapping[str, Tensor | None] = {"head.weight": None, "head.bias": None}
    plans = plan(none, none)
    assert plans["head.weight"].action == "keep"
    assert plans["head.weight"].reason == "head that only the base has"


def test_a_layer_inside_a_numbered_block_is_no_head() -> None:
    with pytest.raises(InputError, match="must hold only tensors of the base"):
        plan({"blocks.1.mlp.fc.weight": torch.zeros(4, 4)}, {})


@pytest.mark.parametrize("policy", [ParametersPolicy(), ParametersPolicy(vocabulary="keep")])
def test_a_vocabulary_mismatch_is_refused_unless_told(policy: ParametersPolicy) -> None:
    larger = {"embed.weight": torch.zeros(12, 4)}
    if policy.vocabulary == "keep":
        assert plan({}, larger, policy=policy)["embed.weight"].action == "keep"
        assert plan({}, larger, policy=policy)["embed.weight"].info.shape == (10, 4)
        return
    message = (
        r"runs/1: tensor 'embed.weight' must have the shape \[10, 4\] of base; got \[12, 4\]. "
        'Bring the vocabularies together, or set vocabulary: "keep"'
    )
    with pytest.raises(InputError, match=message):
        plan({}, larger, policy=policy)


def test_a_wider_embedding_is_no_vocabulary() -> None:
    with pytest.raises(InputError, match="Take experts of one model"):
        plan({}, {"embed.weight": torch.zeros(10, 6)}, policy=ParametersPolicy(vocabulary="keep"))
    positions = {"position_embeddings.weight": torch.zeros(8, 4)}
    more = {"position_embeddings.weight": torch.zeros(9, 4)}
    with pytest.raises(InputError, match="Take experts of one model"):
        plan(positions, more, base=positions, policy=ParametersPolicy(vocabulary="keep"))


def test_other_shapes_are_refused_with_both_shapes_and_the_file() -> None:
    message = (
        r"runs/1: tensor 'blocks.0.w' must have the shape \[4, 4\] of base; got \[4, 5\]. "
        r"Take experts of one model, or give a rule: {blocks.0.w: keep}"
    )
    with pytest.raises(InputError, match=message):
        plan({}, {"blocks.0.w": torch.zeros(4, 5)})


def test_missing_and_extra_tensors_are_refused_by_file() -> None:
    message = (
        r"runs/1: must hold every tensor of the base \(base\); got none named 'blocks.0.w' "
        "and lacks 1 more"
    )
    with pytest.raises(InputError, match=message):
        plan({}, {"blocks.0.w": None, "norm.bias": None})
    message = r"runs/0: must hold only tensors of the base \(base\); got 'x.w' beside them"
    with pytest.raises(InputError, match=message):
        plan({"x.w": torch.zeros(2)}, {})


def test_integers_may_be_missing_on_either_side() -> None:
    assert plan({"mask": None}, {})["mask"].action == "keep"
    found = plan({"position_ids": torch.arange(3)}, {})["position_ids"]
    assert (found.action, found.reason) == ("per-task", "int64 values, which the base lacks")
    assert plan({"mask": torch.ones(9, dtype=torch.bool)}, {})["mask"].info.shape == (4, 4)


def test_running_statistics_follow_the_policy_and_need_their_siblings() -> None:
    assert plan(policy=ParametersPolicy(buffers="keep"))["norm.running_mean"].action == "keep"
    alone = {"gate.running_mean": torch.zeros(3)}
    assert plan(alone, alone, base=alone)["gate.running_mean"].action == "merge"


def test_frozen_parameters_are_kept() -> None:
    found = plan(frozen=("blocks.0.w",))["blocks.0.w"]
    assert (found.action, found.reason) == ("keep", "frozen in every expert")


def test_the_users_rules_go_before_everything_and_the_first_decides() -> None:
    rules: dict[str, Any] = {
        "norm.running_var": "merge",
        "norm.running_*": "keep",
        "norm.*": "average",
        "head.*": "keep",
        "mask": "per-task",
        "norm.num_batches_tracked": "keep",
    }
    rules = {"norm.num_batches_tracked": rules.pop("norm.num_batches_tracked"), **rules}
    plans = plan(heads=("head.weight",), policy=ParametersPolicy(rules=rules))
    assert actions(plans) == {
        "embed.weight": "merge",
        "blocks.0.w": "merge",
        "norm.weight": "average",
        "norm.bias": "average",
        "norm.running_mean": "keep",
        "norm.running_var": "merge",
        "norm.num_batches_tracked": "keep",
        "mask": "per-task",
        "head.weight": "keep",
        "head.bias": "keep",
    }
    assert plans["norm.bias"].reason == "rule norm.*"


def test_a_rule_may_keep_what_does_not_fit() -> None:
    policy = ParametersPolicy(rules={"blocks.*": "keep", "embed.*": "per-task"})
    plans = plan({"blocks.0.w": None}, {"embed.weight": torch.zeros(12, 4)}, policy=policy)
    assert plans["blocks.0.w"].action == "keep"
    assert plans["embed.weight"].action == "per-task"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"blocks.0.q": "keep"}, "rules.'blocks.0.q'.: must fit a tensor; got none .* blocks.0.w"),
        ({"blocks.0.w": "refuse"}, "base: tensor 'blocks.0.w' is refused by the rule 'blocks.0.w'"),
        (
            {"mask": "merge"},
            "'mask' must be of a real floating type to be merged; got torch.bool. G",
        ),
        ({"mask": "average"}, "'mask' must be of a real floating type"),
        (
            {"extra.w": "keep"},
            "runs/1: tensor 'extra.w' must be in the base to be kept; got it only",
        ),
        ({"extra.w": "merge"}, "runs/1: must hold only tensors of the base"),
        (
            {"zzz*": "keep"},
            "must fit a tensor; got none that it fits. The tensors are embed.weight",
        ),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(rules: dict[str, Any], message: str) -> None:
    extra: Mapping[str, Tensor | None] = {}
    if "extra.w" in rules:
        extra = {"extra.w": torch.zeros(2)}
    with pytest.raises(InputError, match=message):
        plan({}, extra, policy=ParametersPolicy(rules=rules))


def test_complex_tensors_are_refused() -> None:
    waves = {"w.weight": torch.zeros(3, dtype=torch.complex64)}
    with pytest.raises(InputError, match=r"must be of a real floating type to be merged; got torc"):
        plan(waves, waves, base=waves)
    kept = plan(waves, waves, base=waves, policy=ParametersPolicy(rules={"w.weight": "keep"}))
    assert kept["w.weight"].action == "keep"


def test_names_of_heads_and_frozen_parameters_must_exist() -> None:
    with pytest.raises(
        InputError, match=r"heads: must be names of tensors; got 'hed.weight'. Near ar"
    ):
        plan(heads=("hed.weight",))
    with pytest.raises(
        InputError, match=r"frozen: must be names of tensors; got 'blocks.0.q'. Near"
    ):
        plan(frozen=("blocks.0.q",))


TIED = {"lm_head.weight": torch.zeros(10, 4)}
GROUP = (("embed.weight", "lm_head.weight"),)


def test_tied_weights_follow_their_leader() -> None:
    plans = plan(TIED, TIED, base=TIED, tied=GROUP)
    assert plans["embed.weight"].alias_of is None
    follower = plans["lm_head.weight"]
    assert (follower.action, follower.alias_of) == ("merge", "embed.weight")
    assert follower.reason == "tied to embed.weight: weights of one shape"
    frozen = plan(TIED, TIED, base=TIED, tied=GROUP, frozen=("embed.weight",))
    assert frozen["lm_head.weight"].action == "keep"


def test_a_tied_tensor_may_be_stored_under_one_of_its_names() -> None:
    missing: Mapping[str, Tensor | None] = {}
    assert plan(TIED, missing, base=TIED, tied=GROUP)["lm_head.weight"].alias_of == "embed.weight"
    assert plan(TIED, TIED, tied=GROUP)["lm_head.weight"].alias_of == "embed.weight"
    without = {**TIED, "embed.weight": None}
    plans = plan(TIED, without, base=TIED, tied=GROUP)  # the leader is what all of them have
    assert plans["embed.weight"].alias_of == "lm_head.weight"


def test_tied_tensors_need_one_shape_and_one_action() -> None:
    other = {"lm_head.weight": torch.zeros(4, 10)}
    with pytest.raises(
        InputError, match=r"tied tensors must have one shape; got 'lm_head.weight' \[4"
    ):
        plan(other, other, base=other, tied=GROUP)
    with pytest.raises(
        InputError, match="rules: must treat tied tensors alike; got 'keep' for 'lm_he"
    ):
        plan(
            TIED, TIED, base=TIED, tied=GROUP, policy=ParametersPolicy(rules={"lm_head.*": "keep"})
        )
    alike = ParametersPolicy(rules={"*.weight": "keep"})
    assert plan(TIED, TIED, base=TIED, tied=GROUP, policy=alike)["lm_head.weight"].action == "keep"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": "keep"}, "heads: must be one of per-task, merge; got 'keep'"),
        ({"vocabulary": "merge"}, "vocabulary: must be one of refuse, keep; got 'merge'"),
        ({"buffers": "mean"}, "buffers: must be one of average, keep; got 'mean'"),
        (
            {"rules": {"a": "averge"}},
            "must be one of merge, .*; got 'averge'. Did you mean 'average'",
        ),
        ({"rules": {"a": 3}}, "must be one of merge, .*; got 3. Choose one of these"),
    ],
)
def test_a_policy_that_does_not_exist_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ParametersPolicy(**changes)
