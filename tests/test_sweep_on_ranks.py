"""The sweep on two processes: the numbers of one, and errors that end both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_merge.correction import run_model
from lit_merge.correction.corrections import Corrections
from lit_merge.correction.routing import TaskContext
from lit_merge.correction.sites import find_sites
from lit_merge.least_squares.prefix_sweep import Teacher, solve_in_prefix
from lit_merge.least_squares.settings import LeastSquares
from tests.processes import on_ranks

pytestmark = pytest.mark.distributed


class Texts(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(9, 5)
        self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.words(ids))
        hidden = hidden + self.two(torch.tanh(self.one(hidden)))
        output: Tensor = self.out(hidden.mean(1))
        return output


def batch(seed: int, count: int) -> Tensor:
    return torch.randint(0, 9, (count, 4), generator=torch.Generator().manual_seed(seed))


SHARES: tuple[list[tuple[int, Tensor]], ...] = (
    [(0, batch(0, 5)), (1, batch(1, 7)), (0, batch(2, 3))],
    [(2, batch(3, 8))],  # the only one of task 2
)


def fitted(batches: list[tuple[int, Tensor]], broken: bool = False) -> dict[str, Any]:
    model = Texts(9).double()
    corrections = Corrections(find_sites(model), 3, context=TaskContext())
    corrections.attach(model)
    experts: list[Any] = [Texts(seed).double() for seed in range(3)]
    if broken:
        experts[2].two.weight.data[0, 0] = float("nan")

    def forward(net: nn.Module, ids: Tensor) -> Any:
        return net(ids)

    solve_in_prefix(
        model,
        [Teacher(expert, forward) for expert in experts],
        batches,
        LeastSquares(embeddings=True, max_rows=15),
        context=corrections.context,
        forward=run_model,
        corrections=corrections,
    )
    found = {**model.state_dict(), **corrections.state_dict()}
    return {name: value.tolist() for name, value in found.items()}


def test_two_processes_with_uneven_batches_find_what_one_does(tmp_path: Path) -> None:
    expected = fitted([*SHARES[0], *SHARES[1]])
    for found in on_ranks(lambda rank: fitted(SHARES[rank]), world_size=2, folder=tmp_path):
        assert isinstance(found, dict), found
        for name, value in expected.items():
            torch.testing.assert_close(
                torch.tensor(found[name]), torch.tensor(value), rtol=1e-6, atol=1e-7
            )


def test_a_broken_expert_of_one_rank_ends_both(tmp_path: Path) -> None:
    one, two = on_ranks(lambda rank: fitted(SHARES[rank], True), world_size=2, folder=tmp_path)
    assert "rank 1: layer 'two'" in one
    assert "layer 'two': outputs of the expert's layer must be finite" in two


def broken_forward(rank: int) -> Any:
    """Fail in the last rank's expert behind the last layer, where no other rank looks."""
    if rank == 0:
        return fitted(SHARES[0])
    expert, calls = Texts(2).double(), []
    model = Texts(9).double()
    corrections = Corrections(find_sites(model), 3, context=TaskContext())
    corrections.attach(model)

    def forward(net: nn.Module, ids: Tensor) -> Any:
        net(ids)
        calls.append(1)
        if len(calls) > 1:  # not where the sensitivity is measured
            raise ValueError("behind the last layer")
        return net(ids)

    solve_in_prefix(
        model,
        [Teacher(expert, forward)] * 3,
        SHARES[1],
        LeastSquares(embeddings=True, max_rows=15),
        context=corrections.context,
        forward=run_model,
        corrections=corrections,
    )
    return None


def test_a_forward_that_fails_on_one_rank_ends_both(tmp_path: Path) -> None:
    one, two = on_ranks(broken_forward, world_size=2, folder=tmp_path)
    assert "rank 1: behind the last layer" in one
    assert "ValueError: behind the last layer" in two


def test_a_rank_without_batches_ends_both(tmp_path: Path) -> None:
    everything = [*SHARES[0], *SHARES[1]]
    results = on_ranks(
        lambda rank: fitted([] if rank else everything), world_size=2, folder=tmp_path
    )
    for result in results:
        assert "and every rank; got none on a rank" in result
