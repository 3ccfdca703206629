"""Which examples are held out, and the best state."""

from __future__ import annotations

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.merged.holdout import BestState, choose_held_out, held_out_batches
from tests.tiny_merge import SIZES, tiny_data


def test_a_share_of_each_task_is_held_out_and_small_tasks_keep_all() -> None:
    sizes = {"a": 100, "b": 10, "c": 9, "d": 40}
    held = choose_held_out(sizes, 0.1, seed=3)
    assert {task: len(places) for task, places in held.items()} == {"a": 10, "b": 1, "c": 0, "d": 4}
    assert all(len(set(p)) == len(p) and max(p, default=0) < sizes[t] for t, p in held.items())
    assert held == choose_held_out(sizes, 0.1, seed=3)
    assert held["a"] != choose_held_out(sizes, 0.1, seed=4)["a"]
    assert not any(choose_held_out(sizes, 0.0, seed=3).values())
    assert len(choose_held_out({"a": 10}, 0.99, seed=0)["a"]) == 9


def test_training_batches_and_calibration_leave_the_held_out_examples_out() -> None:
    data = tiny_data()
    held = choose_held_out(SIZES, 0.25, seed=0)
    data.setup("fit")
    data.hold_out(held)
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    for batch in data.train_dataloader():
        for task, place in zip(batch.task.tolist(), batch.index.tolist(), strict=True):
            seen[task].add(place)
            inputs, _ = data.examples(data.task_names[task], "train")[place]
            row = (batch.task == task) & (batch.index == place)
            assert torch.equal(batch.inputs[row][0], inputs)
    for number, (name, size) in enumerate(SIZES.items()):
        assert seen[number] == set(range(size)) - set(held[name])
        calibration, _ = data.calibration_batch(name, num_examples=1000)
        assert len(calibration) == size - len(held[name])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_held_out_examples_in_equally_many_batches(world_size: int) -> None:
    data = tiny_data(eval_batch_size=4)
    data.setup("fit")
    held = {"svhn": tuple(range(0, 20, 2)), "dtd": (5,)}
    ranks = [
        held_out_batches(data, held, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    found = sorted(
        (data.task_names[task], place)
        for batches in ranks
        for batch in batches
        for task, place, valid in zip(
            batch.task.tolist(), batch.index.tolist(), batch.valid.tolist(), strict=True
        )
        if valid
    )
    assert found == sorted((task, place) for task, places in held.items() for place in places)


def test_the_best_state_comes_back_also_from_a_checkpoint() -> None:
    best, weight = BestState(), torch.nn.Parameter(torch.zeros(3))
    for step, (loss, value) in enumerate([(2.0, 0.0), (1.0, 1.0), (float("nan"), 2.0), (3.0, 3.0)]):
        with torch.no_grad():
            weight.fill_(value)
        best.note(loss, step=step, state={"weight": weight})
    assert (best.loss, best.step, best.measured, best.waited) == (1.0, 1, 3, 2)
    loaded = BestState()
    loaded.load_state_dict(best.state_dict())
    for one in (best, loaded):
        with torch.no_grad():
            weight.fill_(9.0)
        one.restore({"weight": weight})
        assert weight.tolist() == [1.0, 1.0, 1.0]
    assert (loaded.loss, loaded.step, loaded.measured, loaded.waited) == (1.0, 1, 3, 2)


def test_without_a_measurement_nothing_is_restored() -> None:
    weight = torch.ones(2)
    BestState().restore({"weight": weight})
    assert weight.tolist() == [1.0, 1.0]


def test_the_best_state_of_another_model_is_refused() -> None:
    best = BestState()
    best.note(1.0, step=0, state={"weight": torch.zeros(3)})
    with pytest.raises(InputError, match=r"best state must be of what is learned.*'weight'"):
        best.restore({"weight": torch.zeros(4)})
