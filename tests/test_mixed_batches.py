"""Mixed batches: their order, their ranks, and what is marked as not valid."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.data import TensorDataset

from lit_merge.errors import InputError
from lit_merge.tasks.mixed_batches import (
    MergeBatch,
    MixedCollate,
    MixedLoader,
    MixedTasks,
    MixedTaskSampler,
)
from lit_merge.tasks.task import IGNORED, DatasetTask, as_labels

LENGTHS = (7, 4, 3)


def tasks(lengths: tuple[int, ...] = LENGTHS) -> list[tuple[str, DatasetTask]]:
    named = []
    for number, length in enumerate(lengths):
        inputs = 100.0 * number + torch.arange(length)
        labels = torch.arange(length) % 3
        data = TensorDataset(inputs.unsqueeze(1), labels)
        named.append((f"t{number}", DatasetTask(data, num_classes=3)))
    return named


def mixed(lengths: tuple[int, ...] = LENGTHS) -> MixedTasks:
    return MixedTasks([(i, task.train) for i, (_, task) in enumerate(tasks(lengths))])


def loader(
    batch_size: int, ranks: int = 1, rank: int = 0, lengths: tuple[int, ...] = LENGTHS
) -> MixedLoader:
    data = mixed(lengths)
    sampler = MixedTaskSampler(data, batch_size=batch_size, num_replicas=ranks, rank=rank)
    return MixedLoader(data, sampler=sampler, collate_fn=MixedCollate(tasks(lengths)))


def valid_examples(batches: list[MergeBatch]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for batch in batches:
        found += zip(
            batch.task[batch.valid].tolist(), batch.index[batch.valid].tolist(), strict=True
        )
    return sorted(found)


def test_an_index_leads_to_its_task_and_place():
    data = mixed()
    example = data[8]
    assert (example.task, example.place, example.valid) == (1, 1, True)
    assert example.example[0].item() == 101
    assert data[~8] == example._replace(valid=False)
    assert len(data) == 14


def test_an_epoch_interleaves_the_tasks_and_repeats_the_shorter_ones():
    batch = next(iter(loader(21)))
    assert batch.task.tolist() == [0, 1, 2] * 7
    for task, length in enumerate(LENGTHS):
        seen = batch.index[batch.task == task]
        assert len(seen) == 7
        rounds = seen.split(length)
        assert all(
            sorted(one.tolist()) == list(range(length)) for one in rounds if len(one) == length
        )


def test_a_batch_holds_equal_shares_of_the_tasks():
    batches = list(loader(6))
    counts = [torch.bincount(batch.task, minlength=3).tolist() for batch in batches[:-1]]
    assert counts == [[2, 2, 2]] * 3


def test_each_epoch_has_an_order_of_its_own_and_a_seed_repeats_it():
    data = mixed()
    sampler = MixedTaskSampler(data, batch_size=4)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert sorted(set(sampler)) == sorted(set(first))
    assert list(MixedTaskSampler(data, batch_size=4, seed=1)) != first


def test_without_shuffling_the_order_is_that_of_the_data():
    sampler = MixedTaskSampler(mixed((5,)), batch_size=2, shuffle=False)
    assert list(sampler) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("lengths", "ranks", "batch_size"),
    [
        (LENGTHS, 2, 4),
        (LENGTHS, 3, 2),
        ((61, 37), 2, 8),
        ((5,), 4, 2),
        ((1,), 3, 2),
        ((8, 8), 2, 4),
    ],
)
def test_batches_of_all_ranks_together_are_the_batch_of_one_process(lengths, ranks, batch_size):
    alone = list(loader(batch_size * ranks, lengths=lengths))
    together = [list(loader(batch_size, ranks, rank, lengths)) for rank in range(ranks)]
    assert {len(batches) for batches in together} == {len(alone)}
    for number, batch in enumerate(alone):
        parts = [batches[number] for batches in together]
        assert len({len(part.task) for part in parts}) == 1
        assert valid_examples(parts) == valid_examples([batch])
        assert batch.valid.all()
    assert len(loader(batch_size, ranks, lengths=lengths)) == len(alone)


def test_inputs_and_labels_stand_beside_their_task_and_index():
    for batch in loader(5, ranks=2, rank=1):
        assert batch.inputs[:, 0].tolist() == (100 * batch.task + batch.index).tolist()
        assert torch.equal(batch.labels, batch.index % 3)


def test_a_loader_goes_on_where_its_state_was_taken():
    whole = list(loader(4))
    first = loader(4)
    begun = list(itertools.islice(first, 2))
    later = loader(4)
    later.load_state_dict(first.state_dict())
    resumed = list(later)
    assert valid_examples(begun + resumed) == valid_examples(whole)
    assert torch.equal(resumed[0].index, whole[2].index)
    assert len(list(later)) == len(whole)


def test_a_state_at_the_end_of_an_epoch_is_the_start_of_the_next():
    first = loader(4)
    list(first)
    assert first.state_dict() == {"batches": 0}


def test_an_epoch_set_after_iter_is_the_one_that_counts():
    first, second = loader(21), loader(21)
    iterator = iter(first)
    first.sampler.set_epoch(3)
    second.sampler.set_epoch(3)
    assert torch.equal(next(iterator).index, next(iter(second)).index)


def test_examples_without_labels_pass():
    collate = MixedCollate([("a", DatasetTask(num_classes=2))])
    data = MixedTasks([(0, [(torch.zeros(1), IGNORED)])])
    assert collate([data[0]]).labels.tolist() == [IGNORED]


def test_a_label_beyond_the_classes_is_named():
    collate = MixedCollate([("digits", DatasetTask(num_classes=2))])
    data = MixedTasks([(0, [(torch.zeros(1), 0), (torch.zeros(1), 2)])])
    with pytest.raises(
        InputError, match=r"task 'digits': the label of example 1 must be in \[0, 2\)"
    ):
        collate([data[0], data[1]])


def test_inputs_that_do_not_fit_together_are_named():
    collate = MixedCollate([(name, DatasetTask(num_classes=2)) for name in ("a", "b")])
    data = MixedTasks([(0, [(torch.zeros(1), 0)]), (1, [(torch.zeros(2), 0)])])
    with pytest.raises(InputError, match="tasks: the inputs of a, b must fit into one batch"):
        collate([data[0], data[1]])


def test_labels_become_int64():
    assert as_labels(iter([True, 2])).dtype == torch.int64


def test_examples_of_known_length_come_longest_first_and_ties_in_order():
    examples = [(torch.tensor([float(i)]), 0) for i in range(5)]
    data = MixedTasks([(1, examples)], lengths={1: [3, 7, 3, 9, 1]}, without={1: [1]})
    assert [data[i].place for i in range(len(data))] == [3, 0, 2, 4]
    assert [MixedTasks([(0, examples)], lengths={1: [1] * 5})[i].place for i in range(5)] == [
        *range(5)
    ]
