"""What each part of the least-squares sweep is worth: one part left out at a time.

    python benchmarks/correction_ablation.py --seeds 0

The experts are those of ``benchmarks/correction.py``, from the same cache. Every line is a sweep
over the average of the experts with 512 unlabelled images a task; no line learns anything.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from correction import LABELLED, UNLABELLED
from correction_cases import LOCALITIES, prepare
from correction_data import missing_data, task_images
from correction_experts import DEFAULT_CACHE, Zoo
from correction_models import ARCHITECTURES
from correction_stages import Bench, quiet
from rich.console import Console
from rich.table import Table

from lit_merge.least_squares import LeastSquares
from lit_merge.methods import Average

PLAIN = {
    "skips": False,
    "sensitivity": 0.0,
    "scales": "statistics",
    "heads": False,
}
"""Layer-wise regression with TACT on the way, as in the trials that came before."""

VARIANTS: dict[str, dict[str, object]] = {
    "RegMean++ on the way of TACT": {**PLAIN, "wanted": "weights"},
    "the experts' outputs wanted": PLAIN,
    "+ skips": {**PLAIN, "skips": True},
    "+ regression instead of TACT": {**PLAIN, "skips": True, "scales": "regression"},
    "+ sensitivity": {"heads": False},
    "+ heads: all defaults": {},
    "all but skips": {"skips": False},
    "all but sensitivity": {"sensitivity": 0.0},
    "all but regression": {"scales": "statistics"},
    "all, ridge 0.1": {"ridge": 0.1},
    "all, ridge 0.01": {"ridge": 0.01},
    "all, norms too": {"norms": True},
}


def main() -> None:
    """Run all variants on all cases."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--localities", nargs="+", choices=LOCALITIES, default=LOCALITIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="of trained experts")
    options = parser.parse_args()
    console, reason = Console(), missing_data()
    if reason is not None:
        console.print(f"skipped: {reason}")
        return
    quiet()
    tasks = task_images()
    table = Table("% of the experts, mean over the tasks")
    found: dict[str, list[str]] = {name: [] for name in VARIANTS}
    found["no alignment: all defaults"] = []
    for architecture in options.architectures:
        for locality in options.localities:
            for seed in options.seeds:
                table.add_column(f"{architecture}\n{locality}\nseed {seed}", justify="right")
                zoo = Zoo(options.cache, architecture, seed)
                case = prepare(zoo, locality, tasks, unlabelled=UNLABELLED, labelled=LABELLED)
                with tempfile.TemporaryDirectory() as work:
                    bench = Bench(case, Path(work))

                    def measure(
                        name: str, settings: dict[str, object], bench: Bench = bench
                    ) -> None:
                        module = bench.merge(Average(), least_squares=LeastSquares(**settings))  # type: ignore[arg-type]
                        row = bench.run(name, module)
                        found[name].append(f"{row.mean:.1f}")
                        console.print(f"{row.mean:6.1f} %  {row.seconds:5.1f} s  {name}")

                    if locality == "non-local":
                        measure("no alignment: all defaults", {})
                        bench.align()
                    else:
                        found["no alignment: all defaults"].append("–")
                    for name, settings in VARIANTS.items():
                        measure(name, settings)
    for name, values in found.items():
        table.add_row(name, *values)
    console.print(table)


if __name__ == "__main__":
    main()
