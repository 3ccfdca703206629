"""The data modules over one task and over several."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from torch.utils.data import TensorDataset

import lit_merge.tasks
from lit_merge.errors import InputError
from lit_merge.tasks import (
    IGNORED,
    DatasetTask,
    MultiTaskDataModule,
    TaskDataModule,
    TextTask,
)
from lit_merge.tasks.data_modules import NoLoaders


def numbers(count: int, width: int = 2) -> TensorDataset:
    labels = torch.arange(count) % 3
    return TensorDataset(torch.arange(float(count)).unsqueeze(1).repeat(1, width), labels)


def task(train: int = 10, test: int = 5, width: int = 2) -> DatasetTask:
    return DatasetTask(numbers(train, width), test=numbers(test, width), num_classes=3)


def on_rank(module: TaskDataModule | MultiTaskDataModule, rank: int, ranks: int) -> None:
    kwargs = {"num_replicas": ranks, "rank": rank}
    module.trainer = SimpleNamespace(distributed_sampler_kwargs=kwargs)  # type: ignore[assignment]


def test_everything_for_tasks_can_be_imported_from_one_place():
    assert all(hasattr(lit_merge.tasks, name) for name in lit_merge.tasks.__all__)


def test_one_task_gives_pairs_of_all_its_examples():
    batches = list(TaskDataModule(task(), batch_size=4).train_dataloader())
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert sorted(torch.cat([inputs for inputs, _ in batches])[:, 0].tolist()) == list(range(10))


def test_one_task_is_tested_in_order_and_duplicates_have_no_label():
    module = TaskDataModule(task(test=5), batch_size=2)
    on_rank(module, rank=1, ranks=2)
    batches = list(module.test_dataloader())
    assert torch.cat([inputs for inputs, _ in batches])[:, 0].tolist() == [2, 3, 4]
    assert torch.cat([labels for _, labels in batches]).tolist() == [2, 0, IGNORED]


def test_a_task_without_validation_is_not_validated():
    module = TaskDataModule(task())
    module.setup("fit")
    assert isinstance(module.val_dataloader(), NoLoaders)
    with pytest.raises(InputError, match="task 'task': must have a validation split"):
        module.setup("validate")


def test_several_tasks_give_mixed_batches_with_the_tasks_in_the_given_order():
    module = MultiTaskDataModule({"b": task(6), "a": task(4)}, batch_size=4)
    module.setup("fit")
    assert module.task_names == ("b", "a")
    batches = list(module.train_dataloader())
    assert [batch.task.tolist() for batch in batches] == [[0, 1, 0, 1]] * 3


def test_every_task_is_tested_by_its_own_loader():
    module = MultiTaskDataModule({"a": task(test=5), "b": task(test=3)}, eval_batch_size=4)
    module.setup("test")
    first, second = (list(one) for one in module.test_dataloader())
    assert [len(batch.task) for batch in first] == [4, 1]
    assert {int(t) for batch in second for t in batch.task} == {1}
    assert torch.cat([batch.index for batch in first]).tolist() == [0, 1, 2, 3, 4]


def test_only_tasks_with_validation_examples_are_validated():
    with_validation = DatasetTask(numbers(4), numbers(3), num_classes=3)
    module = MultiTaskDataModule({"a": task(), "b": with_validation})
    module.setup("fit")
    (loader,) = module.val_dataloader()
    assert [batch.task.tolist() for batch in loader] == [[1, 1, 1]]


def test_a_calibration_batch_is_a_seeded_choice_of_training_examples():
    module = MultiTaskDataModule({"a": task(100)})
    inputs, labels = module.calibration_batch("a", num_examples=8)
    assert inputs.shape == (8, 2)
    assert torch.equal(inputs[:, 0] % 3, labels.float())
    assert torch.equal(module.calibration_batch("a", num_examples=8)[0], inputs)
    assert not torch.equal(module.calibration_batch("a", num_examples=8, seed=1)[0], inputs)
    assert len(module.calibration_batch("a", num_examples=1000)[1]) == 100


def test_batches_of_a_task_are_in_order_on_every_rank():
    module = MultiTaskDataModule({"a": task(5)}, eval_batch_size=2)
    on_rank(module, rank=1, ranks=2)
    batches = list(module.batches("a"))
    assert torch.cat([inputs for inputs, _ in batches])[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert [len(labels) for _, labels in module.batches("a", "test", batch_size=5)] == [5]


def test_workers_give_the_same_batches():
    tasks = {"a": task(9), "b": task(4)}
    alone = list(MultiTaskDataModule(tasks, batch_size=4).train_dataloader())
    helped = list(MultiTaskDataModule(tasks, batch_size=4, num_workers=1).train_dataloader())
    assert [batch.index.tolist() for batch in alone] == [batch.index.tolist() for batch in helped]


def test_one_process_per_machine_loads_before_the_others():
    from lightning.pytorch.trainer.states import TrainerFn

    module = MultiTaskDataModule({"a": DatasetTask(numbers(3), num_classes=3)})
    module.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.TESTING))  # type: ignore[assignment]
    with pytest.raises(InputError, match="task 'a': must have a test split"):
        module.prepare_data()


def test_data_modules_are_configured_by_yaml(tmp_path):
    parser = ArgumentParser()
    parser.add_class_arguments(MultiTaskDataModule, "data")
    config = tmp_path / "data.yaml"
    config.write_text(
        """
data:
  batch_size: 8
  tasks:
    trec:
      class_path: TextTask
      init_args: {train: trec.jsonl, tokenizer: bert, num_classes: 6, max_train_examples: 256}
    mnist:
      class_path: lit_merge.tasks.ImageTask
      init_args: {path: mnist.npz, num_classes: 10, mean: [0.1], validation_fraction: 0.1}
"""
    )
    module = parser.instantiate_classes(parser.parse_path(config)).data
    assert isinstance(module, MultiTaskDataModule)
    assert isinstance(module.tasks["trec"], TextTask)
    assert module.tasks["trec"].max_train_examples == 256
    assert module.tasks["mnist"].validation_fraction == 0.1


def test_inputs_of_different_formats_are_refused():
    module = MultiTaskDataModule({"a": task(), "b": task(width=3)})
    with pytest.raises(InputError, match=r"tasks: their inputs must have one format.*'a'.*'b'"):
        module.setup("fit")


def test_a_missing_split_is_named():
    module = MultiTaskDataModule({"a": DatasetTask(numbers(3), num_classes=3)})
    with pytest.raises(InputError, match=r"task 'a': must have a test split.*Give test="):
        module.setup("test")


def test_an_unknown_task_is_named():
    module = MultiTaskDataModule({"svhn": task()})
    with pytest.raises(InputError, match="task: must be one of svhn; got 'dtd'"):
        module.calibration_batch("dtd")
    with pytest.raises(InputError, match="task: must be one of svhn; got 'dtd'"):
        next(module.batches("dtd"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": {}}, "tasks: must hold at least one task; got none"),
        ({"batch_size": 0}, "batch_size: must be at least 1; got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size: must be at least 1; got -1"),
        ({"num_workers": -1}, "num_workers: must be at least 0; got -1"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(InputError, match=message):
        MultiTaskDataModule(**{"tasks": {"a": task()}} | options)


def test_a_calibration_batch_needs_an_example():
    with pytest.raises(InputError, match="num_examples: must be at least 1; got 0"):
        MultiTaskDataModule({"a": task()}).calibration_batch("a", num_examples=0)
