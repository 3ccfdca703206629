from __future__ import annotations

import pytest

from lit_merge.callbacks.temporal_rules import Rules, running_average
from lit_merge.methods import GradientMatching, TaskArithmetic, WeightedAverage


def test_the_weights_of_the_running_average_are_those_of_the_recursion() -> None:
    by_recursion = {"base": 1.0}
    for task in "abcd":
        by_recursion = {name: 0.3 * weight for name, weight in by_recursion.items()} | {task: 0.7}
    scale = running_average(list("abcd"), 0.3).scale
    assert isinstance(scale, dict)
    assert scale == pytest.approx({t: by_recursion[t] for t in "abcd"}, rel=1e-14)
    assert 1 - sum(scale.values()) == pytest.approx(by_recursion["base"], rel=1e-12)


def test_each_rule_is_one_merge_of_all_experts() -> None:
    last = Rules(deploy="last").deployment(["a", "b"])
    assert last == WeightedAverage({"a": 0.0, "b": 1.0})
    assert Rules(deploy="ema").deployment(["a"]) == TaskArithmetic({"a": 0.5})
    assert Rules(deploy="merge").deployment(["a"]) == GradientMatching()


def test_only_what_decides_the_files_is_written_down() -> None:
    assert set(Rules(init="fresh", deploy="last").settings()) == {"init", "deploy", "policy"}
    assert set(Rules().settings()) == {"init", "deploy", "decay", "policy"}
    assert set(Rules(init="ema", deploy="merge").settings()) == {
        "init",
        "deploy",
        "decay",
        "method",
        "policy",
    }
