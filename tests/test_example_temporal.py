"""The recipe of temporal merging, whole, with a tiny model and made-up texts."""

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
from tests.tiny_texts import bert_in, texts_in

RECIPE = Path(__file__).parents[1] / "configs" / "run_temporal.yaml"
STEPS = ("01-amazon", "02-mr")
RULES = ("fresh-merge", "last-last", "ema-ema")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of the recipe."""
    folder = tmp_path_factory.mktemp("temporal")
    variables: dict[str, Any] = {
        "output": folder / "run",
        "model": bert_in(folder / "bert"),
        "sets": "local",
        "data": texts_in(folder / "data", dict.fromkeys(("imdb", "amazon", "mr"), 2)),
        "tasks": "[amazon, mr]",
        "tested": "[imdb, amazon, mr]",
        "numbers": "['01', '02']",
        "max_length": 16,
        "batch_size": 12,
        "hessian_examples": 12,
        "lr": 1e-3,
        "expert_lr": 1e-3,
        "decay": 0.25,
    }
    words = ["run", "--config", str(RECIPE)]
    for name, value in variables.items():
        words += [f"--variables.{name}", str(value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        assert main(words) == 0
    return folder / "run"


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}


def test_every_timeline_holds_its_steps_and_the_same_base(run: Path) -> None:
    records = [json.loads((run / rule / "timeline.json").read_text()) for rule in RULES]
    assert [[step["task"] for step in r["steps"]] for r in records] == 3 * [["amazon", "mr"]]
    assert len({r["base"] for r in records}) == 1
    first = [weights(run / rule / STEPS[0] / "expert") for rule in RULES]
    for other in first[1:]:  # all rules begin with one and the same fit
        assert all(torch.equal(other[name], value) for name, value in first[0].items())


def test_the_running_average_is_that_of_the_formula(run: Path) -> None:
    average = weights(run / "ema-ema/base")
    for step in STEPS:
        expert = weights(run / "ema-ema" / step / "expert")
        average = {name: 0.25 * average[name] + 0.75 * expert[name] for name in average}
        deployed = weights(run / "ema-ema" / step / "deployed")
        for name, value in average.items():
            torch.testing.assert_close(deployed[name], value, rtol=1e-5, atol=1e-7)


def test_only_the_rule_that_merges_gathers_curvature(run: Path) -> None:
    for rule in RULES:
        there = (run / rule / STEPS[1] / "expert/hessian.safetensors").is_file()
        assert there == (rule == "fresh-merge")


def test_every_deployed_model_is_measured_on_every_set(run: Path) -> None:
    rows = read_evaluation(run / "evaluation.json").rows
    deployed = {r.model for r in rows if r.kind == "merged"}
    names = ("fresh, merged", "last, last", "average, average")
    assert deployed == {f"{name}, after {task}" for name in names for task in ("amazon", "mr")}
    for model in deployed:
        assert {r.task for r in rows if r.model == model} == {"imdb", "amazon", "mr"}
    nll = {(r.model, r.task): r.nll for r in rows}
    assert nll["last, last, after mr", "mr"] != nll["fresh, merged, after mr", "mr"]
    for name in names[:2]:  # one expert, merged or alone, is that expert
        alone = nll["expert amazon", "amazon"]
        assert nll[f"{name}, after amazon", "amazon"] == pytest.approx(alone, rel=1e-5)
    assert (run / "report.html").stat().st_size > 10_000
