"""Splits of data sets on the hub, tried on local folders that are laid out like them."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from lit_merge.errors import InputError
from lit_merge.tasks.image_task import ImageTask
from lit_merge.tasks.table import read_labels, read_table
from lit_merge.tasks.task import IGNORED
from lit_merge.tasks.text_task import TextTask
from tests.tiny_texts import tokenizer_in


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def films(tmp_path: Path) -> str:
    folder = tmp_path / "films"
    folder.mkdir()
    for split, count in (("train", 6), ("test", 3)):
        rows = [{"text": f"{split} {i}", "label": i % 2} for i in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return str(folder)


def test_a_split_and_a_part_of_it_are_read_by_name(films):
    assert read_table("test", "test", dataset=films)[0]["text"][:] == ["test 0", "test 1", "test 2"]
    part, where = read_table("train[2:4]", "train", dataset=films)
    assert part["text"][:] == ["train 2", "train 3"]
    assert where == f"{films} (train[2:4])"


def test_a_data_set_gives_a_text_task_what_its_files_give(films, tmp_path):
    settings = {"tokenizer": tokenizer_in(tmp_path / "tokenizer"), "num_classes": 2}
    files = TextTask(f"{films}/train.jsonl", test=f"{films}/test.jsonl", **settings)
    named = TextTask("train", test="test", dataset=films, **settings)
    for split in ("train", "test"):
        one, other = files.split(split), named.split(split)
        assert one is not None
        assert other is not None
        assert [one[i] for i in range(len(one))] == [other[i] for i in range(len(other))]
    assert named.validation is None
    assert named.describe() == f"TextTask({films})"


def test_a_configuration_is_chosen_by_its_name(tmp_path):
    for name in ("easy", "hard"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name, "label": 0}) + "\n")
    names = "".join(f"- config_name: {n}\n  data_files: {n}.jsonl\n" for n in ("easy", "hard"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{names}---\n")
    table, _ = read_table("train", "train", dataset=str(tmp_path), config="hard")
    assert table["text"][:] == ["hard"]
    with pytest.raises(InputError, match=r"Config name is missing.*dataset_config chooses"):
        read_table("train", "train", dataset=str(tmp_path))


def test_a_data_set_of_images_is_read_with_its_classes(tmp_path):
    tmp_path = tmp_path / "images"
    for split, count in (("train", 2), ("test", 1)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("L", (6, 6), 255 * label)
                image.save(tmp_path / split / name / f"{i}.png")
    settings = {"num_classes": 2, "image_size": 6, "channels": 1, "mean": [0.0], "std": [1.0]}
    named = ImageTask(dataset=str(tmp_path), **settings)
    folder = ImageTask(str(tmp_path), **settings)
    assert named.validation is None
    for split in ("train", "test"):
        one, other = named.split(split), folder.split(split)
        assert one is not None
        assert other is not None
        assert len(one) == len(other)
        for i in range(len(one)):
            assert one[i][1] == other[i][1] == int(one[i][0].mean())
            assert one[i][0].equal(other[i][0])
    unlabelled = ImageTask(dataset=str(tmp_path), unlabelled=True, **settings).train
    assert unlabelled is not None
    assert unlabelled[0][1] == IGNORED
    with pytest.raises(InputError, match=r"'label' must have 3 classes; got 2: cat, dog. Correct"):
        ImageTask(dataset=str(tmp_path), num_classes=3, image_size=6).split("test")
    with pytest.raises(InputError, match=r"the column 'img'; got image, label. Set image"):
        ImageTask(dataset=str(tmp_path), image_column="img", **settings).split("test")
    with pytest.raises(InputError, match=r"'label' must hold images; got ClassLabel.*Set im"):
        ImageTask(dataset=str(tmp_path), image_column="label", **settings).split("test")
    with pytest.raises(InputError, match="image_size: must be set for the images of"):
        ImageTask(dataset=str(tmp_path), num_classes=2).split("test")


def test_one_of_path_and_data_set_is_needed():
    with pytest.raises(InputError, match=r"path: must be given, or dataset .* got neither"):
        ImageTask(num_classes=2)
    with pytest.raises(InputError, match=r"path: must be given, or dataset .* got both"):
        ImageTask("x.npz", dataset="ylecun/mnist", num_classes=2)
    with pytest.raises(InputError, match=r"dataset_config: must be left out without dataset"):
        TextTask("x.jsonl", dataset_config="sst2", tokenizer="x", num_classes=2)


@pytest.mark.parametrize(
    ("split", "config", "message"),
    [
        ("dev", None, r"with the split 'dev'; got '.*films' \(Unknown split \"dev\".*train"),
        ("train[oops]", None, r"split 'train\[oops\]'.*Unrecognized instruction"),
        ("train", "small", r"configuration 'small' \(BuilderConfig 'small' not found.*default"),
    ],
)
def test_a_wrong_split_or_configuration_is_named(films, split, config, message):
    with pytest.raises(InputError, match=f"dataset: must be a readable data set .*{message}"):
        read_table(split, "train", dataset=films, config=config)


def test_a_folder_without_examples_and_a_damaged_one_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty' \(The directory .* doesn't contain any data"):
        read_table("train", "train", dataset=str(tmp_path / "empty"))
    with pytest.raises(InputError, match=r"nowhere' \(Couldn't find any data file"):
        read_table("train", "train", dataset=str(tmp_path / "nowhere"))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "train.jsonl").write_text('{"text": "a", "la')
    with pytest.raises(InputError, match=r"cut' \(JSON parse error"):
        read_table("train", "train", dataset=str(tmp_path / "cut"))


def test_a_hub_that_cannot_be_reached_is_said_with_the_way_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"reached; got 'SetFit/sst2' \(Couldn't reach.*or give a"):
        read_table("train", "train", dataset="SetFit/sst2")


def test_class_labels_must_be_as_many_as_the_task_has():
    features = datasets.Features({"label": datasets.ClassLabel(names=["neg", "pos"])})
    table = datasets.Dataset.from_dict({"label": [1, 0, 1]}, features=features)
    assert read_labels(table, "label", 2, "x").tolist() == [1, 0, 1]
    with pytest.raises(InputError, match="x: 'label' must have 3 classes; got 2: neg, pos"):
        read_labels(table, "label", 3, "x")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([-1, -1], "x: 'label' must hold classes; got -1 everywhere.*Take another split"),
        ([-1, 0], r"x, row 1: the label must be an integer in \[0, 2\); got -1"),
        (
            ["pos", "neg", "pos"],
            r"x, row 1: .* got 'pos' \(in all: neg, pos\). Number .* or set label_column",
        ),
        ([0.0, 1.0], r"x, row 1: the label must be an integer in \[0, 2\); got 0.0"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    table = datasets.Dataset.from_dict({"label": labels})
    with pytest.raises(InputError, match=message):
        read_labels(table, "label", 2, "x")
