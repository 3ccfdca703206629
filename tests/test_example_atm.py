"""The ATM recipe, whole, with few steps on few digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_merge.cli import main
from lit_merge.evaluation.file import read_evaluation

RECIPE = Path(__file__).parents[1] / "configs" / "run_atm.yaml"
TASKS = ("tilted", "negative")
VARIABLES: dict[str, Any] = {
    "tasks": list(TASKS),
    "rounds": [1, 2],
    "before": [0, 1],
    "round_steps": 2,
    "one_shot_steps": 2,  # those of one round, so that both must give the same
    "base_steps": 2,
    "train_examples": 64,
    "eval_examples": 16,
    "method": {"class_path": "TaskArithmetic", "init_args": {"scale": 0.5}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of the recipe."""
    folder = tmp_path_factory.mktemp("atm") / "run"
    words = ["run", "--config", str(RECIPE), "--variables.output", str(folder)]
    for name, value in VARIABLES.items():
        words += [f"--variables.{name}", json.dumps(value)]
    assert main(words) == 0
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    """Return weights under the names of the network."""
    state = load_file(folder / "model.safetensors")
    return {name.removeprefix("model."): value for name, value in state.items()}


def test_one_round_is_the_ordinary_merge(run: Path) -> None:
    once, first = weights(run / "one-shot/merged"), weights(run / "round-1/merged")
    assert all(torch.equal(once[name], first[name]) for name in once)
    assert "head.weight" in once


def test_a_round_tunes_and_merges_from_the_model_of_the_round_before(run: Path) -> None:
    before = json.loads((run / "round-1/merged/merge.json").read_text())["fingerprint"]
    record = json.loads((run / "round-2/merged/merge.json").read_text())
    assert record["base"]["fingerprint"] == before
    assert [record["experts"][task]["base_fingerprint"] for task in TASKS] == [before, before]
    base = weights(run / "round-1/merged")
    experts = [weights(run / "round-2" / task / "expert") for task in TASKS]
    for name, value in weights(run / "round-2/merged").items():
        mean = torch.stack([expert[name].double() for expert in experts]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-7)
        assert name.endswith("bias") or not torch.equal(value, base[name])


def test_every_model_is_measured_on_every_view(run: Path) -> None:
    evaluation = read_evaluation(run / "evaluation.json")
    models = {r.model for r in evaluation.rows if r.kind != "expert"}
    rounds = {"ATM, round 1", "ATM, round 2"}
    assert models == {"base", "one merge", "one merge, gradient matching", *rounds}
    for model in models:
        assert [r.task for r in evaluation.rows if r.model == model] == list(TASKS)
    by_model = {(r.model, r.task): r.nll for r in evaluation.rows}
    for task in TASKS:
        assert by_model["ATM, round 1", task] == by_model["one merge", task]
    assert (run / "report.html").stat().st_size > 10_000
