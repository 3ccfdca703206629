"""The recipe "lora": adapters of PEFT trained, measured, merged by curvature, and evaluated."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

from lit_merge.cli import main
from lit_merge.evaluation.file import read_evaluation

ROOT = Path(__file__).parents[1]
WORDS = ["a", "film", "plot", "the", "of", "good", "bad", "who", "where"]
MARKS = {"one": ("good", "bad"), "two": ("who", "where")}

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, transformers and datasets


def write_model(folder: Path) -> Path:
    folder.mkdir()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(folder)
    # As older versions of transformers wrote it, and the models of that time still have it.
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.position_ids"] = torch.arange(16)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_texts(folder: Path) -> Path:
    for task, marks in MARKS.items():
        (folder / task).mkdir(parents=True)
        for split, count in (("train", 16), ("test", 8)):
            rows = [
                {"text": f"{WORDS[i % 5]} {marks[i % 2]} {WORDS[i % 3]}", "label": i % 2}
                for i in range(count)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / task / f"{split}.jsonl").write_text(text)
    return folder


def test_adapters_are_trained_measured_merged_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "lora"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model, output = write_model(tmp_path / "model"), tmp_path / "run"
    variables = {
        "data": str(write_texts(tmp_path / "data")),
        "model": str(model),
        "output": str(output),
        "tasks": list(MARKS),
        "classes": dict.fromkeys(MARKS, 2),
        "rank": 2,
        "merged_rank": 4,
        "epochs": 1,
        "accelerator": "cpu",
    }
    words = [w for n, v in variables.items() for w in (f"--variables.{n}", json.dumps(v))]
    assert main(["run", "--config", str(ROOT / "configs" / "run_lora.yaml"), *words]) == 0

    for task in MARKS:
        files = {path.name for path in (output / task / "adapter").iterdir()}
        assert {"adapter_model.safetensors", "hessian.safetensors", "expert.json"} <= files
    evaluation = read_evaluation(output / "evaluation.json")
    rows = {(row.model, row.task) for row in evaluation.rows}
    assert {("expert one", "one"), ("gradient-matching", "two"), ("base", "one")} <= rows

    # The merged adapter is one that PEFT takes, and says how far it is from the merge.
    lost = json.loads((output / "adapter" / "truncation.json").read_text())
    whole = load_file(output / "gradient-matching" / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = BertForSequenceClassification.from_pretrained(model, num_labels=2)
        merged = peft.PeftModel.from_pretrained(network, str(output / "adapter"))
        state = merged.merge_and_unload().bert.state_dict()
    assert whole.pop("embeddings.position_ids").tolist() == [list(range(16))]
    for name, value in whole.items():
        record = lost["weights"].get(name, {"norm": 0.0, "relative_error": 0.0})
        limit = 1.01 * record["norm"] * record["relative_error"] + 1e-5
        assert float((state[name] - value).norm()) <= limit, name
