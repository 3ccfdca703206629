from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_merge.alignment.generic_model import generic_model
from lit_merge.alignment.symmetries import find_symmetries, follow, search_symmetries
from lit_merge.alignment.symmetry import Symmetry
from lit_merge.errors import InputError


class Net(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, part in parts.items():
            setattr(self, name, part)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def places(symmetry: Symmetry) -> set[tuple[str, int]]:
    return {(axis.name, axis.axis) for axis in symmetry.axes}


def names(*modules: str) -> set[tuple[str, int]]:
    return {(f"{m}.{kind}", 0) for m in modules for kind in ("weight", "bias")}


def test_an_mlp_has_its_hidden_units() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    first, second = find_symmetries(model, torch.zeros(2, 3))
    assert places(first) == {*names("0"), ("2.weight", 1)}
    assert places(second) == {*names("2"), ("4.weight", 1)}
    assert first.name == "0.weight[0]"
    assert [(s.name, s.channel_dim) for s in first.sites] == [("0", -1), ("1", -1)]
    assert first.axes[0].positions.tolist() == [[0], [1], [2], [3], [4], [5]]


def residual_net(x: Any, image: Tensor) -> Tensor:
    y = F.relu(x.bn(x.stem(image)))
    y = y + x.second(F.relu(x.first(y)))
    return x.head(F.max_pool2d(y, 2).flatten(1))  # type: ignore[no-any-return]


def test_a_conv_nets_stream_goes_through_norms_residuals_and_the_flatten() -> None:
    model = Net(
        residual_net,
        stem=nn.Conv2d(1, 4, 3, padding=1),
        bn=nn.BatchNorm2d(4),
        first=nn.Conv2d(4, 5, 3, padding=1),
        second=nn.Conv2d(5, 4, 3, padding=1),
        head=nn.Linear(4 * 9, 2),
    )
    stream, hidden = find_symmetries(model, torch.zeros(2, 1, 6, 6))
    running = {("bn.running_mean", 0), ("bn.running_var", 0)}
    ends = {("first.weight", 1), ("head.weight", 1)}
    assert places(stream) == names("stem", "bn", "second") | running | ends
    assert places(hidden) == {*names("first"), ("second.weight", 1)}
    head = next(axis for axis in stream.axes if axis.name == "head.weight")
    assert head.positions.tolist() == torch.arange(36).view(4, 9).tolist()


def test_depthwise_convolutions_follow_their_channels() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    (found,) = find_symmetries(model, torch.zeros(2, 2, 5, 5))
    assert places(found) == {*names("0", "1"), ("3.weight", 1)}


def test_grouped_convolutions_permute_groups_and_channels_alike_in_all_groups() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.Conv2d(6, 12, 3, groups=3), nn.ReLU(), nn.Conv2d(12, 2, 1)
    )
    found = {(s.size, s.inside): s for s in find_symmetries(model, torch.zeros(2, 2, 5, 5))}
    groups, inputs = found[3, None], found[2, None]
    assert places(groups) == {*names("0", "1"), ("3.weight", 1)}
    assert groups.axes[0].positions.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert places(inputs) == {*names("0"), ("1.weight", 1)}
    assert inputs.axes[0].positions.tolist() == [[0, 2, 4], [1, 3, 5]]
    outputs = [s for s in found.values() if s.size == 4]
    assert all(s.inside == groups.name for s in outputs)
    every = search_symmetries(model, torch.zeros(2, 2, 5, 5)).proved
    assert sorted(s.size for s in every) == [2, 3, 4, 4, 4]


def test_the_channels_of_a_group_norm_stay_in_their_group() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.GroupNorm(2, 6), nn.GELU(), nn.Linear(6, 2))
    found = find_symmetries(model, torch.zeros(4, 3))
    assert sorted((s.size, s.inside is not None) for s in found) == [
        (2, False),
        (3, True),
        (3, True),
    ]


def test_gated_units_move_in_both_halves() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.GLU(), nn.Linear(4, 2))
    (found,) = find_symmetries(model, torch.zeros(2, 3))
    assert found.axes[0].positions.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_concatenated_channels_are_permuted_each_among_themselves() -> None:
    model = Net(
        lambda m, x: m.last(torch.cat([m.left(x), m.right(x)], 1).tanh()),
        left=nn.Linear(3, 4),
        right=nn.Linear(3, 5),
        last=nn.Linear(9, 2),
    )
    left, right = find_symmetries(model, torch.zeros(2, 3))
    assert places(left) == {*names("left"), ("last.weight", 1)}
    assert right.axes[-1].positions.flatten().tolist() == [4, 5, 6, 7, 8]


