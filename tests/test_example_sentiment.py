"""The recipe of the sentiment experiment, whole, with a tiny model and made-up texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lit_merge.cli import main
from lit_merge.evaluation import Evaluation, EvaluationRow
from lit_merge.evaluation.file import read_evaluation
from tests.tiny_texts import bert_in, texts_in

# What the few made-up texts can say of the curvature is little.
pytestmark = pytest.mark.filterwarnings("ignore:The curvature is a poor estimate")

RECIPE = Path(__file__).parents[1] / "configs" / "run_sentiment.yaml"
EXPERTS = ("amazon", "mr", "sst2", "yelp")
TASKS = ("imdb", *EXPERTS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of the recipe."""
    folder = tmp_path_factory.mktemp("sentiment")
    variables = {
        "output": folder / "run",
        "model": bert_in(folder / "bert"),
        "sets": "local",
        "data": texts_in(folder / "data", dict.fromkeys(TASKS, 2)),
        "max_length": 16,
        "batch_size": 12,
        "hessian_examples": 12,
        "epochs": 4,
        "lr": 3e-2,
        "expert_lr": 3e-2,
        "scales": [0.25, 1.0],
    }
    options = [word for key, value in variables.items() for word in (f"--variables.{key}", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        assert main(["run", "--config", str(RECIPE), *map(str, options)]) == 0
    return folder / "run"


def row(evaluation: Evaluation, model: str, task: str) -> EvaluationRow:
    return next(r for r in evaluation.rows if (r.model, r.task) == (model, task))


def test_every_model_is_measured_on_every_set(run):
    evaluation = read_evaluation(run / "evaluation.json")
    models = {r.model for r in evaluation.rows if r.kind != "expert"}
    scaled = ("task arithmetic", "gradient matching", "gradient matching with H₀")
    assert models == {
        *("base", "average", "Fisher averaging", "TIES"),
        *(f"{method}, α = {scale}" for method in scaled for scale in (0.25, 1.0)),
    }
    for model in models:
        assert {r.task for r in evaluation.rows if r.model == model} == set(TASKS)
    assert [r.task for r in evaluation.rows if r.kind == "expert"] == list(TASKS)
    assert all(r.num_examples == 24 and r.nll is not None for r in evaluation.rows)
    assert (run / "report.html").stat().st_size > 10_000


def test_a_quarter_of_each_of_four_task_vectors_is_the_average(run):
    evaluation = read_evaluation(run / "evaluation.json")
    for task in TASKS:
        average, quarter = (
            row(evaluation, model, task).nll for model in ("average", "task arithmetic, α = 0.25")
        )
        assert average == pytest.approx(quarter, abs=1e-5)
        assert average != pytest.approx(row(evaluation, "base", task).nll, abs=1e-3)


def test_the_average_is_what_averaging_by_hand_gives(run):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    bert = run.parent / "bert"
    experts = [load_file(run / task / "expert" / "model.safetensors") for task in EXPERTS]
    mean = {
        name.removeprefix("model."): torch.stack([e[name] for e in experts]).mean(0)
        for name in experts[0]
        if name.startswith("model.")
    }
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2).eval()
    model.load_state_dict(mean)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    evaluation = read_evaluation(run / "evaluation.json")
    for task in TASKS:
        lines = (run.parent / "data" / task / "test.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        labels = torch.tensor([r["label"] for r in rows])
        with torch.inference_mode():
            texts = [tokenizer(r["text"], return_tensors="pt") for r in rows]
            logits = torch.cat([model(**text).logits for text in texts])
        measured = row(evaluation, "average", task)
        assert measured.accuracy == float((logits.argmax(1) == labels).double().mean())
        assert measured.nll == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-5)
