from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lit_merge.errors import InputError
from lit_merge.passes.data_pass import DataPass, curvature_loader, data_pass
from lit_merge.passes.training_examples import own_random_numbers, random_subset


class Numbers(Dataset[tuple[Tensor, int]]):
    """Example i is ([i, i], 7 i)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((2,), float(index)), 7 * index


class Stream(IterableDataset[tuple[Tensor, int]]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (Numbers(self.size)[i] for i in range(self.size))


class Buckets(Sampler[list[int]]):
    """A batch sampler that tells neither its sampler nor its batch size."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([0, 1, 2], [3, 4], [5, 6, 7, 8])

    def __len__(self) -> int:
        return 3


def values(batches: DataPass) -> list[int]:
    """Return the examples that were seen, after checking that the indices are theirs."""
    seen = []
    for indices, (numbers, labels) in batches:
        assert numbers[:, 0].tolist() == list(indices)
        assert labels.tolist() == [7 * i for i in indices]
        seen += list(indices)
    return seen


def all_ranks(loader: Any, world_size: int, **settings: Any) -> list[list[int]]:
    return [
        values(data_pass(loader, rank=rank, world_size=world_size, **settings))
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 70])
def test_every_example_is_seen_once_on_any_number_of_ranks(world_size: int) -> None:
    loader = DataLoader(Numbers(61), batch_size=8, shuffle=True, drop_last=True)
    shares = all_ranks(loader, world_size)
    assert sorted(chain.from_iterable(shares)) == list(range(61))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_pass_has_the_loaders_batch_size_or_its_own() -> None:
    loader = DataLoader(Numbers(10), batch_size=4, shuffle=True)
    own = data_pass(loader, batch_size=3)
    assert [len(indices) for indices, _ in data_pass(loader)] == [4, 4, 2]
    assert [len(indices) for indices, _ in own] == [3, 3, 3, 1]
    assert (own.num_examples, own.num_here) == (10, 10)


def test_a_pass_can_be_repeated() -> None:
    batches = data_pass(DataLoader(Numbers(5), batch_size=2))
    seen = values(batches)
    assert values(batches) == seen
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_the_order_is_random_so_that_sorted_data_do_not_matter() -> None:
    loader = DataLoader(Numbers(200), batch_size=100)
    orders = [values(data_pass(loader, seed=seed)) for seed in (0, 1)]
    assert orders[0] != orders[1]
    for order in orders:  # a random half of 0 … 199 has the mean 99.5 ± 4
        assert abs(sum(order[:100]) / 100 - 99.5) < 16


def test_the_batches_of_a_start_are_left_out_and_the_others_stay() -> None:
    for loader in (DataLoader(Numbers(10), batch_size=3), DataLoader(Stream(10), batch_size=3)):
        batches = data_pass(loader, rank=1, world_size=2)
        whole = [(indices, batch[0].tolist()) for indices, batch in batches]
        rest = [(indices, batch[0].tolist()) for indices, batch in batches.batches(start=1)]
        assert rest == whole[1:]
        assert rest


def test_there_are_two_batches_where_there_are_two_examples() -> None:
    sizes = [len(i) for i, _ in data_pass(DataLoader(Numbers(5), batch_size=64))]
    assert sizes == [3, 2]
    assert values(data_pass(DataLoader(Numbers(1), batch_size=64))) == [0]


def test_a_plan_tells_passes_apart() -> None:
    loader = DataLoader(Numbers(10), batch_size=2)
    plan = data_pass(loader, seed=1).plan()
    assert plan == data_pass(loader, seed=1).plan()
    others: list[dict[str, Any]] = [{"seed": 2}, {"max_examples": 9}, {"batch_size": 3}]
    for other in (*others, {"world_size": 2}):
        assert data_pass(loader, **{"seed": 1, **other}).plan() != plan
    ranks = [data_pass(loader, rank=rank, world_size=2).plan() for rank in range(2)]
    assert ranks[0] == ranks[1]
    stream = DataLoader(Stream(10), batch_size=2)
    assert data_pass(stream).plan() != data_pass(stream, max_examples=3).plan()


def test_the_collate_function_is_the_loaders() -> None:
    loader = DataLoader(Numbers(4), batch_size=2, collate_fn=len)
    assert [batch for _, batch in data_pass(loader)] == [2, 2]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_pass_draws_no_global_random_numbers(num_workers: int) -> None:
    loader = DataLoader(Numbers(6), batch_size=2, shuffle=True, num_workers=num_workers)
    state = torch.get_rng_state()
    batches = data_pass(loader, max_examples=4)
    assert len(values(batches)) == 4
    batches.first_few()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_first_examples_are_the_same_on_every_rank() -> None:
    loader = DataLoader(Numbers(90), batch_size=4, num_workers=1, persistent_workers=True)
    few = [
        data_pass(loader, rank=rank, world_size=3, batch_size=1).first_few()[1].tolist()
        for rank in range(3)
    ]
    assert few[0] == few[1] == few[2]
    assert few[0] == [7 * i for i in values(data_pass(loader))[:8]]
    assert data_pass(DataLoader(Numbers(1))).first_few()[1].tolist() == [0]


