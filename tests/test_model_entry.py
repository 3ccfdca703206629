from __future__ import annotations

from pathlib import Path

import pytest

from lit_merge.errors import InputError
from lit_merge.evaluation import Kind
from lit_merge.evaluation.model_entry import ModelEntry, resolve_entries

TASKS = ("svhn", "dtd")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name, file in (
        ("plain", "model.safetensors"),
        ("merged", "merge.json"),
        ("corrected", "correction.json"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "folder", "kind", "task"),
    [
        ("theta 0", "plain", "base", None),
        ("svhn", "plain", "expert", "svhn"),
        ("average", "merged", "merged", None),
        ("svhn", "merged", "merged", None),
        ("fitted", "corrected", "corrected", None),
    ],
)
def test_kind_is_told_from_files_and_name(
    folders: Path, name: str, folder: str, kind: Kind, task: str | None
) -> None:
    path = str(folders / folder)
    assert resolve_entries({name: path}, TASKS) == {name: ModelEntry(path, kind, task)}


def test_given_kind_and_task_go_before_what_the_files_say(folders: Path) -> None:
    given = {
        "control": ModelEntry(str(folders / "corrected"), kind="control"),
        "second svhn": ModelEntry(str(folders / "plain"), task="svhn"),
        "dtd": ModelEntry(str(folders / "plain"), kind="base"),
    }
    found = resolve_entries(given, TASKS)
    assert [(entry.kind, entry.task) for entry in found.values()] == [
        ("control", None),
        ("expert", "svhn"),
        ("base", None),
    ]


def test_stage_is_kept(folders: Path) -> None:
    given = {"fitted": ModelEntry(str(folders / "corrected"), stage=2)}
    assert resolve_entries(given, TASKS)["fitted"].stage == 2


def test_wrong_entries_are_refused_by_name(folders: Path) -> None:
    path = str(folders / "plain")
    with pytest.raises(InputError, match="models: must name at least one"):
        resolve_entries({}, TASKS)
    with pytest.raises(InputError, match="tasks: must name at least one"):
        resolve_entries({"a": path}, ())
    with pytest.raises(InputError, match=r"models\.a: must exist; got .*none"):
        resolve_entries({"a": str(folders / "none")}, TASKS)
    with pytest.raises(InputError, match=r"models\.a\.task: must be one of the tasks, svhn, dtd"):
        resolve_entries({"a": ModelEntry(path, kind="expert")}, TASKS)
    with pytest.raises(InputError, match=r"models\.a\.task: .*got 'shvn'"):
        resolve_entries({"a": ModelEntry(path, task="shvn")}, TASKS)
    for stage, kind in ((0, "merged"), (1, "control"), (1, "base")):
        with pytest.raises(InputError, match=rf"models\.a\.stage: must be 1 .* got {stage} for"):
            resolve_entries({"a": ModelEntry(path, kind, stage=stage)}, TASKS)  # type: ignore[arg-type]
    both = {name: ModelEntry(path, "merged", stage=3) for name in ("a", "b")}
    with pytest.raises(InputError, match=r"models\.b\.stage: must be another .* 'a'; got 3"):
        resolve_entries(both, TASKS)
    with pytest.raises(InputError, match=r"models\.a\.kind: must be one of expert, base"):
        resolve_entries({"a": ModelEntry(path, kind="best")}, TASKS)  # type: ignore[arg-type]
