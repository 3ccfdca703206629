"""What the exact per-example diagonal costs, beside plain forward + backward and other libraries.

    python benchmarks/curvature.py [--cases MiniLM ViT] [--engines lit-merge loop] [--rounds 7]

Batches of 32. Time: all engines of a case take turns in one process; CPU seconds of all threads,
medians over the rounds, and the ratio to forward + backward of the same round with its range.
Memory: a process for each engine (:mod:`curvature_memory`). Right or wrong: against a float64
loop over three examples.

The other libraries are optional. They ask for versions of what the project has, too, so they get
an environment of their own:

    python -m venv --system-site-packages peers     # or a new one with `pip install -e .`
    peers/bin/pip install '.[bench]'
    peers/bin/python benchmarks/curvature.py

Those that are not installed are left out, those that fail are named with the reason.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from curvature_cases import CASES, Case, compare, mean_loss, truth
from curvature_cases import build as build_case
from curvature_engines import ENGINES, Run, beside_once, ours_once
from curvature_memory import allowance, peak_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_merge.curvature import PerExampleFisher

FLOOR = "forward + backward"
OURS = "lit-merge"
BESIDE = "lit-merge beside training"
ONCE = {OURS: ours_once, BESIDE: beside_once}  # their sums grow with every batch
CHECKED = 3  # examples that an engine is checked on


@dataclass
class Result:
    """What is known of one engine on one case.

    Attributes:
        verdict: Right, wrong or failed, in words.
        run: The prepared engine, None if it does not run.
        seconds: Of CPU, one for each round.
        peak: Bytes added at the peak, None if not measured.
    """

    verdict: str
    run: Run | None = None
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Return the CPU seconds of the process, all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def prepare(name: str, engine: str, expected: dict[str, Tensor]) -> Result:
    """Build a case for an engine and check what it computes."""
    case = build_case(name)
    checked = case.first(CHECKED)
    try:
        run = ENGINES[engine](case)
        if engine == FLOOR:
            return Result("", run)
        found = ONCE[engine](case, checked) if engine in ONCE else run(checked)
    except ImportError as error:
        return Result(f"not installed: {error}")
    except Exception as error:  # anything may come from a library
        line = str(error).strip().partition("\n")[0]
        return Result(f"fails: {type(error).__name__}: {line[:90]}")
    accuracy = compare(found, expected)
    if accuracy.right:
        return Result(f"right ({accuracy.error:.0e})", run)
    total = len(expected)
    parts = []
    if accuracy.wrong:
        worst = f"the worst by {accuracy.error:.0e} ({accuracy.worst})"
        parts.append(f"{accuracy.wrong} of {total} tensors, {worst}")
    if accuracy.missing:
        parts.append(f"{accuracy.missing} of {total} tensors missing")
    return Result("WRONG: " + "; ".join(parts), run)


def measure(name: str, engines: list[str], *, rounds: int, memory: bool) -> dict[str, Result]:
    """Check the engines on a case, let them take turns, and measure their memory."""
    expected = truth(name, CHECKED)
    results = {engine: prepare(name, engine, expected) for engine in engines}
    batch = build_case(name).batch
    running = {engine: r for engine, r in results.items() if r.run is not None}
    for number in range(rounds + 1):
        for result in running.values():
            assert result.run is not None
            run = result.run
            spent = cpu_seconds(lambda run=run: run(batch))  # type: ignore[misc]
            if number > 0:  # the first one warms up
                result.seconds.append(spent)
    if memory:
        for engine, result in running.items():
            result.peak = peak_bytes(name, engine)
    return results


def probe_seconds(name: str, times: int = 3) -> float:
    """Return the median CPU seconds of the probe that the pass begins with."""
    case = build_case(name)

    def probe() -> None:
        PerExampleFisher(case.model, mean_loss, labels="observed").probe(case.first(2))

    return statistics.median(cpu_seconds(probe) for _ in range(times))


def engine_table(name: str, results: dict[str, Result]) -> Table:
    """Return one row for each engine."""
    table = Table("engine", "CPU s", "ratio", "min..max", "peak MB", "ratio", "result", title=name)
    floor = results[FLOOR]
    for engine, result in results.items():
        ratios = [own / base for own, base in zip(result.seconds, floor.seconds, strict=False)]
        times = ("–", "–", "–")
        if ratios:
            times = (
                f"{statistics.median(result.seconds):.3f}",
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f}..{max(ratios):.2f}",
            )
        peaks = ("–", "–")
        if result.peak is not None and floor.peak is not None:
            peaks = (f"{result.peak / 1e6:.0f}", f"{result.peak / floor.peak:.2f}")
        table.add_row(engine, *times, *peaks, result.verdict)
    return table


def limit_rows(name: str, case: Case, results: dict[str, Result]) -> list[tuple[str, ...]]:
    """Return what is asked of the pass on a case, and what it does."""
    ours, floor = results[OURS], results[FLOOR]
    goals = {OURS: 1.25 if name.startswith("ResNet") else 1.10, BESIDE: 1.45}
    rows = []
    for engine, goal in goals.items():
        pairs = zip(results[engine].seconds, floor.seconds, strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        what = f"time of {engine}"
        rows.append((name, what, f"{ratio:.2f}", f"{goal:.2f}", _met(ratio, goal)))
    if ours.peak is not None and floor.peak is not None:
        bound = floor.peak + allowance(case)
        rows.append((name, "peak bytes", f"{ours.peak:,}", f"{bound:,}", _met(ours.peak, bound)))
    probe = probe_seconds(name)
    return [*rows, (name, "probe, CPU s", f"{probe:.2f}", "2.00", _met(probe, 2.0))]


def _met(value: float, goal: float) -> str:
    return "met" if value <= goal else "missed"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=[""], help="beginnings of their names")
    parser.add_argument("--engines", nargs="+", default=[""], help="parts of their names")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    return parser.parse_args()


def main() -> None:
    """Print a table for each case, and one of what is asked of the pass."""
    options = _options()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # of the other libraries
    engines = [
        name
        for name in ENGINES
        if name in (FLOOR, OURS, BESIDE) or any(part in name for part in options.engines)
    ]
    console = Console(width=150)
    limits = Table("model, batch 32", "what", "is", "at most", "", title="What is asked")
    for name in CASES:
        if not name.startswith(tuple(options.cases)):
            continue
        results = measure(name, engines, rounds=options.rounds, memory=options.memory)
        console.print(engine_table(name, results))
        for row in limit_rows(name, build_case(name), results):
            limits.add_row(*row)
    console.print(limits)


if __name__ == "__main__":
    main()
