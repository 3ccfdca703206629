"""Text tasks from files, with a tiny tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.tasks import MultiTaskDataModule, TaskDataModule
from lit_merge.tasks.task import IGNORED
from lit_merge.tasks.text_task import TextTask

ROWS = [
    {"text": "a good film", "label": 1},
    {"text": "bad", "label": 0},
    {"text": "a very very good good film film", "label": 1},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "very"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def jsonl(path: Path, rows: list[dict[str, object]] = ROWS) -> str:  # type: ignore[assignment]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_texts_are_tokenised_and_padded_to_the_longest_of_the_batch(tmp_path, tokenizer):
    task = TextTask(jsonl(tmp_path / "x.jsonl"), tokenizer=tokenizer, num_classes=2)
    assert task.train is not None
    inputs, labels = task.collate([task.train[i] for i in range(3)])
    assert inputs["input_ids"].shape == (3, 9)
    assert inputs["attention_mask"].sum(1).tolist() == [5, 3, 9]
    assert inputs["input_ids"][0, 1:4].tolist() == [5, 6, 8]
    assert labels.tolist() == [1, 0, 1]


def test_long_texts_are_cut(tmp_path, tokenizer):
    task = TextTask(jsonl(tmp_path / "x.jsonl"), tokenizer=tokenizer, num_classes=2, max_length=4)
    assert task.train is not None
    assert [len(task.train[i][0]["input_ids"]) for i in range(3)] == [4, 3, 4]


def test_csv_and_tsv_give_the_same_as_jsonl(tmp_path, tokenizer):
    for name, mark in (("x.csv", ","), ("x.tsv", "\t")):
        lines = [f"text{mark}label", *(f"{row['text']}{mark}{row['label']}" for row in ROWS)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    examples = [
        TextTask(path, tokenizer=tokenizer, num_classes=2).train
        for path in (jsonl(tmp_path / "x.jsonl"), *(str(tmp_path / n) for n in ("x.csv", "x.tsv")))
    ]
    first, *others = [[one[i] for i in range(3)] for one in examples if one is not None]
    assert others == [first, first]


def test_pairs_are_joined_and_columns_can_be_named(tmp_path, tokenizer):
    rows = [{"question": "good film", "answer": "bad", "class": 2}]
    task = TextTask(
        test=jsonl(tmp_path / "x.jsonl", rows),
        tokenizer=tokenizer,
        num_classes=3,
        text_column="question",
        pair_column="answer",
        label_column="class",
    )
    assert task.test is not None
    tokens, label = task.test[0]
    assert tokens["input_ids"] == [2, 6, 8, 3, 7, 3]
    assert label == 2


def test_a_training_file_without_labels_is_taken_when_it_is_said(tmp_path, tokenizer):
    path = jsonl(tmp_path / "x.jsonl", [{"text": "good"}])
    task = TextTask(path, tokenizer=tokenizer, num_classes=2, unlabelled=True)
    assert task.train is not None
    assert task.train[0][1] == IGNORED
    with pytest.raises(InputError, match=r"must have the column 'label'; got text. .*unlabelled"):
        TextTask(path, tokenizer=tokenizer, num_classes=2).split("train")


def test_nothing_is_read_before_it_is_used(tokenizer):
    task = TextTask("/no/where.jsonl", tokenizer="/no/tokenizer", num_classes=2)
    with pytest.raises(InputError, match=r"/no/where.jsonl: the file given as train must exist"):
        task.split("train")


def test_two_tasks_fit_together_when_their_tokenizers_are_one(tokenizer):
    one, other = (TextTask(tokenizer=name, num_classes=2) for name in (tokenizer, "other"))
    assert one.input_format() == TextTask(tokenizer=tokenizer, num_classes=5).input_format()
    assert one.input_format() != other.input_format()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be a file with examples; got an empty one"),
        ('{"text": "a", "la', "must be a readable .jsonl file"),
        ('{"words": "a", "label": 1}\n', "must have the column 'text'; got words, label"),
        ('{"text": "a"}\n', "must have the column 'label'; got text. Set label_column"),
        ('{"text": "a", "label": 0}\n{"text": null, "label": 0}\n', "row 2: 'text' must be a text"),
        (
            '{"text": "a", "label": 0}\n{"text": "b", "label": 2}\n',
            r"row 2: the label must .* got 2",
        ),
        ('{"text": "a", "label": "pos"}\n', "row 1: the label must be an integer .* got 'pos'"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, tokenizer, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=f"bad.jsonl.*{message}"):
        TextTask(str(path), tokenizer=tokenizer, num_classes=2).split("train")


def test_other_kinds_of_files_are_refused(tmp_path, tokenizer):
    (tmp_path / "x.doc").write_text("text")
    with pytest.raises(InputError, match=r"x.doc: a file of texts must end in .jsonl.* got '.doc'"):
        TextTask(str(tmp_path / "x.doc"), tokenizer=tokenizer, num_classes=2).split("train")


def test_a_missing_tokenizer_is_named(tmp_path):
    path = jsonl(tmp_path / "x.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="tokenizer: must be a folder with a tokenizer"):
        TextTask(path, tokenizer=str(tmp_path / "empty"), num_classes=2).split("train")


def test_max_length_must_be_positive():
    with pytest.raises(InputError, match="max_length: must be at least 1; got 0"):
        TextTask(tokenizer="x", num_classes=2, max_length=0)


def test_real_data_are_read_when_they_are_there(tokenizer):
    folder = Path(__file__).parents[2] / "shared" / "data" / "text" / "trec"
    if not folder.is_dir():
        pytest.skip("the real data are not on this machine")
    task = TextTask(test=str(folder / "test.jsonl"), tokenizer=tokenizer, num_classes=6)
    assert task.test is not None
    assert len(task.test) == 500
    inputs, labels = task.collate([task.test[i] for i in range(8)])
    assert inputs["input_ids"].dtype == torch.int64
    assert labels.max() < 6


def test_a_test_batch_has_texts_of_like_length(tmp_path, tokenizer):
    counts = [2, 9, 1, 8, 3, 7]
    rows = [{"text": " ".join(["film"] * n), "label": n % 2} for n in counts]
    task = TextTask(test=jsonl(tmp_path / "x.jsonl", rows), tokenizer=tokenizer, num_classes=2)
    data = TaskDataModule(task, eval_batch_size=2)
    batches = [
        (inputs["attention_mask"].sum(1) - 2, labels) for inputs, labels in data.test_dataloader()
    ]
    assert [lengths.tolist() for lengths, _ in batches] == [[9, 8], [7, 3], [2, 1]]
    assert all(torch.equal(lengths % 2, labels) for lengths, labels in batches)
    loader = MultiTaskDataModule({"x": task}, eval_batch_size=4).test_dataloader()[0]
    assert [batch.index.tolist() for batch in loader] == [[1, 3, 5, 4], [0, 2]]


def test_a_text_is_tokenised_when_it_is_asked_for_and_once(tmp_path, tokenizer):
    task = TextTask(jsonl(tmp_path / "x.jsonl"), tokenizer=tokenizer, num_classes=2)
    assert task.train is not None
    made = task.tokenizer
    asked: list[str] = []

    def counting(text: str, **options: object) -> object:
        asked.append(text)
        return made(text, **options)

    task._tokenizer = counting
    examples = TextTask.load(task, "train")
    assert examples is not None
    assert asked == []
    assert examples[1] == examples[1]
    assert asked == ["bad"]
