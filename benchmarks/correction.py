"""One model as good as its experts? Every stage of the correction, beside its controls.

    python benchmarks/correction.py [--quick] [--steps 300 1000] [--cache FOLDER] [--processes 2]

A small ResNet with BatchNorm and a small ViT, pretrained and fine-tuned here on the images of
``../shared/data/vision`` (:mod:`correction_experts`; kept in the cache), four tasks with heads of
their own, local (one base) and non-local (a base each, aligned first). Every number is the test
accuracy as per cent of the expert's, averaged over the tasks. No stage sees a label; all see the
same 512 images a task.

The controls, on the same images: the same correction on the unmerged base, with the (aligned)
experts' heads; a linear head refitted on 256 labelled images; REPAIR, one scale and shift for all
tasks; and distilling all weights, heads too, for the CPU seconds of a learned stage.

Cases run side by side, each in a process with one thread. Seconds are CPU seconds of one stage
alone, which mean the same on a busy machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from correction_cases import LOCALITIES, Case, prepare
from correction_controls import distil, refitted_heads, shared_body
from correction_data import missing_data, task_images
from correction_experts import DEFAULT_CACHE, Zoo
from correction_models import ARCHITECTURES
from correction_stages import Bench, Clock, Row, quiet
from rich.console import Console
from rich.table import Table

from lit_merge.least_squares import LeastSquares
from lit_merge.methods import Average, GradientMatching, TaskArithmetic

UNLABELLED, LABELLED = 512, 256
# Chosen on seed 0: the first on the local ViT, the last for each architecture.
SCALE_SHIFT: dict[str, Any] = {"lr": 1e-2, "feature_weight": 5.0}
ALL_WEIGHTS: dict[str, dict[str, Any]] = {
    "cnn": {"trainable": "all", "lr": 3e-3, "weights_lr": 6e-3, "feature_weight": 0.0},
    "vit": {"trainable": "all", "lr": 3e-3, "weights_lr": 3e-3, "feature_weight": 5.0},
}
# One model for all tasks cannot have the features of four experts.
ONE_MODEL: dict[str, dict[str, Any]] = {
    "cnn": {},
    "vit": {"feature_weight": 0.0, "heads": "refit"},
}
# Mixup lost a point on the CNN.
MIXED_STEPS: dict[str, tuple[int, ...]] = {"cnn": (), "vit": (1000,)}
NO_DATA, CONTROLS, STAGES = "without data", "controls", "stages"
CLOSED_FORM = "least squares + scale and shift"
SCALES, WEIGHTS, MIXED = "+ learned scale and shift", "+ all weights", " with mixup"


@dataclass
class Results:
    """What was measured of one architecture and locality.

    Attributes:
        rows: By seed.
        notes: What stands below the table.
    """

    rows: dict[int, list[Row]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def without_data(bench: Bench) -> Iterator[Row]:
    """Yield the merges that see no data."""
    yield bench.run("average", bench.merge(Average(), closed_form="none"))
    arithmetic = bench.merge(TaskArithmetic(0.3), closed_form="none")
    yield bench.run("task arithmetic, 0.3", arithmetic)
    matching = bench.merge(GradientMatching(), closed_form="none")
    yield bench.run("gradient matching", matching)


def controls(bench: Bench, learned: dict[str, float]) -> Iterator[Row]:
    """Yield the controls.

    Args:
        bench: What is corrected.
        learned: The CPU seconds that each of our own learned fits took, by its row's name.
    """
    base = bench.unmerged(closed_form="none")
    average = bench.merge(Average(), closed_form="none")
    if bench.case.architecture == "cnn":
        anew = bench.merge(Average(), closed_form="none", batch_norm="reestimate")
        yield bench.run("average, BatchNorm measured anew", anew)
    yield bench.run("average + REPAIR", bench.merge(Average(), closed_form="repair"))
    yield bench.run("base", base)
    tact = bench.unmerged(closed_form="tact")
    yield bench.run("base + TACT", tact)
    folder = bench.work / "base-tact"
    tact.save_corrected(str(folder))
    for name in learned:
        if name.startswith(SCALES):
            steps = int(name.rpartition(" ")[2])
            module = bench.resume(folder, **SCALE_SHIFT)
            yield bench.run(f"base + TACT + learned, {steps}", module, steps=steps)
    yield Row("base, heads refitted on 256 labels", refitted_heads(bench.case, base))
    average.configure_model()
    yield Row("average, heads refitted on 256 labels", refitted_heads(bench.case, average))
    for name, seconds in learned.items():
        # The base for as long as scale and shift, the average for as long as all weights.
        start, module = ("base", base) if name.startswith(SCALES) else ("average", average)
        for muon in (False, True) if name.startswith(f"{WEIGHTS},") else (start == "average",):
            network, clock = shared_body(module), Clock()
            rate = ALL_WEIGHTS[bench.case.architecture]["weights_lr"] if muon else 3e-3
            distil(network, bench.case, seconds, lr=rate, muon=muon, mixup=MIXED in name)
            clock.stop()
            how = "Muon" if muon else "AdamW"
            title = f'{start}, all weights distilled by {how}, seconds of "{name}"'
            yield Row(title, bench.case.ratio(network), *clock.read())


def stages(bench: Bench, steps: Sequence[int], learned: dict[str, float]) -> Iterator[Row]:
    """Yield our own stages.

    Args:
        bench: What is corrected.
        steps: Lengths of the learned fits.
        learned: Takes up the CPU seconds of each learned fit, by its row's name.
    """
    yield bench.run("average + TACT", bench.merge(Average(), closed_form="tact"))
    solved = LeastSquares()
    one = bench.merge(Average(), closed_form="none", least_squares=solved)
    yield bench.run("least squares, nothing per task but heads", one)
    module = bench.merge(Average(), closed_form="tact", least_squares=solved)
    yield bench.run(CLOSED_FORM, module)
    folder = bench.work / "closed-form"
    module.save_corrected(str(folder))
    weights = ALL_WEIGHTS[bench.case.architecture]
    mixed = MIXED_STEPS[bench.case.architecture]
    fits: list[tuple[str, dict[str, Any], Sequence[int]]]
    fits = [(SCALES, SCALE_SHIFT, steps), (WEIGHTS, weights, steps)]
    if mixed:
        fits.append((WEIGHTS + MIXED, {**weights, "mixup": 1.0}, mixed))
    for name, settings, counts in fits:
        for count in counts:
            row = bench.run(f"{name}, {count}", bench.resume(folder, **settings), steps=count)
            learned[row.name] = row.seconds
            yield row
    # The last of them again with the same weights for all tasks: no sites, no scale and shift.
    name, settings, counts = fits[-1]
    settings = {**settings, **ONE_MODEL[bench.case.architecture], "sites": []}
    shared = bench.merge(Average(), closed_form="none", least_squares=solved, **settings)
    yield bench.run(f"{name}, {counts[-1]}, nothing per task but heads", shared, steps=counts[-1])


@dataclass(frozen=True)
class Job:
    """One case: what a process measures."""

    architecture: str
    locality: str
    seed: int
    steps: tuple[int, ...]
    cache: Path

    @property
    def name(self) -> str:
        """Architecture, locality and seed."""
        return f"{self.architecture}, {self.locality}, seed {self.seed}"

    @property
    def zoo(self) -> Zoo:
        """Its experts."""
        return Zoo(self.cache, self.architecture, self.seed)

    def case(self) -> Case:
        """Return what is corrected, trained where the cache lacks it."""
        return prepare(
            self.zoo, self.locality, task_images(), unlabelled=UNLABELLED, labelled=LABELLED
        )


def train(jobs: Sequence[Job]) -> None:
    """Train what the cache lacks of one architecture and seed."""
    for job in jobs:
        job.case()


def measure(job: Job) -> tuple[list[Row], list[str]]:
    """Run everything on one case, printing each row when it is there; return rows and notes."""
    case = job.case()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        bench, rows = Bench(case, work), []
        learned: dict[str, float] = {}

        def take(section: str, found: Iterator[Row]) -> None:
            for row in found:
                row.section = section
                rows.append(row)
                print(
                    f"{job.name}: {row.mean:6.1f} %  {row.seconds:6.1f} s  {row.name}", flush=True
                )

        wall = 0.0
        if case.locality == "non-local":
            module = bench.merge(Average(), closed_form="none")
            take(NO_DATA, iter([bench.run("average, not aligned", module)]))
            seconds, wall = bench.align().read()
            print(f"{job.name}: aligned in {seconds:.1f} s", flush=True)
        take(NO_DATA, without_data(bench))
        take(STAGES, stages(bench, job.steps, learned))
        take(CONTROLS, controls(bench, learned))
        slower, folded = bench.inference(work / "closed-form")
    last = job.steps[-1]
    parts = (CLOSED_FORM, f"{SCALES}, {last}", f"{WEIGHTS}, {last}")
    walls = {row.name: row.wall for row in rows}
    taken = [wall + walls[CLOSED_FORM] + walls[fit] for fit in parts[1:]]
    experts = ", ".join(f"{task} {100 * score:.1f} %" for task, score in case.accuracies.items())
    best = next(row for row in rows if row.name == parts[-1])
    by_task = ", ".join(f"{task} {ratio:.1f} %" for task, ratio in best.ratios.items())
    return rows, [
        f"seed {case.seed}: experts {experts}",
        f"  all weights, of the expert: {by_task}",
        f"  alignment, closed form and {last} steps: {taken[0]:.0f} s (scale and shift), "
        f"{taken[1]:.0f} s (all weights)",
        f"  inference: {slower:+.0f} % with corrections, {folded:+.0f} % folded",
    ]


def table(title: str, results: Results) -> Table:
    """Return the table of one architecture and locality."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("% of the experts")
    for name in ("mean", *(f"seed {seed}" for seed in results.rows), "CPU s"):
        shown.add_column(name, justify="right")
    every = list(results.rows.values())
    for section in (NO_DATA, CONTROLS, STAGES):
        shown.add_section()
        names = dict.fromkeys(r.name for rows in every for r in rows if r.section == section)
        for name in names:
            own = [next((r for r in rows if r.name == name), None) for rows in every]
            found = [row for row in own if row is not None]
            shown.add_row(
                name,
                f"{sum(row.mean for row in found) / len(found):.1f}",
                *("" if row is None else f"{row.mean:.1f}" for row in own),
                f"{sum(row.seconds for row in found) / len(found):.1f}",
            )
    return shown


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--localities", nargs="+", choices=LOCALITIES, default=LOCALITIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--steps", nargs="+", type=int, default=[300], help="of the learned fits")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="of trained experts")
    parser.add_argument("--processes", type=int, default=2, help="cases at a time")
    options = parser.parse_args()
    console, begin = Console(), time.perf_counter()
    reason = missing_data()
    if reason is not None:
        console.print(f"skipped: {reason}")
        return
    steps = tuple(sorted(options.steps))
    seeds = options.seeds[: 1 if options.quick else None]
    trainings = [
        [Job(architecture, locality, seed, steps, options.cache) for locality in options.localities]
        for seed in seeds
        for architecture in options.architectures
    ]
    jobs = [job for training in trainings for job in training]
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, spawned, initializer=_prepare_process) as pool:
        list(pool.map(train, trainings))
        console.print(f"experts are there after {(time.perf_counter() - begin) / 60:.1f} minutes")
        measured = dict(zip(jobs, pool.map(measure, jobs), strict=True))
    tables = []
    for architecture in options.architectures:
        for locality in options.localities:
            results = Results()
            for job, (rows, notes) in measured.items():
                if (job.architecture, job.locality) == (architecture, locality):
                    results.rows[job.seed] = rows
                    results.notes += notes
            tables.append((table(f"{architecture}, {locality}", results), results.notes))
    for shown, notes in tables:
        console.print(shown)
        for note in notes:
            console.print(note)
    console.print(f"{(time.perf_counter() - begin) / 60:.1f} minutes")


def _prepare_process() -> None:
    torch.set_num_threads(1)
    quiet()


if __name__ == "__main__":
    main()
