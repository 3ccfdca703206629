"""Tables of examples: a file, or a split of a data set on the Hugging Face hub.

``datasets`` reads all of them. A file is ``.jsonl`` or ``.json`` (one object per line), ``.csv``,
``.tsv`` or ``.parquet``. A data set is a name on the hub, such as ``SetFit/sst2``, which is loaded
once and then comes from that library's cache; or a local folder that is laid out like one:
``data/imdb`` with ``train.jsonl`` and ``test.jsonl``, or images as ``train/<class>/*.png``. Its
splits are named as ``datasets`` names them: ``train``, ``validation``, or a part, ``train[:2000]``.
Many published sets are sorted by class, so that a part of the front holds one class alone;
``max_train_examples`` of a task takes a random subset instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lit_merge.errors import InputError
from lit_merge.tasks.task import Split, check_labels, require_file

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".parquet": ("parquet", {}),
}
_TEXT = ("string", "large_string")


def read_table(
    source: str, split: Split, *, dataset: str | None = None, config: str | None = None
) -> tuple[Any, str]:
    """Return the rows of a split, a table of ``datasets``, and what an error message calls them.

    Args:
        source: The file; with ``dataset`` the name of the split there.
        split: Which split of the task it is to be.
        dataset: Name on the hub, or a local folder; None for a file.
        config: Which of the data set's configurations; None where it has only one.

    Raises:
        InputError: If it is not there or cannot be read, or the hub cannot be reached.
    """
    if dataset is not None:
        return _read_split(dataset, config, source), f"{dataset} ({source})"
    path = require_file(source, split)
    return _read_file(path, split), str(path)


def _read_split(dataset: str, config: str | None, source: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(dataset, config, split=source)
    except ConnectionError as error:
        raise InputError(
            f"dataset: must be a folder here, or a data set on a hub that can be reached; got "
            f"{dataset!r} ({first_line(error)}). Connect to the internet once, so that it is "
            "cached, or give a local folder with train.jsonl and test.jsonl."
        ) from error
    except (DatasetsError, OSError, ValueError, RuntimeError, TypeError) as error:
        reason = first_line(error.__cause__ or error)
        raise InputError(
            f"dataset: must be a readable data set with the split {source!r}; got {dataset!r}"
            f"{'' if config is None else f', configuration {config!r}'} ({reason}). Check the "
            "name; dataset_config chooses among several configurations."
        ) from error


def _read_file(path: Path, split: Split) -> Any:
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
        reason = first_line(error.__cause__ or error)
        raise InputError(
            f"{path}: must be a readable {path.suffix} file; got {reason}. Repair the file."
        ) from error


def require_column(table: Any, column: str, where: str, fix: str) -> None:
    """Check that a table has a column.

    Raises:
        InputError: If not, with the columns that it has.
    """
    if column not in table.column_names:
        raise InputError(
            f"{where}: must have the column {column!r}; got {', '.join(table.column_names)}. {fix}."
        )


def require_texts(table: Any, column: str, where: str) -> None:
    """Check that every entry of a column is a text.

    Raises:
        InputError: Naming the first that is none.
    """
    if table.features[column].dtype in _TEXT and not table.data.column(column).null_count:
        return  # a set of millions needs no look at each
    for row, text in enumerate(table[column], start=1):
        if not isinstance(text, str):
            raise InputError(
                f"{where}, row {row}: {column!r} must be a text; got {text!r}. Correct or remove "
                "the row."
            )


def read_labels(
    table: Any, column: str, num_classes: int, where: str
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return a table's classes, int64 ``[N]``.

    Args:
        table: The split.
        column: A column of integers, or of class labels of ``datasets``.
        num_classes: Number of classes of the task.
        where: What the message calls the split.

    Raises:
        InputError: If the labels are hidden, are texts, or are no classes of the task.
    """
    from datasets import ClassLabel

    kind = table.features[column]
    if isinstance(kind, ClassLabel) and kind.num_classes != num_classes:
        raise InputError(
            f"{where}: {column!r} must have {num_classes} classes; got {kind.num_classes}: "
            f"{', '.join(kind.names[:10])}. Correct num_classes."
        )
    labels = list(table[column])
    if labels and all(label == -1 for label in labels):
        raise InputError(
            f"{where}: {column!r} must hold classes; got -1 everywhere, which stands for labels "
            "that were not published. Take another split, such as validation."
        )
    if any(isinstance(label, str) for label in labels):
        names = sorted({str(label) for label in labels})
        raise InputError(
            f"{where}, row 1: the label must be an integer in [0, {num_classes}); got "
            f"{labels[0]!r} (in all: {', '.join(names[:10])}). Number the classes from 0, or set "
            "label_column to a column of numbers."
        )
    return check_labels(labels, num_classes, where=f"{where}, row {{row}}")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
