"""Recipes: variables, repetitions, the list of commands, and what is done when they run again."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lit_merge.cli import main
from lit_merge.errors import InputError
from lit_merge.recipe import RunFolder, Step, fill, plan


@pytest.mark.parametrize(
    ("tree", "filled"),
    [
        ("${n}", 3),
        ("step ${n} of ${word}", "step 3 of all"),
        ("${flag}", True),
        ("is ${flag}", "is true"),
        ("$${n}", "${n}"),
        ("$${n} ${n}", "${n} 3"),
        ("${sets.a}", "data/a"),
        ("${sets.${which}}", "data/a"),
        ("${nested}", {"path": "runs/all/3"}),
        ({"${word}": ["${n}", {"x": "${n}"}]}, {"all": [3, {"x": 3}]}),
        (None, None),
        (1.5, 1.5),
        ({"with": "${nested}", "more": 1}, {"path": "runs/all/3", "more": 1}),
        ({"with": "${nested}", "path": "mine"}, {"path": "mine"}),
    ],
)
def test_variables_are_filled_in(tree: Any, filled: Any) -> None:
    scope = {
        "n": 3,
        "word": "all",
        "flag": True,
        "which": "a",
        "sets": {"a": "data/a"},
        "folder": "runs/${word}",
        "nested": {"path": "${folder}/${n}"},
    }
    assert fill(tree, scope) == filled


def test_a_variable_takes_the_variables_of_the_place_where_it_is_used() -> None:
    scope = {"task": "outer", "file": "${root}/${task}.npz", "root": "data"}
    tree = {"${task}": {"each": {"task": ["a", "b"]}, "value": "${file}"}, "own": "${file}"}
    assert fill(tree, scope) == {"a": "data/a.npz", "b": "data/b.npz", "own": "data/outer.npz"}


def test_lists_are_repeated_side_by_side_and_in_lists() -> None:
    tree = [0, {"each": {"n": [1, 2], "m": ["x", "y"]}, "at": "${n}${m}"}, {"each": {"n": []}}]
    assert fill(tree, {}) == [0, {"at": "1x"}, {"at": "2y"}]


def test_a_value_with_an_escaped_variable_is_not_filled_in_twice() -> None:
    tree = {"k": {"each": {"n": ["$${n}"]}, "value": ["${n}", "a ${n}"]}}
    assert fill(tree, {}) == {"k": ["${n}", "a ${n}"]}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("${taks}", r"\$\{taks\}: must be one of the variables; got no 'taks'.*mean \"task\""),
        ("${m.c}", r"\$\{m.c\}: must be one of the variables; got no 'c' there"),
        ("${task.x}", r"got no 'x' there"),
        ("a${m}", r"\$\{m\}: must be a word or a number to be put into a text"),
        ("${loop}", r"must not refer to themselves"),
        ({"x": {"each": ["a"]}}, r"each: must be a mapping of names to lists"),
        ({"x": {"each": {"n": 3}}}, r"each.n: must be a list"),
        ({"x": {"each": {"n": [1], "m": [1, 2]}}}, r"n has 1, m has 2"),
        ({"x": {"each": {"n": [1, 2]}, "value": 0}}, r"must give every entry a name of its own"),
        ({"with": "${task}"}, r"with: must be a mapping; got 't'"),
    ],
)
def test_what_cannot_be_filled_in_is_said(tree: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fill(tree, {"task": "t", "m": {"a": 1}, "loop": "${loop}"})


def test_steps_are_repeated_nested_and_left_out() -> None:
    steps = [
        {"command": "fit", "title": "Base", "when": "${train}", "options": {"a": 1}},
        {
            "each": {"round": [1, 2], "before": [0, 1]},
            "steps": [
                {"command": "fit", "title": "${t} ${round}", "each": {"t": "${tasks}"}},
                {"command": "merge", "options": {"base": "m${before}"}},
            ],
        },
        {"command": "report", "arguments": ["${round}", 2]},
    ]
    found = plan(steps, {"tasks": {"x": 0, "y": 0}, "train": False, "round": 9})
    assert [(s.number, s.title, s.command) for s in found] == [
        (1, "x 1", "fit"),
        (2, "y 1", "fit"),
        (3, "merge", "merge"),
        (4, "x 2", "fit"),
        (5, "y 2", "fit"),
        (6, "merge", "merge"),
        (7, "report", "report"),
    ]
    assert [s.options["base"] for s in found if s.command == "merge"] == ["m0", "m1"]
    assert found[-1].arguments == ("9", "2")
    assert plan(steps, {"tasks": [], "train": True, "round": 9})[0].name == "01-base"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"comand": "fit"}, r"steps 1: a step must consist of .*got comand"),
        ({"title": "x"}, r"steps 1: a step must have a command, or steps.*got neither"),
        ({"command": "a", "steps": []}, r"got both"),
        ({"steps": [], "title": "x"}, r"a step with steps must have no title"),
        ({"command": "a", "arguments": "x"}, r"arguments: must be a list"),
        ({"command": "a", "options": [1]}, r"options: must be a mapping"),
        ({"steps": [{"command": "a"}, {"command": "${x}"}]}, r"^steps 1.2: \$\{x\}: must be one"),
    ],
)
def test_a_wrong_step_is_named_by_its_place(step: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan([step], {})


def recipe(folder: Path, *, scale: float = 1.0) -> dict[str, Any]:
    """Return a recipe that merges two files and inspects the result."""
    return {
        "variables": {"output": str(folder / "run"), "scale": scale, "files": str(folder)},
        "steps": [
            {
                "title": "Merge",
                "command": "merge",
                "options": {
                    "base": "${files}/base.safetensors",
                    "experts": {
                        "${t}": {"each": {"t": ["a", "b"]}, "value": "${files}/${t}.safetensors"}
                    },
                    "method": {"class_path": "TaskArithmetic", "init_args": {"scale": "${scale}"}},
                    "output": "${output}/merged",
                },
            },
            {"title": "Look", "command": "inspect", "arguments": ["${output}/merged"]},
        ],
    }


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, value in {"base": 0.0, "a": 1.0, "b": 2.0}.items():
        save_file({"w": torch.full((4,), value)}, str(tmp_path / f"{name}.safetensors"))
    return tmp_path


def run(folder: Path, content: dict[str, Any], *words: str) -> int:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return main(["run", "--config", str(file), *words])


def merged(folder: Path) -> float:
    return float(load_file(str(folder / "run/merged/model.safetensors"))["w"][0])


def test_a_recipe_runs_its_commands_and_skips_what_is_done(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files, recipe(files)) == 0
    assert merged(files) == 3.0
    first = (files / "run/merged/merge.json").stat().st_mtime_ns
    assert "1/2 Merge" in capsys.readouterr().out
    assert run(files, recipe(files)) == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert (files / "run/merged/merge.json").stat().st_mtime_ns == first


def test_a_changed_step_and_those_after_it_run_again(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(files, recipe(files))
    assert run(files, recipe(files), "--variables.scale", "0.5") == 0
    assert merged(files) == 1.5
    assert "done before" not in capsys.readouterr().out


def test_each_step_can_be_repeated_by_hand(files: Path) -> None:
    run(files, recipe(files))
    written = (files / "run/steps/01-merge.yaml").read_text()
    assert written.startswith("# lit-merge merge --config ")
    words = written.splitlines()[0].removeprefix("# lit-merge ").split()
    assert main([*words, "--output", str(files / "again")]) == 0
    assert load_file(str(files / "again/model.safetensors"))["w"].tolist() == [3.0] * 4


def test_a_step_that_fails_stops_the_run_which_goes_on_there(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "b.safetensors").rename(files / "away")
    assert run(files, recipe(files)) == 2
    assert "b.safetensors" in capsys.readouterr().err
    assert json.loads((files / "run/steps/done.json").read_text()) == {}
    (files / "away").rename(files / "b.safetensors")
    assert run(files, recipe(files)) == 0
    assert merged(files) == 3.0


def test_a_step_killed_after_its_output_was_there_runs_again(files: Path) -> None:
    run(files, recipe(files))
    (files / "run/steps/done.json").write_text("{}")  # as if the process had ended before this
    assert run(files, recipe(files), "--variables.scale", "2.0") == 0
    assert merged(files) == 6.0


def test_listing_does_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files, recipe(files), "--list") == 0
    assert "lit-merge inspect" in capsys.readouterr().out
    assert not (files / "run").exists()


def test_json_lists_the_steps_and_what_became_of_each(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*words: str, status: int = 0) -> list[tuple[str, bool]]:
        assert run(files, recipe(files), "--json", *words) == status
        content = json.loads(capsys.readouterr().out)
        assert (content["command"], content["status"]) == ("run", status)
        assert content["output"] == str(files / "run")
        return [(step["state"], step["seconds"] is not None) for step in content["steps"]]

    assert shown("--list") == [("planned", False)] * 2
    (files / "b.safetensors").rename(files / "away")
    assert shown(status=2) == [("failed", False)]
    (files / "away").rename(files / "b.safetensors")
    assert shown() == [("done", True)] * 2
    assert shown() == [("skipped", True)] * 2


def test_what_a_recipe_must_not_do_is_refused(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = recipe(files)
    (files / "run").mkdir()
    (files / "run/precious").write_text("mine")
    assert run(files, content) == 2
    assert "must be a new or empty folder, or that of an earlier run" in capsys.readouterr().err
    assert (files / "run/precious").read_text() == "mine"
    assert run(files, content, "--variables.output", "null") == 2
    assert "variables.output: must be the folder of the run" in capsys.readouterr().err
    content["steps"][0]["command"] = "run"
    assert run(files, content) == 2
    assert "Merge: command must be one of fit," in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(files, recipe(files)) == 2
    assert "run: must be started as one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variables.scale"], r"--variables.scale: must be --variables.NAME VALUE"),
        (["--scale", "2"], r"--scale: must be --variables.NAME VALUE"),
        (["--variables.scale", "[1"], r"variables.scale: must be a value in YAML; got '\[1'"),
    ],
)
def test_a_wrong_option_is_named(
    files: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files, recipe(files), *words) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"recipe.yaml: must be a YAML file; got No such file"),
        ("a: [", r"recipe.yaml: must be a YAML file; got while parsing"),
        (
            "base: x\nsteps: []",
            r"must be a recipe, with variables and steps alone; got base, steps",
        ),
        ("variables: {}", r"steps must be a list, and variables a mapping; got NoneType and dict"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(
    tmp_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    assert main(["run", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_variables_may_be_given_together_or_with_an_equals_sign(files: Path) -> None:
    assert run(files, recipe(files), "--variables", "{scale: 0.5}", "--variables.more=1") == 0
    assert merged(files) == 1.5


def test_arguments_of_a_class_may_be_a_variable(files: Path) -> None:
    content = recipe(files)
    content["variables"]["arguments"] = {"scale": 2.0}
    method = {"class_path": "TaskArithmetic", "init_args": "${arguments}"}
    content["steps"][0]["options"]["method"] = method
    assert run(files, content) == 0
    assert merged(files) == 6.0


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps/done.json").write_text('{"01-a": 3}')
    with pytest.raises(InputError, match=r"done.json: must be JSON with an object for each step"):
        RunFolder(tmp_path)


def test_a_training_done_again_begins_in_an_empty_folder_of_the_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    inside, outside = tmp_path / "run/base", tmp_path / "elsewhere"

    def fit(root: Path) -> Step:
        return Step(1, "Fit", "fit", {"trainer": {"default_root_dir": str(root)}}, ())

    for root in (inside, outside):
        root.mkdir(parents=True)
        (root / "last.ckpt").write_text("old")
    words = folder.begin(fit(inside), replaces=False)
    assert words == ["fit", "--config", str(tmp_path / "run/steps/01-fit.yaml")]
    assert (inside / "last.ckpt").is_file()  # never ours before: it is not ours to remove
    folder.begin(fit(inside), replaces=False)
    assert not inside.exists()
    folder.begin(fit(outside), replaces=False)
    assert (outside / "last.ckpt").is_file()


def test_lightning_starts_other_processes_with_the_step_alone(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from lit_merge.cli import run as module

    monkeypatch.setattr(sys, "argv", ["lit-merge", "run", "--config", "x"])
    with module._as_command_line(["fit", "--config", "y"]):
        assert sys.argv == ["lit-merge", "fit", "--config", "y"]
    assert sys.argv[1] == "run"
    assert "WORLD_SIZE" not in os.environ
