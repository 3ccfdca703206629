"""Texts as a task of a language model: to say the next token.

The texts of a split are tokenised and put one behind the other, each ended by the tokenizer's token
for the end of a text, and this row of tokens is cut into blocks of L = ``block_length``. An example
is a block and, as its L labels, the token that comes behind each of its tokens. The next block
begins where this one ends, so every token but the first is a label once; there is no padding, and
what is left at the end of the row makes no block. The mean over the labels of a batch is therefore
the mean over its examples as well, which is what curvature and metrics need of a loss.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.tasks.table import first_line, read_table, require_column, require_texts
from lit_merge.tasks.task import Examples, Split, Task

Tokens = np.ndarray[Any, np.dtype[np.int64]]


class LanguageTask(Task):
    """The next token of texts, measured by their perplexity.

    The number of classes is the number of tokens that the tokenizer knows.

    Args:
        train: File with the training texts, or with ``dataset`` the name of the split ("train",
            "train[:2000]"); None where there is none.
        validation: The same for validation; see also ``validation_fraction`` of :class:`Task`.
        test: The same for testing.
        dataset: A data set on the Hugging Face hub (``fancyzhx/ag_news``), or a local folder with
            ``train.jsonl``, ``test.jsonl``; None where the splits are files.
        dataset_config: Which configuration of the data set; None where it has only one.
        tokenizer: Folder with the tokenizer, or its name on the Hugging Face hub.
        block_length: L, the tokens of an example; at most the positions that the model has.
        text_column: Column with the text.
        where: Only rows with these values, by column: ``{label: 2}``, or ``{label: [0, 1]}`` for
            several. None takes all rows.
        validation_fraction: Share of the training blocks that is held out; see :class:`Task`.
        max_train_examples: Number of training blocks; None for all.
        max_eval_examples: The same for validation and test.
        seed: Seed of these choices.

    Raises:
        InputError: If an option is out of range; at first use, if a file, a column or a text is not
            as said above, no row is left, the texts are too short for one block, or the tokenizer
            has no token for the end of a text.
    """

    has_perplexity: ClassVar[bool] = True

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        *,
        dataset: str | None = None,
        dataset_config: str | None = None,
        tokenizer: str,
        block_length: int = 128,
        text_column: str = "text",
        where: dict[str, Any] | None = None,
        validation_fraction: float = 0.0,
        max_train_examples: int | None = None,
        max_eval_examples: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            num_classes=None,
            validation_fraction=validation_fraction,
            max_train_examples=max_train_examples,
            max_eval_examples=max_eval_examples,
            seed=seed,
        )
        if block_length < 2:
            raise InputError(f"block_length: must be at least 2; got {block_length}. 128 is usual.")
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
        self.labels_per_example = self.block_length = block_length
        self.text_column = text_column
        self.where = dict(where or {})
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded at first use."""
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self.tokenizer_name)
        return self._tokenizer

    @property
    def num_classes(self) -> int:
        """Number of tokens that the tokenizer knows."""
        return len(self.tokenizer)

    def misfit(self, width: int) -> str | None:
        """Return why a model with so many logits cannot say these tokens; see the base class.

        A model may have more than the tokenizer's tokens: many are padded to a round number.
        """
        if width >= self.num_classes:
            return None
        return (
            f"tokenizer must be the model's, which has {width} tokens; got {self.tokenizer_name!r} "
            f"with {self.num_classes}. Give the tokenizer that the model was trained with."
        )

    def load(self, split: Split) -> Examples | None:
        """Read, filter and tokenise a split, and cut it into blocks; see :meth:`Task.load`."""
        source = self.sources[split]
        if source is None:
            return None
        table, place = read_table(source, split, dataset=self.dataset, config=self.dataset_config)
        require_column(table, self.text_column, place, "Set text_column")
        for column, wanted in self.where.items():
            require_column(table, column, place, "Correct where")
            table = table.select(_rows_with(table[column], wanted, column=column, place=place))
        require_texts(table, self.text_column, place)
        tokens = self._tokens(table, place)
        blocks = _Blocks(tokens, self.block_length)
        if not len(blocks):
            raise InputError(
                f"{place}: the {split} texts must have more than block_length tokens, "
                f"{self.block_length}; got {len(tokens)}. Lower block_length, or give more texts."
            )
        return blocks

    def collate(self, examples: Sequence[tuple[Any, Any]]) -> tuple[dict[str, Tensor], Tensor]:
        """Make one batch.

        Args:
            examples: B pairs of a block and its labels.

        Returns:
            ``input_ids`` and the labels, both int64 ``[B, L]``.
        """
        inputs = torch.from_numpy(np.stack([block for block, _ in examples]))
        labels = torch.from_numpy(np.stack([label for _, label in examples]))
        return {"input_ids": inputs}, labels

    def input_format(self) -> Hashable:
        """Return which tokenizer made the inputs, and how long they are."""
        return ("language", self.tokenizer_name, self.block_length)

    def describe(self) -> str:
        """Return the kind of task and its data set or first file."""
        first = next((source for source in self.sources.values() if source), "no files")
        return f"LanguageTask({self.dataset or first})"

    def _tokens(self, table: Any, place: str) -> Tokens:
        """Return the texts' tokens in one row, int64 ``[N]``."""
        tokenizer, column, end = self.tokenizer, self.text_column, self.tokenizer.eos_token_id
        if end is None:
            raise InputError(
                f"tokenizer: must have a token for the end of a text (eos_token); got "
                f"{self.tokenizer_name!r} without one. Give a language model's tokenizer."
            )

        def tokenise(batch: Mapping[str, list[str]]) -> dict[str, Any]:
            # Neither the marks of single texts nor the warning of texts that are too long: these
            # are cut into blocks.
            made = tokenizer(batch[column], add_special_tokens=False, verbose=False)
            return {"tokens": [[*tokens, end] if tokens else [] for tokens in made["input_ids"]]}

        made = table.map(
            tokenise,
            batched=True,
            remove_columns=table.column_names,
            desc=f"Tokenising {place}",
        )
        return np.fromiter(chain.from_iterable(made["tokens"]), dtype=np.int64)


class _Blocks:
    """A row of tokens in blocks of L, with the token behind each token as its label."""

    def __init__(self, tokens: Tokens, length: int) -> None:
        self._tokens = tokens
        self._length = length

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1) // self._length

    def __getitem__(self, index: int) -> tuple[Tokens, Tokens]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self._length
        stop = start + self._length
        return self._tokens[start:stop], self._tokens[start + 1 : stop + 1]


def _rows_with(values: Sequence[Any], wanted: Any, *, column: str, place: str) -> Tokens:
    """Return the places of the rows whose value is one of those wanted.

    Raises:
        InputError: If there is none.
    """
    listed = wanted if isinstance(wanted, list | tuple) else [wanted]
    kept = np.flatnonzero([value in listed for value in values])
    if not len(kept):
        found = ", ".join(sorted({repr(value) for value in values})[:8])
        raise InputError(
            f"{place}: must have a row where {column} is {wanted!r}; got {found}. Correct where."
        )
    return kept


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"tokenizer: must be a folder with a tokenizer or a name on the hub; got {name!r} "
            f"({first_line(error)}). Give the folder of the base."
        ) from error
