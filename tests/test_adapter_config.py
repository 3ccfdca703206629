from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_merge.checkpoint.adapter_config import read_adapter_config
from lit_merge.errors import InputError

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def written(folder: Path, content: object) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def test_the_scaling_is_alpha_by_rank_or_by_its_root(tmp_path: Path) -> None:
    config = read_adapter_config(written(tmp_path, PLAIN))
    assert config.scaling_of("h.0.attn") == 2.0
    config = read_adapter_config(written(tmp_path, PLAIN | {"use_rslora": True, "r": 4}))
    assert config.scaling_of("h.0.attn") == 8.0


def test_patterns_fit_whole_names_or_their_last_components(tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"attn.c_proj": 4, "q": 2},
        "alpha_pattern": {r"^model\.h\.\d+\.attn\.q": 1.0},
    }
    config = read_adapter_config(written(tmp_path, PLAIN | patterns))
    for module, rank, scaling in (
        ("model.h.0.attn.c_proj", 4, 4.0),
        ("model.h.0.xattn.c_proj", 8, 2.0),
        ("model.h.0.attn.c_proj.inner", 8, 2.0),
        ("model.h.10.attn.q", 2, 0.5),
        ("other.h.10.attn.q", 2, 8.0),
        ("q", 2, 8.0),
        ("faq", 8, 2.0),
    ):
        assert config.rank_of(module) == rank, module
        assert config.scaling_of(module) == scaling, module


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft_type": "IA3"},
            r'peft_type must be "LORA"; got \'IA3\'\. Apply it to its base with',
        ),
        ({"peft_type": None}, r'peft_type must be "LORA"; got None'),
        ({"use_dora": True}, r"must be plain LoRA; got DoRA, which also rescales .* \(use_dora\)"),
        ({"target_parameters": ["experts"]}, r"must be plain LoRA; got LoRA of single parameters"),
        ({"trainable_token_indices": [1]}, r"must be plain LoRA; got trained token embeddings"),
        ({"layer_replication": [[0, 2]]}, r"must be plain LoRA; got an adapter of replicated"),
        ({"alora_invocation_tokens": [3]}, r"must be plain LoRA; got activated LoRA"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            r"init_lora_weights must leave the base's .*pissa",
        ),
        ({"init_lora_weights": "olora"}, r"got 'olora', whose B·A is relative to a changed base"),
        ({"r": 0}, r"adapter_config\.json: r must be a positive integer; got 0\. Correct"),
        ({"r": True}, r"r must be a positive integer; got True"),
        ({"r": None}, r"r must be a positive integer; got None"),
        ({"lora_alpha": "16"}, r"lora_alpha must be a finite number; got '16'"),
        ({"lora_alpha": float("inf")}, r"lora_alpha must be a finite number; got inf"),
        ({"use_rslora": "yes"}, r"use_rslora must be true or false; got 'yes'"),
        ({"fan_in_fan_out": 1}, r"fan_in_fan_out must be true or false; got 1"),
        ({"rank_pattern": [1]}, r"rank_pattern must be values by pattern; got \[1\]"),
        ({"rank_pattern": {"q": 0.5}}, r"rank_pattern\['q'\] must be a positive integer; got 0\.5"),
        ({"alpha_pattern": {"q": None}}, r"alpha_pattern\['q'\] must be a finite number; got None"),
        ({"task_type": 3}, r"task_type must be a text or null; got 3"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_adapter_config(written(tmp_path, PLAIN | changes))


@pytest.mark.parametrize("begun", [None, True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_ways_to_begin_that_leave_the_base_alone_are_taken(tmp_path: Path, begun: object) -> None:
    assert read_adapter_config(written(tmp_path, PLAIN | {"init_lora_weights": begun})).rank == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"adapter_config\.json: must be JSON; got"),
        ('{"r": 1, "r": 2}', r"must be JSON; got the name 'r' stands there twice"),
        ("[]", r"must be a JSON object; got list"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_adapter_config(tmp_path)


def test_a_pattern_that_is_no_regular_expression_is_refused(tmp_path: Path) -> None:
    config = read_adapter_config(written(tmp_path, PLAIN | {"rank_pattern": {"(": 2}}))
    with pytest.raises(InputError, match=r"patterns must be regular expressions; got '\('"):
        config.rank_of("q")
