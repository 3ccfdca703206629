"""Several tasks as one: all of their examples, with their classes side by side.

What a common base is pretrained on, where no single data set is broad enough: with tasks of 10 and
242 classes, class c of the second is class 10 + c of the joined one.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any, cast

from torch import Tensor
from torch.utils.data import ConcatDataset

from lit_merge.errors import InputError
from lit_merge.tasks.task import IGNORED, Examples, Inputs, Split, Task


class JoinedTask(Task):
    """One task made of several.

    Args:
        tasks: At least one, with inputs of one format: they share batches.
        **options: See :class:`Task`; the number of classes is the sum of the tasks'.

    Raises:
        InputError: If there is no task; at first use, if their inputs differ in format.
    """

    def __init__(self, tasks: list[Task], **options: Any) -> None:
        if not tasks:
            raise InputError("tasks: must be at least one to join; got none. Name one.")
        super().__init__(num_classes=sum(task.num_classes for task in tasks), **options)
        self.tasks = list(tasks)

    def load(self, split: Split) -> Examples | None:
        """Return the tasks' examples one after the other, of those that have this split."""
        formats = {task.input_format(): task for task in self.tasks}
        if len(formats) > 1:
            (one, first), (two, second) = list(formats.items())[:2]
            raise InputError(
                f"tasks: must have inputs of one format to be joined; got {one} of "
                f"{first.describe()} and {two} of {second.describe()}. Prepare them alike."
            )
        starts = itertools.accumulate((task.num_classes for task in self.tasks), initial=0)
        parts = [
            _Moved(examples, start)
            for task, start in zip(self.tasks, starts, strict=False)  # the last start is the end
            if (examples := task.split(split)) is not None
        ]
        return ConcatDataset(cast("Any", parts)) if parts else None

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> tuple[Inputs, Tensor]:
        """Make one batch as the first task does; see :meth:`Task.collate`."""
        return self.tasks[0].collate(examples)

    def input_format(self) -> Hashable:
        """Return the format of the tasks."""
        return self.tasks[0].input_format()

    def describe(self) -> str:
        """Return what is joined."""
        return f"JoinedTask({', '.join(task.describe() for task in self.tasks)})"


class _Moved:
    """Examples whose labels begin at another number."""

    def __init__(self, examples: Examples, start: int) -> None:
        self._examples = examples
        self._start = start

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        inputs, label = self._examples[index]
        return inputs, int(label) if label == IGNORED else int(label) + self._start
