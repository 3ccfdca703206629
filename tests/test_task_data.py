"""Tasks: their splits, the limits on them, and what is checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from lit_merge.errors import InputError
from lit_merge.tasks.task import (
    DatasetTask,
    Examples,
    Split,
    Task,
    as_labels,
    check_labels,
    require_file,
)


def numbers(count: int, start: int = 0) -> TensorDataset:
    values = torch.arange(start, start + count)
    return TensorDataset(values.float().unsqueeze(1), values % 3)


def values_of(examples: Examples | None) -> list[int]:
    assert examples is not None
    return [int(examples[i][0]) for i in range(len(examples))]


class Counting(Task):
    """Ten training examples and no others; counts how often it is asked for them."""

    loads = 0

    def load(self, split: Split) -> Examples | None:
        self.loads += 1
        return numbers(10) if split == "train" else None


def test_a_task_loads_a_split_at_first_use_and_once():
    task = Counting(num_classes=3)
    assert task.loads == 0
    assert task.train is task.train
    assert task.loads == 1


def test_a_split_that_is_not_there_is_none():
    assert Counting(num_classes=3).test is None
    assert Counting(num_classes=3).validation is None


def test_held_out_validation_and_training_examples_share_none_and_miss_none():
    task = Counting(num_classes=3, validation_fraction=0.3)
    train, validation = values_of(task.train), values_of(task.validation)
    assert len(validation) == 3
    assert sorted(train + validation) == list(range(10))


def test_nothing_is_loaded_twice_to_hold_examples_out():
    task = Counting(num_classes=3, validation_fraction=0.3)
    assert task.train is not None
    assert task.validation is not None
    assert task.loads == 2  # the training split, and that there is no validation split


def test_held_out_examples_are_the_same_in_every_run_and_others_with_another_seed():
    def held_out(seed: int) -> list[int]:
        return values_of(Counting(num_classes=3, validation_fraction=0.5, seed=seed).validation)

    assert held_out(0) == held_out(0)
    assert held_out(0) != held_out(1)


def test_a_validation_split_of_its_own_is_taken_before_a_held_out_share():
    task = DatasetTask(numbers(10), numbers(4, 50), num_classes=3, validation_fraction=0.5)
    assert values_of(task.validation) == [50, 51, 52, 53]
    assert len(values_of(task.train)) == 10


def test_limits_take_a_random_subset_in_the_order_of_the_file():
    task = DatasetTask(
        numbers(100), numbers(100), numbers(100), num_classes=3,
        max_train_examples=8, max_eval_examples=5,
    )  # fmt: skip
    train = values_of(task.train)
    assert len(train) == 8
    assert train == sorted(train)
    assert train != list(range(8))
    assert len(values_of(task.validation)) == len(values_of(task.test)) == 5


def test_a_limit_above_the_number_of_examples_takes_all():
    task = DatasetTask(numbers(4), num_classes=3, max_train_examples=9)
    assert values_of(task.train) == [0, 1, 2, 3]


def test_a_limit_counts_after_validation_examples_were_held_out():
    task = Counting(num_classes=3, validation_fraction=0.5, max_train_examples=4)
    assert len(values_of(task.train)) == 4
    assert not set(values_of(task.train)) & set(values_of(task.validation))


def test_collate_stacks_tensors_and_mappings():
    task = DatasetTask(num_classes=3)
    inputs, labels = task.collate([({"a": torch.zeros(2)}, 1), ({"a": torch.ones(2)}, 2)])
    assert inputs["a"].tolist() == [[0, 0], [1, 1]]
    assert labels.tolist() == [1, 2]
    assert labels.dtype == torch.int64


def test_a_collate_of_ones_own_is_used():
    task = DatasetTask(num_classes=3, collate=lambda items: ("batch", as_labels([0] * len(items))))
    assert task.collate([(1, 2), (3, 4)])[0] == "batch"


def test_formats_differ_with_shape_type_and_keys():
    def form(value: object) -> object:
        return DatasetTask([(value, 0)], num_classes=2).input_format()

    assert form(torch.zeros(3)) == form(torch.ones(3))
    assert form(torch.zeros(3)) != form(torch.zeros(4))
    assert form(torch.zeros(3)) != form(torch.zeros(3, dtype=torch.int64))
    assert form({"a": torch.zeros(3)}) != form({"b": torch.zeros(3)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes: must be at least 2; got 1"),
        (
            {"num_classes": 2, "validation_fraction": 1.0},
            r"validation_fraction: must be in \[0, 1\)",
        ),
        ({"num_classes": 2, "max_train_examples": 0}, "max_train_examples: must be at least 1"),
        (
            {"num_classes": 2, "validation_fraction": 0.1, "unlabelled": True},
            "validation_fraction: must be 0 for unlabelled training examples; got 0.1",
        ),
        ({"num_classes": 2, "max_eval_examples": -1}, "max_eval_examples: must be at least 1"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, float], message: str):
    with pytest.raises(InputError, match=message):
        Counting(**options)


def test_an_empty_split_is_refused():
    with pytest.raises(
        InputError, match="DatasetTask: the test split must have examples; got none"
    ):
        DatasetTask(test=[], num_classes=2).split("test")


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match="split: must be train, validation or test; got 'dev'"):
        Counting(num_classes=2).split("dev")  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [[0, 1, 2], np.array([0, 1, 2], dtype=np.uint8)])
def test_good_labels_become_int64(labels: object):
    checked = check_labels(labels, 3, where="row {row}")  # type: ignore[arg-type]
    assert checked.dtype == np.int64
    assert checked.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3], r"x, row 2: the label must be an integer in \[0, 3\); got 3"),
        ([0, 1, -1], "x, row 3: .* got -1"),
        ([0, "1"], "x, row 2: .* got '1'"),
        ([0, None], "x, row 2: .* got None"),
        ([0.0, 1.0], "x, row 1: .* got 0.0"),
        ([True, False], "x, row 1: .* got True"),
        (np.zeros((2, 2), dtype=np.int64), "x, row 1: the label must be an integer"),
    ],
)
def test_a_bad_label_is_named_with_its_row(labels: object, message: str):
    with pytest.raises(InputError, match=message):
        check_labels(labels, 3, where="x, row {row}")  # type: ignore[arg-type]


def test_a_missing_file_is_named_with_its_parameter():
    with pytest.raises(InputError, match="/no/where: the file given as train must exist"):
        require_file("/no/where", "train")
