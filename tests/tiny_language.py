"""A tiny language: texts of two topics in files, a tokenizer for them, a GPT-2 of a few numbers."""

from __future__ import annotations

import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_merge.tasks import LanguageTask, TransformersCausalLM

SCRIPT = Path(__file__).parents[1] / "examples" / "language" / "make_tokenizer.py"
SIZE = 270
CONFIG: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": SIZE,
    "n_positions": 16,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
WORDS = (
    ("ball", "goal", "team", "wins", "cup"),
    ("bank", "share", "price", "falls", "oil"),
)


def write_texts(path: Path, *, count: int = 12, seed: int = 0, words: int = 8) -> str:
    """Write rows with a text and its topic, and return the path."""
    rng = np.random.default_rng(seed)
    rows = [
        {"text": " ".join(rng.choice(WORDS[i % 2], size=words).tolist()), "label": i % 2}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_tokenizer(folder: Path, files: Sequence[str], *, size: int = SIZE) -> str:
    """Make a tokenizer as the example's script does, and return its folder."""
    script = runpy.run_path(str(SCRIPT))
    texts = script["texts_in"]([Path(file) for file in files], "text")
    script["make_tokenizer"](texts, size=size, output=folder)
    return str(folder)


def tiny_task(folder: Path, **options: Any) -> LanguageTask:
    """Return a task over new files in a folder; with the options of LanguageTask."""
    files = {
        "train": write_texts(folder / "train.jsonl"),
        "test": write_texts(folder / "test.jsonl", count=6, seed=1),
    }
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        write_tokenizer(tokenizer, list(files.values()))
    return LanguageTask(**{**files, "tokenizer": str(tokenizer), "block_length": 8, **options})


def tiny_model(**options: Any) -> TransformersCausalLM:
    """Return a fresh model."""
    return TransformersCausalLM("tiny", config=CONFIG, **options)
