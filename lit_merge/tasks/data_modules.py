"""The data modules over tasks: one task to train an expert, several to correct or test a merge."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, cast

import lightning as L
import numpy as np
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader

from lit_merge.errors import InputError
from lit_merge.tasks.mixed_batches import (
    MixedCollate,
    MixedExample,
    MixedLoader,
    MixedTasks,
    MixedTaskSampler,
    without_invalid,
)
from lit_merge.tasks.task import Examples, Inputs, Split, Task

_SPLITS_OF_STAGE: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
}


class NoLoaders(CombinedLoader):
    """No loader at all; Lightning takes an empty list for a loader without batches, and warns."""

    def __init__(self) -> None:
        super().__init__([], "sequential")

    @property
    def flattened(self) -> list[Any]:
        """Return the loaders: none."""
        return []

    @flattened.setter
    def flattened(self, flattened: list[Any]) -> None:
        assert not flattened


class _TaskLoaders(L.LightningDataModule):
    """What both data modules do: checks of the options, loading in time, exact evaluation."""

    def __init__(
        self,
        tasks: Mapping[str, Task],
        *,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        super().__init__()
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size is not None and size < 1:
                raise InputError(f"{name}: must be at least 1; got {size}. 32 is usual.")
        if num_workers < 0:
            raise InputError(
                f"num_workers: must be at least 0; got {num_workers}. 0 loads in place."
            )
        self._tasks = dict(tasks)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory

    def prepare_data(self) -> None:
        """Load once per machine, so that the other ranks find the libraries' caches filled."""
        self._load(self.trainer.state.fn if self.trainer is not None else None)

    def setup(self, stage: str) -> None:
        """Load the splits of a stage and check them.

        Raises:
            InputError: If a task lacks the split that the stage is about.
        """
        self._load(stage)

    def _load(self, stage: str | None) -> None:
        for split in _SPLITS_OF_STAGE.get(stage, ()):
            for name in self._tasks:
                # A fit without validation is fine, one without training examples is not.
                if split == "validation" and stage == "fit":
                    self._tasks[name].split(split)
                else:
                    self.examples(name, split)

    def examples(self, name: str, split: Split) -> Examples:
        """Return the examples of a task's split.

        Raises:
            InputError: If there is no such task or split.
        """
        if name not in self._tasks:
            raise InputError(
                f"task: must be one of {', '.join(self._tasks)}; got {name!r}. Check the name."
            )
        examples = self._tasks[name].split(split)
        if examples is None:
            raise InputError(
                f"task {name!r}: must have a {split} split; got {self._tasks[name].describe()} "
                f"without one. Give {split}=, or leave the task out."
            )
        return examples

    def _ranks(self) -> dict[str, Any]:
        sampler = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return dict(sampler or {"num_replicas": 1, "rank": 0})

    def _evaluation_loader(self, name: str, split: Split, collate: Any) -> DataLoader[Any]:
        place = list(self._tasks).index(name)
        examples = self.examples(name, split)
        lengths = self._tasks[name].lengths(examples)
        dataset = MixedTasks(
            [(place, examples)], lengths=None if lengths is None else {place: lengths}
        )
        sampler = MixedTaskSampler(
            dataset, batch_size=self.eval_batch_size, shuffle=False, **self._ranks()
        )
        return DataLoader(
            dataset,
            batch_size=self.eval_batch_size,
            sampler=sampler,
            collate_fn=collate,
            **self._loading(),
        )

    def _loading(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "pin_memory": self.pin_memory}


