"""Counting, taking and splitting the examples of nested batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from lit_merge.curvature.batches import (
    batch_size_of,
    outside_inference,
    split_batch,
    take_examples,
    unlike_pair,
)
from lit_merge.errors import InputError


class Pair(NamedTuple):
    inputs: dict[str, Tensor]
    labels: Tensor


@dataclass(frozen=True)
class Record:
    inputs: Tensor
    name: str


def nested() -> Pair:
    ids = torch.arange(12).view(3, 4)
    return Pair({"ids": ids, "scale": torch.tensor(2.0)}, torch.arange(3))


def test_the_size_is_the_first_dimension_shared_by_all_tensors() -> None:
    assert batch_size_of(nested()) == 3
    assert batch_size_of(torch.zeros(5, 2)) == 5
    assert batch_size_of([{"x": torch.zeros(2)}, (None, True, torch.zeros(2, 3))]) == 2


def test_splitting_keeps_types_and_shares_what_belongs_to_no_example() -> None:
    batches = split_batch(nested())
    assert [type(batch) for batch in batches] == [Pair] * 3
    assert batches[1].inputs["ids"].tolist() == [[4, 5, 6, 7]]
    assert batches[1].inputs["scale"].item() == 2.0
    assert [batch.labels.tolist() for batch in batches] == [[0], [1], [2]]


def test_an_encoding_of_transformers_keeps_its_type_and_methods() -> None:
    encoding = BatchEncoding({"input_ids": torch.arange(4).view(2, 2)})
    taken = take_examples(encoding, [1])
    assert isinstance(taken, BatchEncoding)
    assert taken.input_ids.tolist() == [[2, 3]]
    assert encoding.input_ids.shape == (2, 2)


def test_a_dataclass_keeps_its_type() -> None:
    record = take_examples(Record(torch.arange(3), "train"), [2])
    assert isinstance(record, Record)
    assert (record.inputs.tolist(), record.name) == ([2], "train")


def test_texts_are_cut_with_the_tensors_and_settings_are_not() -> None:
    batch = {"x": torch.zeros(2, 3), "text": ["a", "b"], "size": (224, 224), "name": "train"}
    first, second = split_batch(batch)
    assert (first["text"], second["text"]) == (["a"], ["b"])
    assert (first["size"], first["name"]) == ((224, 224), "train")


def test_examples_are_taken_in_any_order() -> None:
    assert take_examples(torch.arange(5), [3, 0]).tolist() == [3, 0]
    assert take_examples(torch.arange(5), range(1, 3)).tolist() == [1, 2]


def test_a_run_of_examples_is_a_view() -> None:
    batch = torch.arange(5)
    assert take_examples(batch, range(1, 3)).data_ptr() == batch[1:].data_ptr()


def test_the_unlike_pair_is_the_shortest_and_the_longest_text() -> None:
    ids = torch.tensor([[5, 6, 7, 1, 1], [5, 1, 1, 1, 1], [5, 6, 7, 8, 9]])  # 1 pads
    assert set(unlike_pair({"input_ids": ids})) == {1, 2}


def test_the_pair_of_a_batch_without_padding_is_its_ends() -> None:
    assert unlike_pair((torch.randn(6, 3), torch.arange(6))) == (0, 5)
    assert unlike_pair(torch.randn(1, 3)) == (0,)


def test_inference_tensors_become_ordinary_ones() -> None:
    with torch.inference_mode():
        batch = (torch.ones(2), {"y": torch.ones(2)})
    assert not outside_inference(batch)[1]["y"].is_inference()
    ordinary = (torch.ones(2),)
    assert outside_inference(ordinary) is ordinary


def test_tensors_that_disagree_are_refused_by_name() -> None:
    batch = {"x": torch.zeros(3, 2), "weights": torch.zeros(7)}
    with pytest.raises(InputError, match=r"got 3 in batch\['x'\] and 7 in batch\['weights'\]"):
        batch_size_of(batch)


def test_a_batch_without_tensors_is_refused() -> None:
    with pytest.raises(InputError, match=r"batch: must hold tensors .* got list without one"):
        batch_size_of(["a text", "another"])


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(InputError, match="at least one example; got 0"):
        batch_size_of(torch.zeros(0, 3))
