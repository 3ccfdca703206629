"""A tiny BERT with its tokenizer, and small sets of made-up texts, as folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

_SIGNS = ("good", "bad", "long", "short", "loud", "calm")
_FILLERS = ("a", "film", "very", "the", "book", "plot")


def tokenizer_in(folder: Path) -> str:
    """Write a tokenizer that knows the words of these texts."""
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_SIGNS, *_FILLERS]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def bert_in(folder: Path) -> str:
    """Write a pretrained model without a head, and its tokenizer."""
    from transformers import BertConfig, BertModel

    tokenizer_in(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    model = BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # the default, 0.02, leaves nothing to measure
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def texts_in(folder: Path, classes: Mapping[str, int], *, count: int = 24) -> str:
    """Write ``<folder>/<set>/{train,test}.jsonl`` and return the folder.

    Args:
        folder: Where to.
        classes: Number of classes by set; a text of class c holds the c-th word of signs.
        count: Texts per split.
    """
    for number, (name, num_classes) in enumerate(classes.items()):
        random = np.random.default_rng(number)
        for split in ("train", "test"):
            rows = []
            for i in range(count):
                words = [*random.choice(_FILLERS, random.integers(2, 8)), _SIGNS[i % num_classes]]
                rows.append({"text": " ".join(random.permutation(words)), "label": i % num_classes})
            (folder / name).mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(text)
    return str(folder)
