"""How much the exact per-example diagonal costs: the pass against plain forward + backward.

    python benchmarks/curvature.py [--threads 1] [--rounds 15]

One process; the two take turns on the same batches of 32, and the medians of the CPU times are
compared. "loop" is the same curvature from batches of one example, timed once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lit_merge.curvature import PerExampleFisher

BATCH = 32


def minilm() -> tuple[nn.Module, Any, Callable[[nn.Module, Any], Tensor]]:
    """The shape of all-MiniLM-L6 (22.7 M parameters), 64 tokens, two classes."""
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    tokens = torch.randint(1000, 30000, (BATCH, 64))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    batch["labels"] = torch.randint(2, (BATCH,))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        result: Tensor = model(**batch).loss
        return result

    return BertForSequenceClassification(config), batch, loss


def image_classifier(name: str, size: int, **options: Any) -> tuple[nn.Module, Any, Any]:
    """A model of timm with ten classes on random images."""
    model = timm.create_model(name, num_classes=10, **options)
    batch = (torch.randn(BATCH, 3, size, size), torch.randint(10, (BATCH,)))
    return model, batch, lambda net, b: F.cross_entropy(net(b[0]), b[1])


CASES: dict[str, Callable[[], tuple[nn.Module, Any, Any]]] = {
    "MiniLM, T=64": minilm,
    "ViT-tiny, T=65": lambda: image_classifier(
        "vit_tiny_patch16_224", 64, img_size=64, patch_size=8
    ),
    "ResNet18, 64x64": lambda: image_classifier("resnet18", 64),
}


def seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of the process, all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Print one line per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    table = Table("model", "forward+backward, s", "pass, s", "ratio", "loop, s", "loop ratio")
    for name, build in CASES.items():
        model, batch, loss = build()
        model.eval()

        def plain(model: nn.Module = model, batch: Any = batch, loss: Any = loss) -> None:
            model.zero_grad()
            loss(model, batch).backward()

        fisher = PerExampleFisher(model, loss, labels="observed")
        fisher.update(batch)  # with the probe, once
        plain()
        pairs = [
            (seconds(plain), seconds(lambda f=fisher, b=batch: f.update(b)))
            for _ in range(options.rounds)
        ]
        floor, cost = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(own / reference for reference, own in pairs)

        def loop(model: nn.Module = model, batch: Any = batch, loss: Any = loss) -> None:
            squares = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
            for i in range(BATCH):
                one = (
                    {key: value[i : i + 1] for key, value in batch.items()}
                    if isinstance(batch, dict)
                    else tuple(value[i : i + 1] for value in batch)
                )
                model.zero_grad()
                loss(model, one).backward()
                for parameter_name, parameter in model.named_parameters():
                    if parameter.grad is not None:
                        squares[parameter_name] += parameter.grad**2

        slow = seconds(loop)
        table.add_row(
            name,
            f"{floor:.3f}",
            f"{cost:.3f}",
            f"{ratio:.2f}",
            f"{slow:.3f}",
            f"{slow / floor:.2f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
