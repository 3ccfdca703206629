"""The recipe of examples/language, end to end on a tiny language."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lit_merge.cli import main
from lit_merge.evaluation import EvaluationRow
from lit_merge.evaluation.file import read_evaluation
from lit_merge.expert import open_expert
from tests.tiny_language import CONFIG, SCRIPT, SIZE, write_texts, write_tokenizer

RECIPE = Path(__file__).parents[1] / "configs" / "run_language.yaml"


def test_the_script_makes_a_tokenizer_that_says_every_text_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = write_texts(tmp_path / "train.jsonl"), tmp_path / "tokenizer"
    arguments = [str(SCRIPT), file, "--size", str(SIZE), "--output", str(folder)]
    monkeypatch.setattr("sys.argv", arguments)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.split() == [str(folder)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) <= SIZE
    for text in ("ball goal", "Ünïcode, 12 €"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|endoftext|>"


def test_the_recipe_measures_every_model_and_takes_a_topic_out(tmp_path: Path) -> None:
    data, output, tokenizer = tmp_path / "data", tmp_path / "run", tmp_path / "tokenizer"
    for name in ("imdb", "agnews"):
        (data / name).mkdir(parents=True)
        for seed, split in enumerate(("train", "test")):
            write_texts(data / name / f"{split}.jsonl", count=8, seed=seed)
    write_tokenizer(tokenizer, [str(data / "imdb" / "train.jsonl")])
    config = ", ".join(f"{key}: {value}" for key, value in CONFIG.items())
    variables = {
        "output": str(output),
        "model": "tiny",
        "config": f"{{{config}}}",
        "tokenizer": str(tokenizer),
        "sets": "local",
        "data": str(data),
        "topics": "{sports: 0, business: 1}",
        "others": "[business]",
        "scales": "[1.0]",
        "block_length": "8",
        "batch_size": "4",
        "base_steps": "2",
        "base_lr": "0.05",
        "steps": "2",
        "lr": "0.01",
        "trainer": "{logger: false, enable_model_summary: false, enable_progress_bar: false}",
    }
    words = [word for name, value in variables.items() for word in (f"--variables.{name}", value)]
    assert main(["run", "--config", str(RECIPE), *words]) == 0

    evaluation = read_evaluation(output / "evaluation.json")
    models = [
        "base",
        "average",
        "task arithmetic 1.0",
        "gradient matching 1.0",
        "task arithmetic 1.0, sports out",
        "gradient matching 1.0, sports out",
        "gradient matching of the others",
    ]
    rows: dict[tuple[str, str], EvaluationRow] = {(r.model, r.task): r for r in evaluation.rows}
    topics = ("sports", "business")
    assert set(rows) == {
        *((model, topic) for model in models for topic in topics),
        *((f"expert {topic}", topic) for topic in topics),
    }
    for row in rows.values():
        assert row.nll is not None
        assert row.perplexity == pytest.approx(math.exp(row.nll))
    assert (output / "report.html").is_file()
    # One expert is left: taking the other out leaves it, and so does a merge of it alone.
    for topic in topics:
        for model in models[-3:]:
            expected = rows["gradient matching of the others", topic].nll
            assert rows[model, topic].nll == pytest.approx(expected, rel=1e-4)
    assert rows["gradient matching of the others", "business"].nll == pytest.approx(
        rows["expert business", "business"].nll, rel=1e-5
    )
    # The average has half of the sum of both task vectors.
    base, average = (torch_state(output / name) for name in ("base/last.ckpt", "average"))
    total = torch_state(output / "task-arithmetic" / "scale=1.0")
    for name, value in average.items():
        halfway = base[name] + (total[name] - base[name]) / 2
        torch.testing.assert_close(value, halfway, rtol=1e-5, atol=1e-6)


def torch_state(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a folder or checkpoint."""
    expert = open_expert(path)
    try:
        return {name: expert.weights.tensor(name).clone() for name in expert.weights}
    finally:
        expert.close()
