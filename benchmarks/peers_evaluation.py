"""The one evaluator: accuracy and negative log-likelihood of an encoder with the experts' heads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peers_experts import CLASSES, DATA, EXPERTS, text_task
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_merge import TextTask

BATCH = 64


class Evaluator:
    """Tests an encoder with each expert's head, on batches of texts of like lengths.

    Args:
        models: The folder of the experts.
        examples: Test texts of each task at most; None takes all.
        max_length: Tokens of a text at most.
    """

    def __init__(self, models: Path, examples: int | None, max_length: int) -> None:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        auto: Any = AutoModelForSequenceClassification
        self.models: dict[str, nn.Module] = {}
        self.heads: dict[str, dict[str, Tensor]] = {}
        self.batches: dict[str, list[tuple[Mapping[str, Tensor], Tensor]]] = {}
        for name in EXPERTS:
            config = AutoConfig.from_pretrained(models / name, num_labels=CLASSES[name])
            self.models[name] = auto.from_config(config).eval()
            self.heads[name] = load_file(models / name / "head.safetensors")
            settings = text_task(
                name,
                test=str(DATA / name / "test.jsonl"),
                max_length=max_length,
                max_eval_examples=examples,
            )
            task = TextTask(**settings["init_args"])
            test = task.test
            assert test is not None  # its file is given
            texts = sorted(
                (test[i] for i in range(len(test))), key=lambda t: len(t[0]["input_ids"])
            )
            parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
            self.batches[name] = [task.collate(part) for part in parts]

    @torch.no_grad()
    def __call__(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the means over the tasks: ``accuracy`` in percent and ``nll`` in nats."""
        encoder = {f"bert.{name}": tensor.float() for name, tensor in weights.items()}
        accuracies, losses = [], []
        for name, batches in self.batches.items():
            model = self.models[name]
            model.load_state_dict({**encoder, **self.heads[name]})
            logits = torch.cat([model(**inputs).logits for inputs, _ in batches])
            labels = torch.cat([labels for _, labels in batches])
            accuracies.append(float((logits.argmax(1) == labels).double().mean()))
            losses.append(float(F.cross_entropy(logits.double(), labels)))
        return {
            "accuracy": 100 * sum(accuracies) / len(accuracies),
            "nll": sum(losses) / len(losses),
        }
