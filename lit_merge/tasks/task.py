"""Where the examples of a task come from: files of text, arrays of images, data sets in memory.

A :class:`Task` is what one expert was trained for: its classes and its training, validation and
test examples. An example is a pair ``(input, label)``; ``collate`` makes of several examples one
batch ``(inputs, labels)``, where inputs is a tensor ``[B, ...]`` or a mapping of tensors (the
keyword arguments of a transformers model) and labels is a LongTensor ``[B]``. Everything is loaded
at first use, so a task costs nothing where it is only configured, and all arguments are primitives,
so a task can be written in YAML.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, default_collate

from lit_merge.errors import InputError

IGNORED = -100
"""The label of an example that has none or must not count; losses and metrics skip it."""

Split = Literal["train", "validation", "test"]
Inputs = Any
"""One batch of inputs: a tensor, or a mapping of tensors."""


class Examples(Protocol):
    """A map-style data set of ``(input, label)`` pairs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


class Task(ABC):
    """The classes and the examples of one task.

    A task of one's own implements :meth:`load`, and :meth:`collate` where torch's default does not
    do.

    Args:
        num_classes: Number of classes; the labels are integers in [0, num_classes). None for a kind
            of task that overrides :attr:`num_classes`.
        validation_fraction: Share of the training examples that is held out for validation where
            there is no validation split, in [0, 1); a seeded choice that does not change between
            runs.
        max_train_examples: Use a seeded random subset of this size of the training split (after the
            validation examples were taken); None uses all.
        max_eval_examples: The same for validation and test.
        unlabelled: The training split has no labels: enough for calibration and distillation, not
            for training on labels.
        seed: Seed of these choices.

    Attributes:
        labels_per_example: How many labels an example has: one, or one for every token.
        has_perplexity: Whether the labels are the tokens of a text, so that exp of their mean
            negative log-likelihood is its perplexity.

    Raises:
        InputError: If an option is out of range.
    """

    labels_per_example: int = 1
    has_perplexity: ClassVar[bool] = False

    def __init__(
        self,
        *,
        num_classes: int | None,
        validation_fraction: float = 0.0,
        max_train_examples: int | None = None,
        max_eval_examples: int | None = None,
        unlabelled: bool = False,
        seed: int = 0,
    ) -> None:
        if num_classes is not None and num_classes < 2:
            raise InputError(
                f"num_classes: must be at least 2; got {num_classes}. "
                "A two-class task has two logits here."
            )
        if not 0.0 <= validation_fraction < 1.0:
            raise InputError(
                f"validation_fraction: must be in [0, 1); got {validation_fraction}. "
                "0.1 holds out a tenth of the training examples."
            )
        if unlabelled and validation_fraction:
            raise InputError(
                f"validation_fraction: must be 0 for unlabelled training examples; got "
                f"{validation_fraction}. Give a validation split with labels."
            )
        for name, limit in (
            ("max_train_examples", max_train_examples),
            ("max_eval_examples", max_eval_examples),
        ):
            if limit is not None and limit < 1:
                raise InputError(
                    f"{name}: must be at least 1; got {limit}. Leave it out to use all."
                )
        self._num_classes = num_classes
        self.validation_fraction = validation_fraction
        self.max_train_examples = max_train_examples
        self.max_eval_examples = max_eval_examples
        self.unlabelled = unlabelled
        self.seed = seed
        self._whole: dict[Split, Examples | None] = {}
        self._chosen: dict[Split, Examples | None] = {}

    @abstractmethod
    def load(self, split: Split) -> Examples | None:
        """Return all examples of a split; None where the task has no such split."""

    @property
    def num_classes(self) -> int:
        """Number of classes; the labels are integers in [0, num_classes)."""
        assert self._num_classes is not None, "a kind of task without it overrides this"
        return self._num_classes

    def misfit(self, width: int) -> str | None:
        """Return why a model with so many logits cannot do this task; None where it can."""
        if width == self.num_classes:
            return None
        return (
            f"num_classes must be the width of its head, {width}; got {self.num_classes}. Correct "
            "num_classes, or give the expert of this task."
        )

    @property
    def train(self) -> Examples | None:
        """The training examples."""
        return self.split("train")

    @property
    def validation(self) -> Examples | None:
        """The validation examples."""
        return self.split("validation")

    @property
    def test(self) -> Examples | None:
        """The test examples."""
        return self.split("test")

    def split(self, split: Split) -> Examples | None:
        """Return the examples of a split after the limits and the held-out share, loaded once.

        Raises:
            InputError: If there is no such kind of split, or it has no examples.
        """
        if split not in get_args(Split):
            raise InputError(f"split: must be train, validation or test; got {split!r}. Check it.")
        if split not in self._chosen:
            examples = self._choose(split)
            if examples is not None and len(examples) == 0:
                raise InputError(
                    f"{self.describe()}: the {split} split must have examples; got none. "
                    "Check the file, or leave the split out."
                )
            self._chosen[split] = examples
        return self._chosen[split]

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> tuple[Inputs, Tensor]:
        """Make one batch of several examples.

        Args:
            examples: B pairs (input, label).

        Returns:
            The inputs, a tensor ``[B, ...]`` or a mapping of them, and the labels, int64 ``[B]``;
            ``[B, L]`` where an example has L labels.
        """
        inputs = default_collate([example[0] for example in examples])
        return inputs, as_labels(example[1] for example in examples)

    def lengths(self, examples: Examples) -> Sequence[int] | None:
        """Return how long each of some examples is, where a batch is padded to its longest.

        Evaluation makes batches of examples of like length with it. None where all are equal.
        """
        return None

    def input_format(self) -> Hashable:
        """What an input looks like: tasks with equal formats can share one batch."""
        return type(self).__qualname__

    def describe(self) -> str:
        """What an error message calls this task."""
        return type(self).__name__

    def _load_once(self, split: Split) -> Examples | None:
        if split not in self._whole:
            self._whole[split] = self.load(split)
        return self._whole[split]

    def _choose(self, split: Split) -> Examples | None:
        examples = self._load_once(split)
        if split == "test":
            return _subset(examples, self.max_eval_examples, self.seed)
        if self.validation_fraction and self._load_once("validation") is None:
            everything = self._load_once("train")
            if everything is None:
                return None
            order = np.random.default_rng(self.seed).permutation(len(everything))
            held_out = round(len(everything) * self.validation_fraction)
            chosen = order[:held_out] if split == "validation" else order[held_out:]
            examples = cast("Examples", Subset(cast("Any", everything), sorted(chosen.tolist())))
        limit = self.max_train_examples if split == "train" else self.max_eval_examples
        return _subset(examples, limit, self.seed)


