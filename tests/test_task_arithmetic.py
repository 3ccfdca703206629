from __future__ import annotations

import dataclasses

import torch

from lit_merge.methods import Average, ParameterSlice, TaskArithmetic

SLICE = ParameterSlice(
    "w",
    ("a", "b"),
    experts=(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 0.5])),
    base=torch.tensor([1.0, 1.0, 1.0]),
)


def test_task_vectors_are_added_to_the_base() -> None:
    torch.testing.assert_close(TaskArithmetic()(SLICE), torch.tensor([2.0, 4.0, -0.5]))
    torch.testing.assert_close(TaskArithmetic(0.5)(SLICE), torch.tensor([1.5, 2.5, 0.25]))


def test_every_task_can_have_its_own_scale() -> None:
    method = TaskArithmetic({"b": -1.0, "a": 2.0})
    torch.testing.assert_close(method(SLICE), torch.tensor([3.0, -2.0, -0.5]))


def test_one_over_the_number_of_experts_is_their_average() -> None:
    torch.testing.assert_close(TaskArithmetic(0.5)(SLICE), Average()(SLICE))


def test_scale_zero_returns_the_base() -> None:
    assert torch.equal(TaskArithmetic(0.0)(SLICE), SLICE.require_base())


def test_small_changes_of_large_weights_are_summed_before_they_are_rounded() -> None:
    base = torch.full((1000,), 1024.0)
    steps = torch.rand(8, 1000, generator=torch.Generator().manual_seed(0)) * 1e-2
    experts = tuple(base + step for step in steps)
    names = tuple("abcdefgh")
    exact = base.double() + sum(expert.double() - base.double() for expert in experts)
    merged = TaskArithmetic()(ParameterSlice("w", names, experts, base))
    assert torch.equal(merged, exact.float())


def test_sixteen_bits_are_merged_as_well_by_the_short_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(20_000, generator=generator).bfloat16()
    experts = tuple(
        (base.float() + 0.01 * torch.randn(20_000, generator=generator)).bfloat16()
        for _ in range(4)
    )
    untouched = torch.arange(20_000) < 1000
    experts = tuple(torch.where(untouched, base, expert) for expert in experts)
    p = ParameterSlice(
        "w", tuple("abcd"), tuple(e.float() for e in experts), base.float(), coarse=True
    )
    for scale in (0.3, {"a": 1.0, "b": -0.5, "c": 0.25, "d": 2.0}):
        method = TaskArithmetic(scale)
        exact = method(
            dataclasses.replace(
                p,
                experts=tuple(e.double() for e in experts),
                base=base.double(),
                coarse=False,
            )
        )
        made = method(p).bfloat16()
        assert torch.equal(made[untouched], base[untouched])
        # Half a unit in the last place, and what float32 loses before that.
        unit = 2.0 ** (torch.log2(exact.abs()).floor() - 7)
        assert bool(((made.double() - exact).abs() <= unit * (0.5 + 1e-3)).all())
