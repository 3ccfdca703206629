from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lit_merge.passes.data_pass import data_pass
from lit_merge.passes.glimpse import alike, glimpse, require_same_data
from tests.processes import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks")


def images(seed: int = 0, count: int = 20) -> Tensor:
    """Return images that differ little from each other: noise around one mean."""
    generator = torch.Generator().manual_seed(seed)
    return 10 + torch.randn(count, 3, 32, 32, generator=generator)


def loader(inputs: Tensor, labels: Tensor | None = None) -> DataLoader[Any]:
    labels = torch.arange(len(inputs)) if labels is None else labels
    return DataLoader(TensorDataset(inputs, labels), batch_size=4)


def seen(inputs: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
    return glimpse(data_pass(loader(inputs, labels)), seed=0)


class Augmented(Dataset[Tensor]):
    """Adds noise from a generator of its own, as some transforms do."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((3,), float(index)) + torch.randn(3, generator=self.generator)


class Stream(IterableDataset[Tensor]):
    def __init__(self, *, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(40.0)[self.rank :: self.world_size])


def test_the_same_examples_look_alike_also_after_rounding() -> None:
    assert alike(seen(images()), seen(images()))
    assert alike(seen(images()), seen(images().half().float()))
    assert json.loads(json.dumps(seen(images()))) == seen(images())
    assert seen(images())


def test_other_values_orders_labels_shapes_and_types_do_not() -> None:
    labels = torch.arange(20)
    others = (
        seen(images(seed=1)),
        seen(images().flip(0), labels),
        seen(images(), labels.flip(0)),
        seen(images()[..., :31]),
        seen(images().double()),
        seen(images(), labels.int()),
    )
    assert not any(alike(seen(images(), labels), other) for other in others)


def test_nan_is_no_difference() -> None:
    broken = images()
    broken[0, 0, 0, 0] = float("nan")
    assert alike(seen(broken), seen(broken.clone()))


def test_random_augmentation_tells_nothing() -> None:
    data = data_pass(DataLoader(Augmented(), batch_size=4))
    assert glimpse(data, seed=0) == {}
    assert alike({}, seen(images()))
    assert alike(seen(images()), {})


def test_looking_draws_no_global_random_numbers() -> None:
    state = torch.get_rng_state()
    seen(images())
    assert torch.equal(torch.get_rng_state(), state)


def on_two(tmp_path: Path, make: Any) -> list[str]:
    """Return what two ranks say to the loaders that ``make(rank)`` returns."""

    def check(rank: int) -> str:
        require_same_data(data_pass(make(rank), rank=rank, world_size=2), seed=0)
        return "fine"

    return [str(said) for said in on_ranks(check, world_size=2, folder=tmp_path)]


@pytest.mark.distributed
def test_ranks_with_the_same_data_are_fine(tmp_path) -> None:
    assert on_two(tmp_path, lambda rank: loader(images())) == ["fine"] * 2
    assert on_two(tmp_path, lambda rank: DataLoader(Augmented(), batch_size=4)) == ["fine"] * 2
    shared = on_two(tmp_path, lambda rank: DataLoader(Stream(rank=rank, world_size=2)))
    assert shared == ["fine"] * 2


@pytest.mark.distributed
def test_ranks_with_other_lengths_are_named(tmp_path) -> None:
    for said in on_two(tmp_path, lambda rank: loader(images(count=20 - rank))):
        assert "must have the same examples on every rank; got 20 of them on rank 0 and 19" in said
        assert "on rank 1" in said


@pytest.mark.distributed
def test_ranks_that_shuffle_on_their_own_are_named(tmp_path) -> None:
    def shuffled(rank: int) -> DataLoader[Any]:
        order = torch.randperm(20, generator=torch.Generator().manual_seed(rank))
        return loader(images()[order], order)

    for said in on_two(tmp_path, shuffled):
        assert "in the same order on every rank; got other first examples on rank 1" in said


@pytest.mark.distributed
def test_a_stream_that_no_rank_has_split_is_refused(tmp_path) -> None:
    for said in on_two(tmp_path, lambda rank: DataLoader(Stream())):
        assert "got the same first ones on rank 0 and rank 1. Split the stream by rank" in said


def test_one_process_does_not_look() -> None:
    class Unreadable(Dataset[Tensor]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Tensor:
            raise AssertionError("was read")

    require_same_data(data_pass(DataLoader(Unreadable(), batch_size=2)), seed=0)