class DatasetTask(Task):
    """A task whose examples are data sets in memory or of another library.

    Args:
        train: Map-style data set of (input, label) pairs; None where there is none.
        validation: The same for validation.
        test: The same for testing.
        collate: Makes (inputs, labels) of a list of examples; None stacks tensors and mappings of
            tensors.
        **options: See :class:`Task`: num_classes and the others.
    """

    def __init__(
        self,
        train: Examples | None = None,
        validation: Examples | None = None,
        test: Examples | None = None,
        *,
        collate: Callable[[Sequence[tuple[Any, Any]]], tuple[Inputs, Tensor]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._datasets: dict[Split, Examples | None] = {
            "train": train,
            "validation": validation,
            "test": test,
        }
        self._collate = collate

    def load(self, split: Split) -> Examples | None:
        """Return the data set that was given."""
        return self._datasets[split]

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> tuple[Inputs, Tensor]:
        """Make one batch by the rule that was given; see :meth:`Task.collate`."""
        return super().collate(examples) if self._collate is None else self._collate(examples)

    def input_format(self) -> Hashable:
        """Return shape and type of the first input, or the rule for batches."""
        if self._collate is not None:
            return ("collate", self._collate)
        for dataset in self._datasets.values():
            if dataset is not None and len(dataset):
                return _format_of(dataset[0][0])
        return type(self).__qualname__


def as_labels(labels: Any) -> Tensor:
    """Return labels, an iterable of integers, as an int64 tensor ``[B]``."""
    return torch.as_tensor([int(label) for label in labels], dtype=torch.int64)


def check_labels(
    labels: Sequence[Any] | np.ndarray[Any, Any], num_classes: int, *, where: str
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return labels as int64 after checking that each is an integer in [0, num_classes).

    Args:
        labels: N labels.
        num_classes: Number of classes of the task.
        where: What the message calls an entry, with ``{row}`` for its number counted from 1.

    Raises:
        InputError: Naming the first entry that is no such integer.
    """
    values = np.asarray(labels)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        for row, label in enumerate(labels, start=1):
            if isinstance(label, bool | np.bool_) or not isinstance(label, int | np.integer):
                raise InputError(
                    f"{where.format(row=row)}: the label must be an integer in [0, {num_classes}); "
                    f"got {label!r}. Number the classes from 0."
                )
    wrong = np.flatnonzero((values < 0) | (values >= num_classes))
    if wrong.size:
        raise InputError(
            f"{where.format(row=int(wrong[0]) + 1)}: the label must be an integer in "
            f"[0, {num_classes}); got {int(values[wrong[0]])}. Correct it or num_classes."
        )
    return values.astype(np.int64)


def require_file(path: str | Path, parameter: str) -> Path:
    """Return the path of an existing file or folder.

    Raises:
        InputError: If there is nothing at the path.
    """
    found = Path(path)
    if not found.exists():
        raise InputError(
            f"{found}: the file given as {parameter} must exist; got no such file. "
            "Check the path; a relative one starts at the working directory."
        )
    return found


def _format_of(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), _format_of(item)) for key, item in value.items()))
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), str(value.dtype))
    return type(value).__qualname__


def _subset(examples: Examples | None, limit: int | None, seed: int) -> Examples | None:
    if examples is None or limit is None or limit >= len(examples):
        return examples
    chosen = np.random.default_rng(seed).permutation(len(examples))[:limit]
    return cast("Examples", Subset(cast("Any", examples), sorted(chosen.tolist())))
