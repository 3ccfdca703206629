"""Copies of bare parameters come and go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_merge.curvature.copies import LEADING, copied_per_example, layouts


class Bare(nn.Module):
    def __init__(self, token: nn.Parameter) -> None:
        super().__init__()
        self.token = token


def test_copies_are_leaves_with_the_examples_first() -> None:
    token = nn.Parameter(torch.randn(1, 3, 4))
    scale = nn.Parameter(torch.randn(4))
    one, two = Bare(token), Bare(scale)
    owners = {"token": ((one, "token"),), "scale": ((two, "token"),)}
    chosen = {"token": LEADING, "scale": 2}
    with copied_per_example({"token": token, "scale": scale}, owners, chosen, 5) as copies:
        assert one.token is copies["token"]
        assert two.token is copies["scale"]
        assert copies["token"].shape == (5, 3, 4)
        assert copies["scale"].shape == (5, 1, 1, 4)
        assert all(copy.is_leaf and copy.requires_grad for copy in copies.values())
        assert torch.equal(copies["token"][3], token[0])
        assert list(one.parameters()) == [token]
    assert one.token is token
    assert "token" not in vars(one)


def test_all_modules_that_share_a_parameter_get_the_same_copies() -> None:
    token = nn.Parameter(torch.randn(1, 4))
    one, two = Bare(token), Bare(token)
    owners = {"token": ((one, "token"), (two, "token"))}
    with copied_per_example({"token": token}, owners, {"token": LEADING}, 2):
        assert one.token is two.token is not token


def test_an_error_inside_puts_the_parameters_back() -> None:
    token = nn.Parameter(torch.randn(1, 4))
    module = Bare(token)
    owners = {"token": ((module, "token"),)}
    with (
        pytest.raises(KeyError),
        copied_per_example({"token": token}, owners, {"token": LEADING}, 2),
    ):
        raise KeyError
    assert module.token is token


def test_a_large_weight_is_not_copied_for_every_example() -> None:
    assert layouts(torch.empty(1024, 1024)) == ()
    assert layouts(torch.empty(1, 1024, 1024)) == (LEADING,)
    assert layouts(torch.empty(())) == (1, 0, 2)