def test_a_subset_does_not_depend_on_the_number_of_ranks() -> None:
    loader = DataLoader(Numbers(50), batch_size=4, shuffle=True)
    alone = sorted(values(data_pass(loader, max_examples=11, seed=3)))
    shares = all_ranks(loader, 2, max_examples=11, seed=3)
    assert sorted(chain.from_iterable(shares)) == alone
    assert len(set(alone)) == 11
    assert alone != list(range(11))
    assert alone != sorted(values(data_pass(loader, max_examples=11, seed=4)))
    assert data_pass(loader, max_examples=11).num_examples == 50
    assert len(values(data_pass(loader, max_examples=500))) == 50


def test_a_random_subset_is_drawn_without_replacement() -> None:
    subset = random_subset(range(100), 30, seed=0)
    assert len(set(subset)) == 30
    assert random_subset(range(100), 31, seed=0)[:30] == subset


def test_the_trainers_limit_bounds_a_shuffled_pass_but_not_n() -> None:
    loader = DataLoader(Numbers(50), batch_size=4, shuffle=True)
    batches = data_pass(loader, epoch_batches=3)
    assert batches.num_examples == 50
    seen = values(batches)
    assert len(seen) == 12
    assert sorted(seen) != list(range(12))
    assert len(values(data_pass(loader, epoch_batches=3, max_examples=5))) == 5


def test_the_trainers_limit_bounds_n_without_shuffling() -> None:
    batches = data_pass(DataLoader(Numbers(50), batch_size=4), epoch_batches=3)
    assert batches.num_examples == 12
    assert sorted(values(batches)) == list(range(12))
    loader = DataLoader(
        Numbers(50),
        batch_size=4,
        sampler=DistributedSampler(Numbers(50), num_replicas=2, rank=0, shuffle=False),
    )
    assert sorted(chain.from_iterable(all_ranks(loader, 2, epoch_batches=3))) == list(range(24))


def test_a_limit_of_all_batches_is_none() -> None:
    loader = DataLoader(Numbers(50), batch_size=4)
    assert data_pass(loader, epoch_batches=13).num_examples == 50
    assert data_pass(loader, epoch_batches=float("inf")).num_examples == 50


def test_distributed_samplers_neither_repeat_nor_drop() -> None:
    for drop_last in (False, True):
        sampler = DistributedSampler(Numbers(7), num_replicas=3, rank=1, drop_last=drop_last)
        loader = DataLoader(Numbers(7), batch_size=2, sampler=sampler)
        assert sorted(chain.from_iterable(all_ranks(loader, 3))) == list(range(7))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_subset_sampler_names_the_training_set(wrapped: bool) -> None:
    sampler: Any = SubsetRandomSampler([9, 2, 5])
    if wrapped:
        sampler = DistributedSamplerWrapper(sampler, num_replicas=2, rank=0)
    batches = data_pass(DataLoader(Numbers(10), batch_size=2, sampler=sampler))
    assert sorted(values(batches)) == [2, 5, 9]
    assert batches.num_examples == 3


def test_other_samplers_are_taken_at_their_word_and_left_as_they_were() -> None:
    generator = torch.Generator().manual_seed(1)
    sampler = WeightedRandomSampler([0.0, 1.0, 5.0], num_samples=40, generator=generator)
    before = generator.get_state()
    seen = values(data_pass(DataLoader(Numbers(3), batch_size=8, sampler=sampler)))
    assert len(seen) == 40
    assert set(seen) == {1, 2}
    assert seen.count(2) > seen.count(1)
    assert torch.equal(generator.get_state(), before)
    drawn = RandomSampler(Numbers(5), replacement=True, num_samples=9)
    state = torch.get_rng_state()
    assert len(values(data_pass(DataLoader(Numbers(5), sampler=drawn)))) == 9
    assert torch.equal(torch.get_rng_state(), state)


def test_lightnings_wrapper_around_another_sampler_is_looked_into() -> None:
    sampler = WeightedRandomSampler([1.0, 1.0, 1.0], num_samples=5)
    wrapper = DistributedSamplerWrapper(sampler, num_replicas=2, rank=0)
    loader = DataLoader(Numbers(3), batch_size=2, sampler=wrapper)
    assert sum(map(len, all_ranks(loader, 2))) == 5


def test_an_unknown_sampler_left_alone_on_several_ranks_is_refused() -> None:
    sampler = WeightedRandomSampler([1.0, 1.0], num_samples=5)
    with pytest.raises(InputError, match=r"got a WeightedRandomSampler.*curvature_dataloader"):
        data_pass(DataLoader(Numbers(2), sampler=sampler), world_size=2)


