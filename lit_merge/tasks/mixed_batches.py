"""Batches that hold examples of several tasks, the same for one process as for many.

A mixed batch goes through a merged model once. An epoch of T tasks takes max_len examples from
each, interleaved (example i of the epoch belongs to task i mod T), the shorter tasks being repeated
in a new random order each time round. Rank r of W gets the r-th part of every W·B consecutive
examples, so that the k-th batches of all ranks together are the k-th batch of one process with
batches of W·B. Where the last batch does not divide, ranks are filled up with duplicates marked as
not valid, which must not count in a loss or a metric.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lit_merge.errors import InputError
from lit_merge.tasks.task import IGNORED, Examples, Inputs, Task


class MergeBatch(NamedTuple):
    """B examples of one or several tasks.

    Attributes:
        inputs: A tensor ``[B, ...]`` or a mapping of them.
        labels: Classes, int64 ``[B]``, or ``[B, L]`` with one for every token; -100 where there is
            none.
        task: Index of each example's task in the data module's order, int64 ``[B]``.
        valid: Whether the example counts, bool ``[B]``; False for duplicates that fill up a rank.
        index: The example's place in its task's data set, int64 ``[B]``.
    """

    inputs: Inputs
    labels: Tensor
    task: Tensor
    valid: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index


class MixedExample(NamedTuple):
    """One example on its way into a :class:`MergeBatch`."""

    example: tuple[Any, Any]
    task: int
    valid: bool
    place: int


class MixedTasks(Dataset[MixedExample]):
    """The examples of several tasks one after the other; ``~i`` is example i, not valid.

    Args:
        parts: Task index and examples of each task.
        without: Places of the examples to leave out, by task index.
        lengths: How long the examples of a task are, by task index: the longest come first, so that
            a batch has examples of like length. A task without them keeps its order.
    """

    def __init__(
        self,
        parts: Sequence[tuple[int, Examples]],
        *,
        without: Mapping[int, Collection[int]] | None = None,
        lengths: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self.parts = tuple(parts)
        self._places = []
        for task, examples in self.parts:
            left_out = [*(without or {}).get(task, ())]
            order = np.arange(len(examples))
            if lengths is not None and task in lengths:
                order = np.argsort(-np.asarray(lengths[task]), kind="stable")
            self._places.append(order[~np.isin(order, left_out)])
        self.lengths = tuple(map(len, self._places))
        self.offsets = np.cumsum([0, *self.lengths])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, index: int) -> MixedExample:
        valid = index >= 0
        flat = index if valid else ~index
        part = int(np.searchsorted(self.offsets, flat, side="right")) - 1
        task, examples = self.parts[part]
        place = int(self._places[part][flat - int(self.offsets[part])])
        return MixedExample(examples[place], task, valid, place)


class MixedTaskSampler(DistributedSampler[Any]):
    """The order of the examples of :class:`MixedTasks` on one of several ranks.

    Lightning leaves samplers of this family as they are and calls :meth:`set_epoch`.

    Args:
        dataset: The tasks' examples.
        batch_size: Examples per batch and rank, B.
        num_replicas: Number of ranks, W.
        rank: This rank.
        shuffle: New random order in each round of a task; False goes in order.
        seed: Seed of the orders, the same on all ranks.

    Attributes:
        start_batch: The next epoch begins after this many batches; 0 again once it has begun.
    """

    def __init__(
        self,
        dataset: MixedTasks,
        *,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.tasks = dataset
        self.batch_size = batch_size
        self.start_batch = 0
        total = max(dataset.lengths, default=0) * len(dataset.lengths)
        full, rest = divmod(total, batch_size * num_replicas)
        self.num_samples = full * batch_size + -(-rest // num_replicas)
        self.total_size = self.num_samples * num_replicas

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        order = self.epoch_order()
        step = self.batch_size * self.num_replicas
        begin, self.start_batch = self.start_batch * step, 0
        for start in range(begin, len(order), step):
            together = order[start : start + step]
            share = -(-len(together) // self.num_replicas)
            mine = together[self.rank * share : (self.rank + 1) * share].tolist()
            yield from mine
            yield from [~int(together[0])] * (share - len(mine))

    def epoch_order(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the epoch's examples in the order of one process, int64 ``[T · max_len]``."""
        longest = max(self.tasks.lengths)
        columns = [
            self._rounds(part, length, longest) + self.tasks.offsets[part]
            for part, length in enumerate(self.tasks.lengths)
        ]
        return np.stack(columns, axis=1).reshape(-1)

    def _rounds(self, part: int, length: int, total: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        if not self.shuffle:
            return np.resize(np.arange(length), total)
        rounds = [
            np.random.default_rng((self.seed, self.epoch, part, number)).permutation(length)
            for number in range(-(-total // length))
        ]
        return np.concatenate(rounds)[:total]


class MixedLoader(DataLoader[MergeBatch]):
    """A loader of mixed batches that continues in mid-epoch.

    Lightning stores :meth:`state_dict` in its checkpoints and restores it, so a fit that was broken
    off sees the same batches as one that was not.
    """

    def __init__(self, dataset: MixedTasks, *, sampler: MixedTaskSampler, **options: Any) -> None:
        super().__init__(
            cast("Any", dataset), batch_size=sampler.batch_size, sampler=sampler, **options
        )
        self._place = sampler
        self._yielded = 0

    def __iter__(self) -> Iterator[MergeBatch]:  # type: ignore[override]
        # A generator, so that nothing is sampled before the first batch is asked for: Lightning
        # calls iter() on the loader of a resumed fit before it has set the sampler's epoch.
        self._yielded = self._place.start_batch
        for batch in super().__iter__():
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of the epoch were given out."""
        return {"batches": self._yielded % max(len(self), 1)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next epoch after that many batches."""
        self._place.start_batch = state["batches"]


class MixedCollate:
    """Collate of mixed batches: the inputs by the tasks' common rule, the rest by itself.

    Args:
        tasks: The tasks by name, whose inputs have equal formats.
    """

    def __init__(self, tasks: Sequence[tuple[str, Task]]) -> None:
        self.tasks = tuple(tasks)

    def __call__(self, examples: Sequence[MixedExample]) -> MergeBatch:
        """Make a batch.

        Raises:
            InputError: If the inputs do not fit together, or a label is no class of its task.
        """
        try:
            inputs, labels = self.tasks[examples[0].task][1].collate(
                [one.example for one in examples]
            )
        except (RuntimeError, TypeError, KeyError) as error:
            names = sorted({self.tasks[one.task][0] for one in examples})
            raise InputError(
                f"tasks: the inputs of {', '.join(names)} must fit into one batch; got {error}. "
                "Give them the same shape and type."
            ) from error
        self._check(examples, labels.reshape(len(examples), -1))
        return MergeBatch(
            inputs,
            labels,
            torch.tensor([one.task for one in examples]),
            torch.tensor([one.valid for one in examples]),
            torch.tensor([one.place for one in examples]),
        )

    def _check(self, examples: Sequence[MixedExample], labels: Tensor) -> None:
        """Check labels ``[B, L]``."""
        limits = torch.tensor([self.tasks[one.task][1].num_classes for one in examples])
        wrong = ((labels < 0) | (labels >= limits[:, None])) & (labels != IGNORED)
        rows = wrong.any(1).nonzero().flatten().tolist()
        if rows:
            row, one = rows[0], examples[rows[0]]
            raise InputError(
                f"task {self.tasks[one.task][0]!r}: the label of example {one.place} must be in "
                f"[0, {int(limits[row])}); got {int(labels[row][wrong[row]][0])}. Correct it or "
                "num_classes."
            )


def without_invalid(labels: Tensor, valid: Tensor) -> Tensor:
    """Return labels with -100 in examples that must not count.

    Args:
        labels: int64 ``[B]`` or ``[B, L]``.
        valid: Whether each example counts, bool ``[B]``.
    """
    return labels.masked_fill(~valid.view(-1, *[1] * (labels.ndim - 1)), IGNORED)
