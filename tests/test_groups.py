from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_merge import InputError
from lit_merge.alignment.groups import (
    ExpertGroup,
    check_groups,
    head_names,
    midpoint,
    open_groups,
)
from tests.small_expert import written


def group(*tasks: str) -> ExpertGroup:
    return ExpertGroup("base", dict.fromkeys(tasks, "path"))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": group("svhn")}, r"groups: must be at least two, of different bases; got \['a'\]"),
        ({"a": group("svhn"), "b": group()}, "groups: 'b' must have at least one expert; got none"),
        (
            {"a": group("svhn"), "b": group("dtd", "svhn")},
            "groups: every task must have one expert; got 'svhn' in 'a' and in 'b'",
        ),
        ({"a": group("svhn"), "b": group("base")}, "able to name a folder beside 'base'; got 'ba"),
        ({"a": group("svhn"), "b": group("../x")}, r"able to name a folder .* got '\.\./x'"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups: dict[str, ExpertGroup], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_groups(groups)


def test_two_groups_with_experts_are_fine() -> None:
    check_groups({"a": group("svhn"), "b": group("dtd", "cars")})


def test_the_midpoint_is_the_mean_in_the_first_ones_types() -> None:
    one = {
        "w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        "count": torch.tensor(3),
        "head": torch.ones(2),
    }
    other = {"w": torch.tensor([2.0, 4.0]), "count": torch.tensor(9), "head": torch.zeros(3)}
    found = midpoint([one, other])
    assert found["w"].dtype == torch.bfloat16
    assert found["w"].tolist() == [1.5, 3.0]
    assert int(found["count"]) == 3
    assert found["head"].tolist() == [1, 1]


def test_heads_are_named_as_in_the_model(tmp_path: Path) -> None:
    path = str(written(tmp_path / "expert"))
    names = ("net.body.0.weight", "net.body.0.bias", "net.head.weight", "net.head.bias")
    with open_groups({"a": ExpertGroup(path, {"svhn": path})}) as groups:
        assert head_names(groups, names) == ("net.head.weight", "net.head.bias")


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "none")
    with (
        pytest.raises(InputError, match="none: must exist"),
        open_groups({"a": ExpertGroup(path, {"svhn": path})}),
    ):
        pass
