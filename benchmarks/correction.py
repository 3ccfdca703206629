"""One model as good as its experts? Every stage of the correction, beside its controls.

    python benchmarks/correction.py [--quick] [--steps 300 1000] [--cache FOLDER]

A small ResNet with BatchNorm and a small ViT, pretrained and fine-tuned here on the images of
``../shared/data/vision`` (:mod:`correction_experts`; kept in the cache), four tasks with heads of
their own, local (one base) and non-local (a base each, aligned first). Every number is the test
accuracy as per cent of the expert's, averaged over the tasks. No stage sees a label; all see the
same 512 images a task.

The controls, on the same images: the same correction on the unmerged base, with the (aligned)
experts' heads; a linear head refitted on 256 labelled images; REPAIR, one scale and shift for all
tasks; and distilling all weights, heads too, for the CPU seconds of the learned stage.

Seconds are CPU seconds of one stage alone, which mean the same on a busy machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
SCALE_SHIFT = {"lr": 1e-2, "feature_weight": 5.0}
ALL_WEIGHTS = {"trainable": "all", "lr": 3e-3, "weights_lr": 3e-3}
FEATURE_WEIGHT = {"cnn": 0.0, "vit": 5.0}
NO_DATA, CONTROLS, STAGES = "without data", "controls", "stages"
CLOSED_FORM = "least squares + scale and shift"


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


def controls(bench: Bench, learned: dict[int, float]) -> Iterator[Row]:
    """Yield the controls.

    Args:
        bench: What is corrected.
        learned: The CPU seconds that our own learned fit took, by its number of steps.
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
    for steps in learned:
        module = bench.resume(folder, **SCALE_SHIFT)
        yield bench.run(f"base + TACT + learned, {steps}", module, steps=steps)
    yield Row("base, heads refitted on 256 labels", refitted_heads(bench.case, base))
    average.configure_model()
    yield Row("average, heads refitted on 256 labels", refitted_heads(bench.case, average))
    for steps, seconds in learned.items():
        for name, module in (("base", base), ("average", average)):
            network, clock = shared_body(module), Clock()
            distil(network, bench.case, seconds)
            clock.stop()
            title = f"{name}, all weights distilled, seconds of {steps}"
            yield Row(title, bench.case.ratio(network), *clock.read())


def stages(bench: Bench, steps: Sequence[int], learned: dict[int, float]) -> Iterator[Row]:
    """Yield our own stages.

    Args:
        bench: What is corrected.
        steps: Lengths of the learned fits.
        learned: Takes up the CPU seconds of each learned fit of scale and shift.
    """
    yield bench.run("average + TACT", bench.merge(Average(), closed_form="tact"))
    solved = LeastSquares()
    one = bench.merge(Average(), closed_form="none", least_squares=solved)
    yield bench.run("least squares, nothing per task but heads", one)
    module = bench.merge(Average(), closed_form="tact", least_squares=solved)
    yield bench.run(CLOSED_FORM, module)
    folder = bench.work / "closed-form"
    module.save_corrected(str(folder))
    for count in steps:
        module = bench.resume(folder, **SCALE_SHIFT)
        row = bench.run(f"+ learned scale and shift, {count}", module, steps=count)
        learned[count] = row.seconds
        yield row
    for count in steps:
        features = FEATURE_WEIGHT[bench.case.architecture]
        module = bench.resume(folder, **ALL_WEIGHTS, feature_weight=features)
        yield bench.run(f"+ all weights, {count}", module, steps=count)


def measure(
    case: Case, work: Path, steps: Sequence[int], console: Console
) -> tuple[list[Row], list[str]]:
    """Run everything on one case, showing each row when it is there; return rows and notes."""
    bench, rows = Bench(case, work), []
    learned: dict[int, float] = {}

    def take(section: str, found: Iterator[Row]) -> None:
        for row in found:
            row.section = section
            rows.append(row)
            console.print(f"  {row.mean:6.1f} %  {row.seconds:6.1f} s  {row.name}")

    wall = 0.0
    if case.locality == "non-local":
        module = bench.merge(Average(), closed_form="none")
        take(NO_DATA, iter([bench.run("average, not aligned", module)]))
        seconds, wall = bench.align().read()
        console.print(f"  aligned in {seconds:.1f} s")
    take(NO_DATA, without_data(bench))
    take(STAGES, stages(bench, steps, learned))
    take(CONTROLS, controls(bench, learned))

    parts = (CLOSED_FORM, f"+ learned scale and shift, {steps[-1]}", f"+ all weights, {steps[-1]}")
    walls = {row.name: row.wall for row in rows}
    taken = [wall + walls[CLOSED_FORM] + walls[fit] for fit in parts[1:]]
    slower, folded = bench.inference(work / "closed-form")
    experts = ", ".join(f"{task} {100 * score:.1f} %" for task, score in case.accuracies.items())
    return rows, [
        f"seed {case.seed}: experts {experts}",
        f"  alignment, closed form and {steps[-1]} steps: {taken[0]:.0f} s (scale and shift), "
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
    options = parser.parse_args()
    console, begin = Console(), time.perf_counter()
    reason = missing_data()
    if reason is not None:
        console.print(f"skipped: {reason}")
        return
    quiet()
    tasks = task_images()
    tables = []
    for architecture in options.architectures:
        for locality in options.localities:
            results = Results()
            for seed in options.seeds[: 1 if options.quick else None]:
                zoo = Zoo(options.cache, architecture, seed)
                console.print(f"{architecture}, {locality}, seed {seed}")
                case = prepare(zoo, locality, tasks, unlabelled=UNLABELLED, labelled=LABELLED)
                with tempfile.TemporaryDirectory() as work:
                    rows, notes = measure(case, Path(work), sorted(options.steps), console)
                results.rows[seed] = rows
                results.notes += notes
            tables.append((table(f"{architecture}, {locality}", results), results.notes))
    for shown, notes in tables:
        console.print(shown)
        for note in notes:
            console.print(note)
    console.print(f"{(time.perf_counter() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