def test_tied_weights_are_permuted_under_all_their_names() -> None:
    model = Net(
        lambda m, x: m.out(m.mix(m.tokens(x)).tanh()),
        tokens=nn.Embedding(7, 4),
        mix=nn.Linear(4, 4),
        out=nn.Linear(4, 7, bias=False),
    )
    model.out.weight = model.get_parameter("tokens.weight")
    (found,) = find_symmetries(model, torch.randint(7, (2, 5)))
    assert places(found) == {
        ("tokens.weight", 1),
        ("out.weight", 1),
        ("mix.weight", 1),
        *names("mix"),
    }


def heads(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v)
    return m.out(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_fused_attention_has_heads_and_in_each_its_queries_with_keys_and_its_values() -> None:
    model = Net(heads, qkv=nn.Linear(3, 24), out=nn.Linear(8, 2))
    found = find_symmetries(model, torch.zeros(2, 5, 3))
    assert len(found) == 5
    outer = found[0]
    assert (outer.size, outer.inside) == (2, None)
    rows = torch.arange(24).view(3, 2, 4)
    assert (
        outer.axes[0].positions.sort().values.tolist() == rows.transpose(0, 1).flatten(1).tolist()
    )
    inner = {
        frozenset(map(frozenset, s.axes[0].positions.tolist()))
        for s in found[1:]
        if s.inside == outer.name
    }
    assert inner == {
        *(frozenset(frozenset(rows[:2, h, d].tolist()) for d in range(4)) for h in range(2)),
        *(frozenset(frozenset([int(rows[2, h, d])]) for d in range(4)) for h in range(2)),
    }


def test_units_that_the_proof_cannot_tell_by_outer_unit_are_permuted_alike() -> None:
    model = Net(
        lambda m, x: m.last(m.first(x)).view(-1, 2, 4).sum(1).exp().sum(-1, keepdim=True),
        first=nn.Linear(3, 5),
        last=nn.Linear(5, 8),
    )
    found = find_symmetries(model, torch.zeros(2, 3))
    alike = next(s for s in found if s.size == 4)
    assert alike.inside is None
    assert alike.axes[0].positions.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_inputs_outputs_and_what_never_runs_are_no_symmetries() -> None:
    model = Net(lambda m, x: m.used(x), used=nn.Linear(3, 6), unused=nn.Linear(6, 6))
    assert find_symmetries(model, torch.zeros(2, 3)) == ()


def test_zeros_added_to_two_layers_do_not_tie_their_units() -> None:
    def use(m: Any, x: Tensor) -> Tensor:
        zeros = torch.zeros(4)
        return m.last((m.second((m.first(x) + zeros).tanh()) + zeros).tanh())  # type: ignore[no-any-return]

    model = Net(use, first=nn.Linear(3, 4), second=nn.Linear(4, 4), last=nn.Linear(4, 2))
    assert [s.size for s in find_symmetries(model, torch.zeros(2, 3))] == [4, 4]


def test_zeros_that_are_written_into_are_no_longer_alike() -> None:
    def use(m: Any, x: Tensor) -> Tensor:
        offset = torch.zeros(4, dtype=torch.float64)
        offset[1] = 3.0
        return m.last((m.first(x) + offset).tanh())  # type: ignore[no-any-return]

    model = Net(use, first=nn.Linear(3, 4), last=nn.Linear(4, 2))
    assert search_symmetries(model, torch.zeros(2, 3)).proved == ()
    assert search_symmetries(model, torch.zeros(2, 3)).rejected == {}


def test_units_that_a_constant_tells_apart_are_no_symmetry() -> None:
    model = Net(
        lambda m, x: m.out(m.up(x) * torch.arange(6)), up=nn.Linear(3, 6), out=nn.Linear(6, 2)
    )
    assert find_symmetries(model, torch.zeros(2, 3)) == ()


def test_an_unknown_operation_fixes_what_enters_it() -> None:
    model = Net(
        lambda m, x: m.out(torch.linalg.inv(m.up(x).view(-1, 3, 3)).flatten(1)),
        up=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 9)),
        out=nn.Linear(9, 2),
    )
    (found,) = find_symmetries(model, torch.zeros(2, 3))
    assert found.size == 4
    unknown = follow(generic_model(model, torch.zeros(2, 3))).unknown
    assert any("inv" in name for name in unknown)


def test_protected_parameters_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    (found,) = find_symmetries(model, torch.zeros(2, 3), protect=["0"])
    assert found.name == "2.weight[0]"
    with pytest.raises(InputError, match="protect: must match parameters or modules"):
        find_symmetries(model, torch.zeros(2, 3), protect=["stem*"])
