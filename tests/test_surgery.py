"""Representation surgery: the formula, its start and its errors."""

from __future__ import annotations

import pytest
import torch

from lit_merge.correction.surgery import RepresentationSurgery
from lit_merge.errors import InputError


def test_each_example_loses_what_its_own_tasks_bottleneck_finds() -> None:
    torch.manual_seed(0)
    surgery = RepresentationSurgery(2, 5, 3).double()
    with torch.no_grad():
        surgery.up.normal_()
    x, task = torch.randn(4, 7, 5, dtype=torch.float64), torch.tensor([1, 0, 0, 1])
    found = surgery(x, task)
    for row, own in enumerate(task.tolist()):
        for token in range(7):
            z = x[row, token]
            hidden = (surgery.down[own] @ z).clamp(min=0)
            torch.testing.assert_close(found[row, token], z - surgery.up[own] @ hidden)


def test_it_is_the_identity_at_the_start_in_any_type() -> None:
    surgery = RepresentationSurgery(2, 6, 2)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 6).to(dtype)
        found = surgery(x, torch.tensor([0, 1, 1]))
        assert found.dtype == dtype
        assert torch.equal(found, x)


def test_every_process_starts_from_the_same_numbers() -> None:
    torch.manual_seed(1)
    one = RepresentationSurgery(2, 6, 2)
    torch.manual_seed(2)
    assert torch.equal(one.down, RepresentationSurgery(2, 6, 2).down)


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_beyond_the_width_is_refused(rank: int) -> None:
    with pytest.raises(InputError, match=rf"surgery_rank: must be in \[1, 6\].*got {rank}"):
        RepresentationSurgery(2, 6, rank)
