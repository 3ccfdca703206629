from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from lit_merge.checkpoint import fingerprint, open_checkpoint
from lit_merge.methods import GradientMatching, MergeMethod, WeightedAverage
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming import merge
from lit_merge.streaming.provenance import method_settings
from tests.merge_files import METHODS, TASKS, save_base, save_expert, save_experts, weights


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "merge.json").read_text(encoding="utf-8"))
    return content


def test_the_record_says_what_was_merged_and_how(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    method = GradientMatching({"svhn": 1.0, "dtd": 0.5})
    policy = ParametersPolicy(rules={"emb.*": "keep"})
    result = merge(base, experts, method, tmp_path / "merged", policy=policy, dtype="float64")
    record = read(result.path)
    assert record["format_version"] == 1
    assert record["tasks"] == list(TASKS)
    assert record["method"]["init_args"]["scale"] == {"svhn": 1.0, "dtd": 0.5}
    assert record["policy"]["rules"] == {"emb.*": "keep"}
    assert record["dtype"] == "float64"
    assert record["base"] == {
        "path": str(base),
        "weights": str(base),
        "source": "safetensors",
        "fingerprint": fingerprint(weights(0)),
    }
    assert record["experts"]["dtd"] == {
        "path": str(experts["dtd"]),
        "weights": str(experts["dtd"] / "model.safetensors"),
        "source": "safetensors",
        "fingerprint": fingerprint(weights(2)),
        "base_fingerprint": None,
        "hessian": str(experts["dtd"] / "hessian.safetensors"),
        "hessian_trace": result.traces["dtd"],
        "estimator": "exact",
        "labels": "sampled",
        "num_examples": 50,
    }
    assert record["traces"] == result.traces
    assert record["heads"] == {task: f"heads/{task}.safetensors" for task in TASKS}
    assert record["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    with open_checkpoint(result.path) as merged:
        assert record["fingerprint"] == fingerprint(merged)


def test_the_record_has_a_line_for_every_tensor(tmp_path: Path) -> None:
    experts = save_experts(tmp_path)
    policy = ParametersPolicy(rules={"emb.*": "keep"})
    result = merge(None, experts, WeightedAverage([1, 2]), tmp_path / "merged", policy=policy)
    record = read(result.path)
    assert record["base"] is None
    assert {tensor["name"] for tensor in record["tensors"]} == weights(0).keys()
    by_name = {tensor.pop("name"): tensor for tensor in record["tensors"]}
    assert by_name["emb.weight"] == {
        "action": "keep",
        "reason": "rule emb.*",
        "shape": [11, 4],
        "dtype": "float32",
        "alias_of": None,
    }
    assert by_name["head.bias"]["action"] == "per-task"
    assert by_name["norm.num_batches_tracked"]["dtype"] == "int64"


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_method_can_be_made_again_from_its_record(method: MergeMethod) -> None:
    parser = ArgumentParser()
    parser.add_argument("--method", type=MergeMethod)
    settings = json.loads(json.dumps(method_settings(method)))
    given = parser.parse_object({"method": settings})
    assert parser.instantiate_classes(given).method == method


def tiny_bert(folder: Path, seed: int) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=19,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        num_labels=3,
    )
    torch.manual_seed(seed)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_merge_of_hugging_face_folders_is_one(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base, *experts = (tiny_bert(tmp_path / name, i) for i, name in enumerate(("base", "a", "b")))
    (base / "tokenizer.json").write_text("{}")
    (base / "vocab.txt").write_text("[PAD]\n")
    (base / "README.md").write_text("another model")
    (base / "modeling_bert.py").write_text("code")
    result = merge(
        base,
        experts,
        WeightedAverage([1.0, 3.0]),
        tmp_path / "merged",
        policy=ParametersPolicy(heads="merge"),
    )
    names = {path.name for path in result.path.iterdir()}
    assert names == {
        "config.json",
        "merge.json",
        "model.safetensors",
        "tokenizer.json",
        "vocab.txt",
    }
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    first, second, merged = (load(path).state_dict() for path in (*experts, result.path))
    for name, value in merged.items():
        torch.testing.assert_close(value, 0.25 * first[name] + 0.75 * second[name])


def test_the_copied_configuration_has_the_type_that_was_written(tmp_path: Path) -> None:
    base, expert = tiny_bert(tmp_path / "base", 0), tiny_bert(tmp_path / "expert", 1)
    result = merge(base, [expert], WeightedAverage([1]), tmp_path / "merged", dtype="bfloat16")
    before = json.loads((base / "config.json").read_text())
    after = json.loads((result.path / "config.json").read_text())
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {key for key in ("dtype", "torch_dtype") if key in before}
    assert {after[key] for key in changed} == {"bfloat16"}


def test_only_a_hugging_face_base_brings_its_files(tmp_path: Path) -> None:
    experts = save_experts(tmp_path)
    base = save_expert(tmp_path, "base", 0)
    (base / "tokenizer.json").write_text("{}")
    result = merge(base, experts, WeightedAverage([1, 2]), tmp_path / "merged")
    assert not (result.path / "tokenizer.json").exists()