class TaskDataModule(_TaskLoaders):
    """One task: batches are ``(inputs, labels)``.

    Evaluation is exact on any number of ranks: examples that only fill up a rank have the label
    -100, which losses and metrics skip.

    Args:
        task: The task.
        batch_size: Training examples per batch and rank.
        eval_batch_size: Examples per batch and rank in validation and test; None takes batch_size.
        num_workers: Processes that load data, per loader; 0 loads in the training process.
        pin_memory: Copy batches into page-locked memory, which a GPU reads faster.

    Raises:
        InputError: If an option is out of range; at setup, if the task lacks the split.
    """

    def __init__(
        self,
        task: Task,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            {"task": task},
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        self.task = task

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches of the training examples."""
        return DataLoader(
            cast("Any", self.examples("task", "train")),
            batch_size=self.batch_size,
            shuffle=True,
            collate_fn=self.task.collate,
            **self._loading(),
        )

    def val_dataloader(self) -> DataLoader[Any] | NoLoaders:
        """Return the validation examples, long ones first; no loader where there are none."""
        if self.task.validation is None:
            return NoLoaders()
        return self._evaluation_loader("task", "validation", self._collate)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test examples, long ones first."""
        return self._evaluation_loader("task", "test", self._collate)

    def _collate(self, examples: Sequence[MixedExample]) -> tuple[Inputs, Tensor]:
        batch = MixedCollate([("task", self.task)])(examples)
        return batch.inputs, without_invalid(batch.labels, batch.valid)


class MultiTaskDataModule(_TaskLoaders):
    """Several tasks: batches are :class:`~lit_merge.tasks.mixed_batches.MergeBatch`.

    A training batch mixes the tasks in equal shares; an epoch shows each task as many examples as
    the largest has. Validation and test have one loader per task, in order.

    Args:
        tasks: Task by name; the order gives the task indices.
        batch_size: Training examples of all tasks together per batch and rank.
        eval_batch_size: Examples per batch and rank in validation and test; None takes batch_size.
        num_workers: Processes that load data, per loader; 0 loads in the training process.
        pin_memory: Copy batches into page-locked memory, which a GPU reads faster.
        seed: Seed of the training order.

    Raises:
        InputError: If there is no task or an option is out of range; at setup, if a task lacks the
            split or the inputs of the tasks do not fit into one batch.
    """

    def __init__(
        self,
        tasks: dict[str, Task],
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        if not tasks:
            raise InputError("tasks: must hold at least one task; got none. Name a task.")
        super().__init__(
            tasks,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        self.seed = seed
        self._held_out: dict[str, frozenset[int]] = {}

    def hold_out(self, places: Mapping[str, Collection[int]]) -> None:
        """Leave examples out of calibration, and of training from the next loader on.

        Args:
            places: Places in the training examples by task; a task without any keeps all.
        """
        self._held_out = {task: frozenset(held) for task, held in places.items()}

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The tasks by name, in the order of their indices."""
        return self._tasks

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of the tasks in the order of their indices."""
        return tuple(self._tasks)

    def setup(self, stage: str) -> None:
        """Load the splits of a stage and check that the tasks fit into one batch."""
        super().setup(stage)
        formats: dict[Hashable, str] = {}
        for name, task in self._tasks.items():
            formats.setdefault(task.input_format(), name)
        if len(formats) > 1:
            listed = "; ".join(f"{name!r}: {form}" for form, name in formats.items())
            raise InputError(
                f"tasks: their inputs must have one format to share a batch; got {listed}. "
                "Use one tokenizer, or one image size and number of channels, for all."
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return mixed batches of all tasks' training examples."""
        dataset = MixedTasks(
            [(i, self.examples(name, "train")) for i, name in enumerate(self._tasks)],
            without={
                i: self._held_out[name]
                for i, name in enumerate(self._tasks)
                if name in self._held_out
            },
        )
        sampler = MixedTaskSampler(
            dataset, batch_size=self.batch_size, seed=self.seed, **self._ranks()
        )
        return MixedLoader(dataset, sampler=sampler, collate_fn=self._collate(), **self._loading())

    def val_dataloader(self) -> list[DataLoader[Any]] | NoLoaders:
        """Return one loader for each task that has validation examples."""
        return [
            self._evaluation_loader(name, "validation", self._collate())
            for name, task in self._tasks.items()
            if task.validation is not None
        ] or NoLoaders()

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader per task."""
        return [self._evaluation_loader(name, "test", self._collate()) for name in self._tasks]

    def calibration_batch(
        self, task: str, *, num_examples: int = 256, seed: int = 0
    ) -> tuple[Inputs, Tensor]:
        """Return some training examples of a task as one batch, the same on every rank.

        Args:
            task: Name of the task.
            num_examples: How many; all where the task has fewer.
            seed: Seed of the choice.

        Returns:
            Inputs and labels.

        Raises:
            InputError: If there is no such task, or it has no training examples.
        """
        examples = self.examples(task, "train")
        chosen = self._calibration_places(task, num_examples, seed)
        return self._tasks[task].collate([examples[i] for i in chosen])

    def calibration_batches(
        self,
        task: str,
        *,
        num_examples: int = 256,
        seed: int = 0,
        batch_size: int | None = None,
        share: bool = True,
    ) -> list[Inputs]:
        """Return the inputs of the same examples in batches.

        Args:
            task: Name of the task.
            num_examples: How many; all where the task has fewer.
            seed: Seed of the choice.
            batch_size: Examples per batch; None for one batch.
            share: Whether this rank gets its share alone (maybe nothing), or all of them.

        Raises:
            InputError: If there is no such task, or it has no training examples.
        """
        examples = self.examples(task, "train")
        chosen = self._calibration_places(task, num_examples, seed)
        if share:
            ranks = self._ranks()
            chosen = chosen[ranks["rank"] :: ranks["num_replicas"]]
        size = batch_size or max(1, len(chosen))
        return [
            self._tasks[task].collate([examples[i] for i in chosen[start : start + size]])[0]
            for start in range(0, len(chosen), size)
        ]

    def _calibration_places(self, task: str, num_examples: int, seed: int) -> list[int]:
        if num_examples < 1:
            raise InputError(f"num_examples: must be at least 1; got {num_examples}. 64 is enough.")
        order = np.random.default_rng(seed).permutation(len(self.examples(task, "train"))).tolist()
        held_out = self._held_out.get(task, frozenset())
        return sorted([place for place in order if place not in held_out][:num_examples])

    def batches(
        self, task: str, split: Split = "train", *, batch_size: int | None = None
    ) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield all examples of a task in order, ``(inputs, labels)``, the same on every rank.

        Args:
            task: Name of the task.
            split: Which examples.
            batch_size: Examples per batch; None takes eval_batch_size.

        Raises:
            InputError: If there is no such task, or it has no such examples.
        """
        loader: DataLoader[Any] = DataLoader(
            cast("Any", self.examples(task, split)),
            batch_size=batch_size or self.eval_batch_size,
            collate_fn=self._tasks[task].collate,
            **self._loading(),
        )
        yield from loader

    def _collate(self) -> MixedCollate:
        return MixedCollate(list(self._tasks.items()))
