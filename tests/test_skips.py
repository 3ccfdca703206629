"""What skips lack: the difference of what was caught, for as long as it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_merge.least_squares.layer_plan import Event
from lit_merge.least_squares.skips import Skips


class InPlace(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.act = nn.Identity()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.act(self.factor * x)
        h += 100  # what was caught must not follow
        return h


def test_a_skip_lacks_the_experts_less_the_merged_models_for_every_batch_and_is_then_let_go() -> (
    None
):
    merged, expert = InPlace(1.0), InPlace(3.0)
    running = [0]
    event = Event("act", before=False)
    skips = Skips({event: 2}, 2, lambda: running[0])
    batches = [torch.ones(2), torch.full((2,), 5.0)]
    with skips.catching([merged, expert]):
        for number in range(4):
            running[0] = number
            (merged if number < 2 else expert)(batches[number % 2])
        for _ in range(2):
            one, two = skips.lacks(event)
            assert one is not None
            assert two is not None
            assert one.tolist() == [2.0, 2.0]
            assert two.tolist() == [10.0, 10.0]
        assert not skips._caught
    assert not any(module._forward_hooks for module in (*merged.modules(), *expert.modules()))


def test_what_is_given_is_caught_before_it_is_changed() -> None:
    merged, expert = InPlace(1.0), InPlace(3.0)
    merged.act.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    running = [0]
    event = Event("act", before=True)
    skips = Skips({event: 1}, 1, lambda: running[0])
    with skips.catching([merged, expert]):
        merged(torch.ones(1))
        running[0] = 1
        expert(torch.ones(1))
        (lack,) = skips.lacks(event)
    assert lack is not None
    assert lack.tolist() == [2.0]


def test_without_a_skip_nothing_is_lacking() -> None:
    skips = Skips({}, 3, lambda: 0)
    assert skips.lacks(None) == [None] * 3
    assert skips.lacks(Event("act", before=True)) == [None] * 3
