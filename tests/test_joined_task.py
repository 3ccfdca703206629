"""Joined tasks: the classes of one after those of the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_merge.errors import InputError
from lit_merge.tasks import JoinedTask
from lit_merge.tasks.task import IGNORED, DatasetTask


def examples(labels: list[int], *, first: float) -> list[tuple[Tensor, int]]:
    return [(torch.full((2,), first + row), label) for row, label in enumerate(labels)]


def small_task(labels: list[int], classes: int, *, first: float = 0.0) -> DatasetTask:
    given = examples(labels, first=first)
    return DatasetTask(given, test=given[:1], num_classes=classes)


def test_classes_stand_side_by_side() -> None:
    joined = JoinedTask(
        [
            small_task([1, 0], 2),
            small_task([2, 0, 1], 3, first=10.0),
            small_task([1], 4, first=20.0),
        ]
    )
    assert joined.num_classes == 9
    assert joined.train is not None
    assert joined.test is not None
    found = [(float(inputs[0]), label) for inputs, label in joined.train]  # type: ignore[attr-defined]
    assert found == [(0, 1), (1, 0), (10, 4), (11, 2), (12, 3), (20, 6)]
    assert [label for _, label in joined.test] == [1, 4, 6]  # type: ignore[attr-defined]
    assert joined.validation is None
    loader = DataLoader(joined.train, batch_size=6, collate_fn=joined.collate)  # type: ignore[arg-type]
    inputs, labels = next(iter(loader))
    assert inputs.shape == (6, 2)
    assert labels.tolist() == [1, 0, 4, 2, 3, 6]


def test_a_task_without_a_split_is_left_out_of_it() -> None:
    trained_only = DatasetTask(examples([1, 1], first=0.0), num_classes=2)
    joined = JoinedTask([trained_only, small_task([0, 2], 3)])
    assert joined.test is not None
    assert [label for _, label in joined.test] == [2]  # type: ignore[attr-defined]


def test_labels_that_do_not_count_stay_so() -> None:
    joined = JoinedTask([small_task([0], 2), small_task([IGNORED, 1], 3)])
    assert [label for _, label in joined.train] == [0, IGNORED, 3]  # type: ignore[attr-defined, union-attr]


def test_limits_are_those_of_every_task() -> None:
    joined = JoinedTask([small_task([0, 1, 0], 2), small_task([0, 1], 3)], max_train_examples=3)
    assert joined.train is not None
    assert len(joined.train) == 3


def test_what_cannot_be_joined_is_refused() -> None:
    with pytest.raises(InputError, match=r"tasks: must be at least one to join; got none"):
        JoinedTask([])
    wide = DatasetTask([(torch.zeros(3), 0)], num_classes=2)
    with pytest.raises(InputError, match=r"tasks: must have inputs of one format .*\(2,\).*\(3,\)"):
        _ = JoinedTask([small_task([0], 2), wide]).train
