from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest

from lit_merge.errors import InputError
from lit_merge.methods import Average
from tests.test_callbacks_expert_callback import Interrupting
from tests.timelines import SHARED, assert_equal, record, step, weights
from tests.tiny_fits import QUIET, tiny_classifier

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def test_an_interrupted_fit_does_not_count_and_the_next_takes_its_place(tmp_path) -> None:
    folder = tmp_path / "timeline"
    step(folder, "a")
    with pytest.raises(SystemExit):
        step(folder, "b", module=Interrupting())
    assert [s["task"] for s in record(folder)["steps"]] == ["a"]
    (folder / "02-killed/expert").mkdir(parents=True)  # as if killed while merging
    (folder / "2024-notes").mkdir()
    (folder / "2024-notes/mine.txt").touch()
    step(folder, "c")
    assert [s["task"] for s in record(folder)["steps"]] == ["a", "c"]
    found = {path.name for path in folder.iterdir()}
    assert found == {"base", "01-a", "02-c", "timeline.json", "2024-notes"}


def test_a_first_fit_that_was_interrupted_leaves_no_base_behind(tmp_path) -> None:
    folder = tmp_path / "timeline"
    with pytest.raises(SystemExit):
        step(folder, "a", module=Interrupting())
    step(folder, "a", seed=3)
    assert_equal(weights(folder / "base"), tiny_classifier(3).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"init": "last"}, r"init: must be 'ema' as in .*timeline.json; got 'last'"),
        ({"decay": 0.9}, r"decay: must be 0.5 as in .*; got 0.9. Keep the rules"),
        ({"policy": SHARED}, r"policy: must be .*'per-task'"),
        ({"deploy": "merge", "method": Average()}, r"deploy: must be 'ema'"),
    ],
)
def test_other_rules_than_those_of_the_timeline_are_refused(
    tmp_path, rules: dict[str, Any], message: str
) -> None:
    step(tmp_path / "timeline", "a")
    with pytest.raises(InputError, match=message):
        step(tmp_path / "timeline", "b", **rules)


def test_a_decay_that_nothing_uses_is_no_rule(tmp_path) -> None:
    step(tmp_path / "timeline", "a", init="last", deploy="last", decay=0.5)
    step(tmp_path / "timeline", "b", init="last", deploy="last", decay=0.9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"timeline.json: must hold the record of a timeline; got a damaged one \(JSON"),
        ('{"format_version": 1}', r"got a damaged one \(KeyError: 'rules'\)"),
        ('{"format_version": 9}', r"must have format_version 1; got 9"),
        ("[]", r"got a damaged one \(TypeError"),
    ],
)
def test_a_broken_record_is_refused(tmp_path, text: str, message: str) -> None:
    step(tmp_path / "timeline", "a")
    (tmp_path / "timeline/timeline.json").write_text(text)
    with pytest.raises(InputError, match=message):
        step(tmp_path / "timeline", "b")


def test_weights_that_have_changed_are_refused_before_training(tmp_path) -> None:
    folder = tmp_path / "timeline"
    step(folder, "a")
    step(folder, "b")
    file = folder / "01-a/expert/model.safetensors"
    content = file.read_bytes()
    file.write_bytes((folder / "02-b/expert/model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"01-a/expert: must hold the weights that .*; got"):
        step(folder, "c")
    file.write_bytes(content[:-4])
    with pytest.raises(InputError, match=r"01-a/expert/model.safetensors"):
        step(folder, "c")


def test_a_folder_of_something_else_is_refused(tmp_path) -> None:
    (tmp_path / "timeline").mkdir()
    (tmp_path / "timeline/notes.txt").touch()
    with pytest.raises(InputError, match=r"timeline: must be the folder of a timeline"):
        step(tmp_path / "timeline", "a")


def test_a_job_that_another_has_overtaken_is_not_counted(tmp_path) -> None:
    class Other(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            step(tmp_path / "timeline", "overtaking")

    with pytest.raises(InputError, match=r"timeline: must have one job at a time"):
        step(tmp_path / "timeline", "slow", Other())
    assert [s["task"] for s in record(tmp_path / "timeline")["steps"]] == ["overtaking"]
