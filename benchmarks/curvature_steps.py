"""What the curvature estimates that come with training add to a step with AdamW.

    python benchmarks/curvature_steps.py [--rounds 9]

MiniLM with 64 tokens, batch 32. A step is zero_grad, forward, backward and optimizer; the estimate
is taken between backward and optimizer. All parts take turns in one process; CPU seconds, medians
over the rounds and ranges. Adam's own second moment costs nothing in a step: it is read once, at
the end of the training.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from curvature import cpu_seconds
from curvature_cases import BATCH, build, mean_loss
from rich.console import Console
from rich.table import Table
from torch.optim import AdamW

from lit_merge.curvature import SquaredBatchGradient, adam_second_moment

GOAL = 0.02  # of a step
OPTIMIZERS: dict[str, dict[str, Any]] = {"foreach": {"foreach": True}, "fused": {"fused": True}}


def measure(settings: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each part of each step with one form of AdamW."""
    case = build("MiniLM, T=64")
    parameters = case.parameters()
    names = {parameter: name for name, parameter in parameters.items()}
    optimizer = AdamW(parameters.values(), lr=1e-5, **settings)
    estimator = SquaredBatchGradient()

    def gradients() -> None:
        optimizer.zero_grad()
        mean_loss(case.model, case.batch).backward()

    def estimate() -> None:
        held = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        estimator.update(held, num_examples=BATCH)

    def read_moment() -> None:
        adam_second_moment(optimizer, names, num_examples=1000, batch_size=BATCH)

    parts = {
        "forward + backward": gradients,
        "squared batch gradient": estimate,
        "optimizer": optimizer.step,
        "Adam's moment, once": read_moment,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(rounds + 1):
        for name, part in parts.items():
            spent = cpu_seconds(part)
            if number > 0:  # the first step allocates
                seconds[name].append(spent)
    return seconds


def share(parts: Sequence[float], wholes: Sequence[float]) -> str:
    """Return the median of the ratios in percent, and their range."""
    ratios = [100 * part / whole for part, whole in zip(parts, wholes, strict=True)]
    return f"{statistics.median(ratios):.1f} % ({min(ratios):.1f}..{max(ratios):.1f})"


def main() -> None:
    """Print a line for each optimizer and estimate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table(
        "AdamW", "estimate", "ms", "of a step", "of the optimizer alone", "≤ 2 % of a step"
    )
    for name, settings in OPTIMIZERS.items():
        seconds = measure(settings, options.rounds)
        optimizer = seconds["optimizer"]
        steps = [a + b for a, b in zip(seconds["forward + backward"], optimizer, strict=True)]
        for estimate in ("squared batch gradient", "Adam's moment, once"):
            own = seconds[estimate]
            ratio = statistics.median(a / b for a, b in zip(own, steps, strict=True))
            once = estimate.endswith("once")
            table.add_row(
                name,
                estimate,
                f"{1e3 * statistics.median(own):.1f}",
                share(own, steps),
                share(own, optimizer),
                "once only" if once else "met" if ratio <= GOAL else "missed",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
