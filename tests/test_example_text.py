"""The recipe of the four text tasks, whole, with a tiny model and made-up texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import lit_merge
from lit_merge.cli import main
from lit_merge.evaluation import Evaluation, EvaluationRow
from lit_merge.evaluation.file import read_evaluation
from lit_merge.methods import Average, GradientMatching, MergeMethod
from tests.tiny_texts import bert_in, texts_in

# What the few made-up texts can say of the curvature is little.
pytestmark = pytest.mark.filterwarnings("ignore:The curvature is a poor estimate")

RECIPE = Path(__file__).parents[1] / "configs" / "run_text.yaml"
CLASSES = {"trec": 6, "agnews": 4, "subj": 2, "mr": 2}
CORRECTED = (
    "average + TACT",
    "least squares, one model",
    "least squares + scale and shift",
    "least squares + learned",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of the recipe."""
    folder = tmp_path_factory.mktemp("text")
    bert = bert_in(folder / "bert")
    variables = {
        "output": folder / "run",
        "model": bert,
        "base": bert,
        "sets": "local",
        "data": texts_in(folder / "data", CLASSES),
        "calibration_examples": 12,
        "hessian_examples": 12,
        "max_length": 16,
        "batch_size": 12,
        "lr": 1e-2,
        "steps": 2,
    }
    options = [word for key, value in variables.items() for word in (f"--variables.{key}", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        assert main(["run", "--config", str(RECIPE), *map(str, options)]) == 0
    return folder / "run"


def row(evaluation: Evaluation, model: str, task: str) -> EvaluationRow:
    return next(r for r in evaluation.rows if (r.model, r.task) == (model, task))


def test_every_model_is_measured_on_every_task(run):
    evaluation = read_evaluation(run / "evaluation.json")
    models = {r.model for r in evaluation.rows if r.kind != "expert"}
    assert models == {
        *("base", "linear probe on base", "base + TACT + learned", *CORRECTED),
        *("average", "task arithmetic", "gradient matching"),
    }
    for model in models:
        assert [r.task for r in evaluation.rows if r.model == model] == list(CLASSES)
    assert [r.task for r in evaluation.rows if r.kind == "expert"] == list(CLASSES)
    stages = [line.model for line in evaluation.stages()]
    assert stages == ["average", *CORRECTED[1:]]
    assert {v.model for v in evaluation.variances} >= {"average", *CORRECTED}
    assert (run / "report.html").stat().st_size > 10_000


def test_the_calibration_has_no_labels(run):
    steps = sorted((run / "steps").glob("*-solve-the-layers*.yaml"))
    assert len(steps) == 2
    assert all(step.read_text().count("unlabelled: true") == len(CLASSES) for step in steps)


@pytest.mark.parametrize(
    ("name", "method"),
    [("average", Average()), ("gradient matching", GradientMatching(scale=1.0))],
)
def test_a_merge_is_what_merging_in_memory_gives(run, name: str, method: MergeMethod):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    def part(task: str, file: str, *, head: bool) -> dict[str, Tensor]:
        tensors = load_file(run / task / "expert" / file)
        return {
            key.removeprefix("model."): value
            for key, value in tensors.items()
            if key.startswith("model.") and (".classifier." in key) == head
        }

    bert = run.parent / "bert"
    tokenizer = AutoTokenizer.from_pretrained(bert)
    pretrained = AutoModelForSequenceClassification.from_pretrained(bert).state_dict()
    merged = lit_merge.merge_state_dicts(
        {key: value for key, value in pretrained.items() if not key.startswith("classifier.")},
        {task: part(task, "model.safetensors", head=False) for task in CLASSES},
        method,
        hessians={task: part(task, "hessian.safetensors", head=False) for task in CLASSES},
    )
    evaluation = read_evaluation(run / "evaluation.json")
    for task, count in CLASSES.items():
        model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=count).eval()
        model.load_state_dict({**merged, **part(task, "model.safetensors", head=True)})
        lines = (run.parent / "data" / task / "test.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        labels = torch.tensor([r["label"] for r in rows])
        with torch.inference_mode():
            texts = [tokenizer(r["text"], return_tensors="pt") for r in rows]
            logits = torch.cat([model(**text).logits for text in texts])
        measured = row(evaluation, name, task)
        assert measured.accuracy == float((logits.argmax(1) == labels).double().mean())
        assert measured.nll == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-5)
