"""A text classification task: one text and one class per row.

The rows come from files or from a data set on the Hugging Face hub (:mod:`lit_merge.tasks.table`).
A text is tokenised when it is first asked for: of a set of millions, only those that are used.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.tasks.table import first_line, read_labels, read_table, require_column, require_texts
from lit_merge.tasks.task import IGNORED, Examples, Split, Task, as_labels


class TextTask(Task):
    """Texts (or pairs of texts) and their classes.

    An input is what the tokenizer gives (``input_ids``, ``attention_mask``, …); a batch is padded
    to its longest text, so the attention mask says which tokens are real.

    Args:
        train: File with the training examples, or with ``dataset`` the name of the split
            ("train", "train[:2000]"); None where there is none.
        validation: The same for validation; see also ``validation_fraction`` of :class:`Task`.
        test: The same for testing.
        dataset: A data set on the Hugging Face hub (``SetFit/sst2``), or a local folder with
            ``train.jsonl``, ``test.jsonl``; None where the splits are files.
        dataset_config: Which configuration of the data set; None where it has only one.
        tokenizer: Folder with the tokenizer, or its name on the Hugging Face hub.
        num_classes: Number of classes.
        max_length: Longer texts are cut to this many tokens.
        text_column: Column with the text.
        pair_column: Column with a second text (premise and hypothesis, question and answer); None
            for single texts.
        label_column: Column with the class: an integer from 0, or a class label of ``datasets``.
        **options: See :class:`Task`.

    Raises:
        InputError: If an option is out of range; at first use, if a file, a data set, a column, a
            text or a label is not as said above.
    """

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        *,
        dataset: str | None = None,
        dataset_config: str | None = None,
        tokenizer: str,
        num_classes: int,
        max_length: int = 128,
        text_column: str = "text",
        pair_column: str | None = None,
        label_column: str = "label",
        **options: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, **options)
        if max_length < 1:
            raise InputError(f"max_length: must be at least 1; got {max_length}. 128 is usual.")
        if dataset_config is not None and dataset is None:
            raise InputError(
                f"dataset_config: must be left out without dataset; got {dataset_config!r}. Give "
                "the data set's name."
            )
        self.sources: dict[Split, str | None] = {
            "train": train,
            "validation": validation,
            "test": test,
        }
        self.dataset = dataset
        self.dataset_config = dataset_config
        self.tokenizer_name = tokenizer
        self.max_length = max_length
        self.text_column = text_column
        self.pair_column = pair_column
        self.label_column = label_column
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded at first use."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name)
            except (OSError, ValueError) as error:
                raise InputError(
                    f"tokenizer: must be a folder with a tokenizer or a name on the hub; got "
                    f"{self.tokenizer_name!r} ({first_line(error)}). Give the folder of the base."
                ) from error
        return self._tokenizer

    def load(self, split: Split) -> Examples | None:
        """Read and tokenise a split; see :meth:`Task.load`."""
        source = self.sources[split]
        if source is None:
            return None
        table, where = read_table(source, split, dataset=self.dataset, config=self.dataset_config)
        columns = [c for c in (self.text_column, self.pair_column) if c is not None]
        for parameter, column in (
            ("text_column", self.text_column),
            ("pair_column", self.pair_column),
        ):
            if column is not None:
                require_column(table, column, where, f"Set {parameter}")
                require_texts(table, column, where)
        if split == "train" and self.unlabelled:
            labels = np.full(len(table), IGNORED, dtype=np.int64)
        else:
            fix = "Set label_column" + (", or unlabelled" if split == "train" else "")
            require_column(table, self.label_column, where, fix)
            labels = read_labels(table, self.label_column, self.num_classes, where)
        tokenizer, max_length = self.tokenizer, self.max_length

        def tokenise(row: dict[str, str]) -> dict[str, list[int]]:
            return dict(
                tokenizer(*(row[c] for c in columns), truncation=True, max_length=max_length)
            )

        return _TokenisedTexts(table.select_columns(columns), tokenise, labels)

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> tuple[dict[str, Tensor], Tensor]:
        """Pad the texts to the longest; see :meth:`Task.collate`."""
        padded = self.tokenizer.pad([tokens for tokens, _ in examples], return_tensors="pt")
        return dict(padded), as_labels(label for _, label in examples)

    def lengths(self, examples: Examples) -> Sequence[int]:
        """Return the texts' numbers of tokens; see :meth:`Task.lengths`."""
        return [len(examples[i][0]["input_ids"]) for i in range(len(examples))]

    def input_format(self) -> Hashable:
        """Return which tokenizer made the inputs."""
        return ("text", self.tokenizer_name)

    def describe(self) -> str:
        """Return the kind of task and its data set or first file."""
        first = next((source for source in self.sources.values() if source), "no files")
        return f"TextTask({self.dataset or first})"


class _TokenisedTexts:
    def __init__(
        self,
        texts: Any,
        tokenise: Callable[[dict[str, str]], dict[str, list[int]]],
        labels: np.ndarray[Any, np.dtype[np.int64]],
    ) -> None:
        self._texts = texts
        self._tokenise = tokenise
        self._labels = labels
        self._tokens: dict[int, dict[str, list[int]]] = {}

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[dict[str, list[int]], int]:
        if index not in self._tokens:
            self._tokens[index] = self._tokenise(self._texts[index])
        return self._tokens[index], int(self._labels[index])
