"""A text classification task from files: one text and one class per row, tokenised once.

Files are read by Hugging Face ``datasets``: ``.jsonl`` and ``.json`` (one object per line),
``.csv``, ``.tsv`` and ``.parquet``. The tokens are cached by that library, so a second run starts
at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.tasks.task import (
    IGNORED,
    Examples,
    Split,
    Task,
    as_labels,
    check_labels,
    require_file,
)

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".parquet": ("parquet", {}),
}


class TextTask(Task):
    """Texts (or pairs of texts) and their classes.

    An input is what the tokenizer gives (``input_ids``, ``attention_mask``, …); a batch is padded
    to its longest text, so the attention mask says which tokens are real.

    Args:
        train: File with the training examples; None where there is none.
        validation: The same for validation; see also ``validation_fraction`` of :class:`Task`.
        test: The same for testing.
        tokenizer: Folder with the tokenizer, or its name on the Hugging Face hub.
        num_classes: Number of classes.
        max_length: Longer texts are cut to this many tokens.
        text_column: Column with the text.
        pair_column: Column with a second text (premise and hypothesis, question and answer); None
            for single texts.
        label_column: Column with the class, an integer from 0.
        **options: See :class:`Task`.

    Raises:
        InputError: At first use, if a file, a column, a text or a label is not as said above.
    """

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        *,
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
        self.files: dict[Split, str | None] = {
            "train": train,
            "validation": validation,
            "test": test,
        }
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
                    f"{self.tokenizer_name!r} ({_first_line(error)}). Give the folder of the base."
                ) from error
        return self._tokenizer

    def load(self, split: Split) -> Examples | None:
        """Read and tokenise a split; see :meth:`Task.load`."""
        if self.files[split] is None:
            return None
        path = require_file(str(self.files[split]), split)
        table = _read_table(path, split)
        columns = [c for c in (self.text_column, self.pair_column) if c is not None]
        for parameter, column in (
            ("text_column", self.text_column),
            ("pair_column", self.pair_column),
        ):
            if column is not None:
                _require_column(table, column, path, f"Set {parameter}")
                _require_texts(table[column], column, path)
        if split == "train" and self.unlabelled:
            labels = np.full(len(table), IGNORED, dtype=np.int64)
        else:
            fix = "Set label_column" + (", or unlabelled" if split == "train" else "")
            _require_column(table, self.label_column, path, fix)
            labels = check_labels(
                list(table[self.label_column]), self.num_classes, where=f"{path}, row {{row}}"
            )
        tokenizer, max_length = self.tokenizer, self.max_length

        def tokenise(batch: dict[str, list[str]]) -> dict[str, Any]:
            return dict(
                tokenizer(*(batch[c] for c in columns), truncation=True, max_length=max_length)
            )

        tokens = table.map(
            tokenise,
            batched=True,
            remove_columns=table.column_names,
            desc=f"Tokenising {path.name}",
        )
        return _TokenisedTexts(tokens, labels)

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> tuple[dict[str, Tensor], Tensor]:
        """Pad the texts to the longest; see :meth:`Task.collate`."""
        padded = self.tokenizer.pad([tokens for tokens, _ in examples], return_tensors="pt")
        return dict(padded), as_labels(label for _, label in examples)

    def input_format(self) -> Hashable:
        """Return which tokenizer made the inputs."""
        return ("text", self.tokenizer_name)

    def describe(self) -> str:
        """Return the kind of task and its first file."""
        return f"TextTask({next((f for f in self.files.values() if f), 'no files')})"


class _TokenisedTexts:
    def __init__(self, tokens: Any, labels: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self._tokens = tokens
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[dict[str, list[int]], int]:
        return self._tokens[index], int(self._labels[index])


def _read_table(path: Path, split: Split) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if path.suffix.lower() not in _READERS:
        raise InputError(
            f"{path}: a file of texts must end in {', '.join(_READERS)}; got "
            f"{path.suffix or 'no ending'!r}. Convert it."
        )
    if not path.is_file() or path.stat().st_size == 0:
        raise InputError(
            f"{path}: must be a file with examples; got an empty one. Check the {split} file."
        )
    reader, options = _READERS[path.suffix.lower()]
    try:
        return load_dataset(reader, data_files={split: str(path)}, split=split, **options)
    except (DatasetGenerationError, ValueError, TypeError, StopIteration) as error:
        reason = _first_line(error.__cause__ or error)
        raise InputError(
            f"{path}: must be a readable {path.suffix} file; got {reason}. Repair the file."
        ) from error


def _require_column(table: Any, column: str, path: Path, fix: str) -> None:
    if column not in table.column_names:
        raise InputError(
            f"{path}: must have the column {column!r}; got {', '.join(table.column_names)}. {fix}."
        )


def _require_texts(texts: Any, column: str, path: Path) -> None:
    for row, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise InputError(
                f"{path}, row {row}: {column!r} must be a text; got {text!r}. Correct or remove "
                "the row."
            )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
