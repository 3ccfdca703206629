from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lit_merge.errors import InputError
from lit_merge.tasks import LanguageTask, MultiTaskDataModule, TaskDataModule
from tests.tiny_language import SIZE, tiny_task, write_tokenizer


def row_of_tokens(task: LanguageTask, file: str, *, label: int | None = None) -> list[int]:
    """Return the tokens of a file one text at a time, as a reader of the docstring would."""
    tokenizer = AutoTokenizer.from_pretrained(task.tokenizer_name)
    row: list[int] = []
    for line in Path(file).read_text().splitlines():
        content = json.loads(line)
        if label is None or content["label"] == label:
            row += [*tokenizer.encode(content["text"]), tokenizer.eos_token_id]
    return row


@pytest.mark.parametrize("length", [2, 8, 11])
def test_blocks_are_the_row_of_tokens_and_labels_the_tokens_behind(
    tmp_path: Path, length: int
) -> None:
    task = tiny_task(tmp_path, block_length=length)
    row = row_of_tokens(task, str(tmp_path / "train.jsonl"))
    assert task.train is not None
    assert len(task.train) == (len(row) - 1) // length
    for index in range(len(task.train)):
        block, labels = task.train[index]
        start = index * length
        assert block.tolist() == row[start : start + length]
        assert labels.tolist() == row[start + 1 : start + length + 1]
    assert task.labels_per_example == length


def test_where_takes_rows_by_value(tmp_path: Path) -> None:
    for wanted in (1, [1], [1, 7]):
        task = tiny_task(tmp_path, where={"label": wanted})
        row = row_of_tokens(task, str(tmp_path / "train.jsonl"), label=1)
        assert task.train is not None
        assert task.train[0][0].tolist() == row[:8]
        assert len(task.train) == (len(row) - 1) // 8


def test_a_folder_is_a_data_set_and_its_splits_have_names(tmp_path: Path) -> None:
    by_file = tiny_task(tmp_path)
    folder = {"dataset": str(tmp_path), "train": "train", "test": "test"}
    by_name = LanguageTask(**folder, tokenizer=by_file.tokenizer_name, block_length=8)
    assert by_file.test is not None
    assert by_name.test is not None
    assert len(by_name.test) == len(by_file.test)
    assert all((by_name.test[i][0] == by_file.test[i][0]).all() for i in range(len(by_file.test)))
    assert by_name.describe() == f"LanguageTask({tmp_path})"


def test_an_empty_text_has_no_tokens(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    full = row_of_tokens(task, str(tmp_path / "train.jsonl"))
    file = tmp_path / "gaps.jsonl"
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    file.write_text("\n".join(line + '\n{"text": "", "label": 0}' for line in lines))
    gaps = tiny_task(tmp_path, train=str(file), block_length=2).train
    assert gaps is not None
    assert [token for block, _ in gaps for token in block] == full[: 2 * len(gaps)]


def test_a_batch_is_stacked_and_needs_no_mask(tmp_path: Path) -> None:
    task = tiny_task(tmp_path, max_train_examples=5, validation_fraction=0.2)
    assert task.train is not None
    assert task.validation is not None
    assert len(task.train) == 5
    inputs, labels = task.collate([task.train[i] for i in range(3)])
    assert list(inputs) == ["input_ids"]
    assert inputs["input_ids"].shape == labels.shape == (3, 8)
    assert inputs["input_ids"].dtype == labels.dtype == torch.int64
    assert torch.equal(inputs["input_ids"][:, 1:], labels[:, :-1])


def test_classes_are_the_tokens_of_the_tokenizer(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    assert task.num_classes == len(AutoTokenizer.from_pretrained(task.tokenizer_name))
    assert task.misfit(SIZE) is None  # a padded vocabulary
    assert "tokenizer must be the model's, which has 5 tokens" in str(task.misfit(5))


def test_evaluation_batches_fill_up_with_labels_that_do_not_count(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    data = MultiTaskDataModule({"a": task, "b": task}, batch_size=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.labels.shape == (4, 8)
    single = TaskDataModule(task, batch_size=2)
    single.setup("test")
    assert task.test is not None
    labels = torch.cat([labels for _, labels in single.test_dataloader()])
    assert labels.tolist() == [task.test[i][1].tolist() for i in range(len(task.test))]


def test_tasks_of_other_block_lengths_share_no_batch(tmp_path: Path) -> None:
    tasks = {"a": tiny_task(tmp_path), "b": tiny_task(tmp_path, block_length=4)}
    with pytest.raises(InputError, match="inputs must have one format"):
        MultiTaskDataModule(tasks).setup("fit")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 1}, "block_length: must be at least 2; got 1"),
        ({"dataset_config": "x"}, "dataset_config: must be left out without dataset; got 'x'"),
        ({"block_length": 5000}, "must have more than block_length tokens, 5000; got"),
        ({"where": {"label": 9}}, r"must have a row where label is 9; got 0, 1\. Correct where"),
        ({"where": {"topic": 0}}, "must have the column 'topic'; got text, label. Correct where"),
        ({"text_column": "body"}, "must have the column 'body'; got text, label. Set text_column"),
        ({"tokenizer": "no/such/folder"}, "tokenizer: must be a folder with a tokenizer or a name"),
    ],
)
def test_what_is_no_language_task_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        _ = tiny_task(tmp_path, **options).train


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    task = tiny_task(tmp_path)
    folder = Path(write_tokenizer(tmp_path / "endless", [str(tmp_path / "train.jsonl")]))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    endless = LanguageTask(**task.sources, tokenizer=str(folder))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"must have a token for the end of a text \(eos_token\)"):
        _ = endless.train