def test_a_batch_sampler_gives_its_batch_size() -> None:
    class Own(BatchSampler):
        pass

    sampler = Own(SequentialSampler(Numbers(7)), batch_size=3, drop_last=True)
    batches = data_pass(DataLoader(Numbers(7), batch_sampler=sampler))
    assert [len(indices) for indices, _ in batches] == [3, 3, 1]


def test_a_batch_sampler_without_batch_size_needs_one() -> None:
    loader = DataLoader(Numbers(9), batch_sampler=Buckets())
    with pytest.raises(InputError, match=r"must have a batch_size; got batches made by Buckets"):
        data_pass(loader)
    assert sorted(values(data_pass(loader, batch_size=4))) == list(range(9))
    with pytest.raises(InputError, match=r"got batches made by the data set"):
        data_pass(DataLoader(Numbers(9), batch_size=None))


@pytest.mark.parametrize(
    "loader",
    [
        {"a": DataLoader(Numbers(2))},
        [DataLoader(Numbers(2))],
        CombinedLoader({"a": DataLoader(Numbers(2))}),
    ],
)
def test_a_collection_of_loaders_is_refused(loader: Any) -> None:
    with pytest.raises(InputError, match=r"got a collection.*Define curvature_dataloader\(\)"):
        data_pass(loader)


def test_no_examples_are_refused() -> None:
    with pytest.raises(InputError, match=r"must have at least one example; got none"):
        data_pass(DataLoader(Numbers(0)))
    with pytest.raises(InputError, match=r"must yield at least one example; got none"):
        data_pass(DataLoader(Stream(0))).first_few()


def test_a_stream_is_taken_as_it_comes() -> None:
    batches = data_pass(DataLoader(Stream(10), batch_size=4))
    assert values(batches) == list(range(10))
    assert (batches.num_examples, batches.num_here) == (None, None)
    assert batches.first_few()[1].tolist() == [0, 7, 14, 21]


def test_a_stream_that_knows_its_length_tells_n() -> None:
    class Sized(Stream):
        def __len__(self) -> int:
            return self.size

    assert data_pass(DataLoader(Sized(10), batch_size=4)).num_examples == 10


def test_a_stream_is_cut_at_the_limit() -> None:
    loader = DataLoader(Stream(100), batch_size=4)
    assert values(data_pass(loader, max_examples=6)) == list(range(6))
    assert values(data_pass(loader, max_examples=8)) == list(range(8))
    assert values(data_pass(loader, epoch_batches=2)) == list(range(8))


def test_examples_of_a_stream_are_numbered_apart_on_the_ranks() -> None:
    loader = DataLoader(Stream(6), batch_size=4)
    numbers = [
        [i for indices, _ in data_pass(loader, rank=r, world_size=2) for i in indices]
        for r in range(2)
    ]
    assert numbers == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]


def test_any_iterable_is_a_stream() -> None:
    batches = [(torch.zeros(1, 2), torch.zeros(1)), (torch.ones(20, 2), torch.ones(20))]

    class Own:
        def __iter__(self) -> Iterator[Any]:
            return iter(batches)

    assert [len(indices) for indices, _ in data_pass(Own())] == [1, 20]
    assert data_pass(Own()).first_few()[1].tolist() == [0]
    batches.reverse()
    assert data_pass(Own()).first_few()[1].tolist() == [1] * 8


def test_a_stream_has_no_other_batch_size() -> None:
    with pytest.raises(InputError, match=r"batch_size: must be None where the data is a stream"):
        data_pass(DataLoader(Stream(5)), batch_size=3)


def test_training_goes_on_while_a_stream_is_looked_at() -> None:
    loader = DataLoader(Stream(6), batch_size=2, num_workers=1, persistent_workers=True)
    training = iter(loader)
    assert next(training)[1].tolist() == [0, 7]
    assert values(data_pass(loader)) == list(range(6))
    assert [batch[1].tolist() for batch in training] == [[14, 21], [28, 35]]


def test_the_first_curvature_dataloader_is_taken() -> None:
    with_hook = SimpleNamespace(curvature_dataloader=lambda: "own")
    assert curvature_loader(None, with_hook, otherwise=lambda: "training") == ("own", True)
    assert curvature_loader(None, object(), otherwise=lambda: "training") == ("training", False)


def test_a_curvature_dataloader_must_return_something() -> None:
    hook = SimpleNamespace(curvature_dataloader=lambda: None)
    with pytest.raises(InputError, match=r"curvature_dataloader: must return a DataLoader"):
        curvature_loader(hook, otherwise=lambda: "training")


def test_own_random_numbers_are_the_same_each_time_and_leave_the_others() -> None:
    state = torch.get_rng_state()
    with own_random_numbers(5):
        first = torch.rand(3)
    with own_random_numbers(5):
        second = torch.rand(3)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
