"""The demo: its recipe, its folder, and the whole way with very little training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_merge import demo
from lit_merge.errors import InputError
from lit_merge.evaluation.file import read_evaluation
from lit_merge.recipe import plan


def test_the_whole_way_ends_with_a_table_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables: dict[str, Any] = demo.RECIPE["variables"]
    few = {name: variables["tasks"][name] for name in ("mirrored", "odd")}
    short = {"tasks": few, "base_epochs": 1, "expert_epochs": 1, "depth": 1}
    monkeypatch.setitem(demo.RECIPE, "variables", {**variables, **short})
    run = tmp_path / "run"
    assert demo.main(["--output", str(run), "--steps", "2", "--json"]) == 0
    out, printed = capsys.readouterr()
    shown = json.loads(out)
    assert (shown["command"], shown["output"]) == ("demo", str(run))
    assert {step["state"] for step in shown["steps"]} == {"done"}
    evaluation = read_evaluation(run / "evaluation.json")
    models = {row.model for row in evaluation.rows}
    assert {"average", "ties", "gradient-matching", "base + TACT + learned"} <= models
    assert all(row.num_examples == 497 for row in evaluation.rows)
    corrected = [r for r in evaluation.rows if r.model == "least squares + learned"]
    assert {row.task for row in corrected} == {"mirrored", "odd"}
    assert "linear probe on base" in printed
    page = (run / "report.html").read_text()
    assert "least squares + learned" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert sorted(p.name for p in (run / "gradient-matching").iterdir()) == [
        "expert.json",
        "heads",
        "hessian.safetensors",
        "merge.json",
        "model.safetensors",
    ]
    with pytest.raises(InputError, match=r"must be a new or empty folder; got one with files"):
        demo.main(["--output", str(run)])


def test_a_used_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match=r"must be a new or empty folder; got one with files"):
        demo.main(["--output", str(tmp_path)])
    with pytest.raises(InputError, match=r"--replace takes only the folder of an earlier demo"):
        demo.main(["--output", str(tmp_path), "--replace"])
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_every_step_has_a_file_of_its_own_and_writes_inside_the_folder(tmp_path: Path) -> None:
    given = {"output": str(tmp_path), "seed": 3}
    steps = plan(demo.RECIPE["steps"], {**demo.RECIPE["variables"], **given})
    assert len({step.name for step in steps}) == len(steps) == 18
    outputs = [step.options["output"] for step in steps if "output" in step.options]
    assert len(outputs) == 12
    assert all(Path(output).is_relative_to(tmp_path) for output in outputs)
    assert {s.options["seed_everything"] for s in steps if "seed_everything" in s.options} == {3}
