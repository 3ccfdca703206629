"""What merging files costs, beside a bare copy of the same bytes and beside mergekit.

    python benchmarks/merge.py [--sizes 250M 1B] [--methods TaskArithmetic TIES] [--rounds 5]
    python benchmarks/merge.py --install-peers    # mergekit, in an environment of its own
    python benchmarks/merge.py --mergekit PYTHON  # or the Python that has it

A base and four experts with random weights (:mod:`merge_models`), bf16, Hessians in fp32. All take
turns, each in a process of its own:

- the floor: pread of all inputs, pwrite of as many bytes as the merge writes (:mod:`merge_floor`);
- the library: ``lit_merge.merge`` without its imports (:mod:`merge_library`);
- the command: ``python -m lit_merge merge --config``, the whole process;
- mergekit: ``mergekit-yaml``, the whole process, and without its imports.

CPU seconds are user + system of all threads. Shown are medians over the rounds; the ratio is to the
floor of the same round. 1B needs 26 GB of disk (2 GB for each model, 4 GB for each Hessian), and is
not held by the page cache of a small machine: compare CPU seconds there, not wall.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_process import Cost, Failure, environment, install_mergekit, run
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
EXPERTS = ("expert1", "expert2", "expert3", "expert4")
FLOOR, LIBRARY, COMMAND = "floor", "library", "command"
MERGEKIT, MERGEKIT_ALONE = "mergekit", "mergekit less imports"


@dataclass(frozen=True)
class Case:
    """A method as both programs call it.

    Attributes:
        arguments: Of the class in lit_merge.methods.
        peer: mergekit's name of it; None where it has none.
        parameters: mergekit's, for the merge and for each expert.
        based: Whether there is a base.
        reads_hessians: Whether the experts' Hessians are read.
        floor_goal: How often the floor's CPU it may cost.
        peer_goal: How much less CPU than mergekit it shall cost.
    """

    arguments: dict[str, Any]
    peer: str | None
    parameters: tuple[dict[str, Any], dict[str, Any]] = field(default=({}, {}))
    based: bool = True
    reads_hessians: bool = False
    floor_goal: float | None = None
    peer_goal: float | None = None


CASES = {
    "TaskArithmetic": Case(
        {"scale": 0.3},
        "task_arithmetic",
        ({"normalize": False}, {"weight": 0.3}),
        floor_goal=2.5,
        peer_goal=8.0,
    ),
    "TIES": Case(
        {"density": 0.2, "scale": 0.3},
        "ties",
        ({"normalize": False}, {"density": 0.2, "weight": 0.3}),
        floor_goal=5.0,
        peer_goal=40.0,
    ),
    "GradientMatching": Case({}, None, reads_hessians=True, floor_goal=3.5),
    "DARE": Case(
        {"density": 0.2, "scale": 0.3},
        "dare_linear",
        ({"normalize": False}, {"density": 0.2, "weight": 0.3}),
    ),
    "Average": Case({}, "linear", ({"normalize": True}, {"weight": 1.0}), based=False),
}


@dataclass
class Results:
    """The costs of every program, one for each round that it ran in; the reason of a failure."""

    costs: dict[str, list[Cost]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, program: str, what: str) -> float | None:
        """Return the median of ``cpu``, ``wall`` or ``peak``; None without a measurement."""
        values = [getattr(cost, what) for cost in self.costs[program]]
        return statistics.median(values) if values else None

    def ratio(self, program: str, to: str) -> float | None:
        """Return how many times the CPU of another program it takes, round by round."""
        pairs = zip(self.costs[program], self.costs[to], strict=False)
        ratios = [own.cpu / other.cpu for own, other in pairs if other.cpu]
        return statistics.median(ratios) if ratios else None


def measure(name: str, models: Path, options: argparse.Namespace) -> Results:
    """Let all programs take turns on one method."""
    case, results = CASES[name], Results()
    experts = [models / expert for expert in EXPERTS]
    inputs = [m / "model.safetensors" for m in ([models / "base"] if case.based else []) + experts]
    if case.reads_hessians:
        inputs += [expert / "hessian.safetensors" for expert in experts]
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=models) as folder:
            work = Path(folder)
            attempt(results, LIBRARY, _library(name, models, work / "out"), options)
            size = sum(f.stat().st_size for f in work.glob("out/**/*.safetensors"))
            _remove(work / "out")
            floor = [str(HERE / "merge_floor.py"), str(work / "copy"), str(size), *map(str, inputs)]
            attempt(results, FLOOR, [sys.executable, "-S", *floor], options)
            _remove(work / "copy")
            attempt(results, COMMAND, _command(name, models, work), options)
            _remove(work / "out")
            if options.mergekit and case.peer and number < options.mergekit_rounds:
                command = _mergekit(options.mergekit, case, models, work)
                attempt(results, MERGEKIT, command, options)
                alone = [options.mergekit, "-c", "import mergekit.scripts.run_yaml"]
                attempt(results, MERGEKIT_ALONE, alone, options)
    whole, imports = results.costs[MERGEKIT], results.costs.pop(MERGEKIT_ALONE, [])
    results.costs[MERGEKIT_ALONE] = [
        Cost(a.cpu - b.cpu, a.wall - b.wall, a.peak - b.peak)
        for a, b in zip(whole, imports, strict=False)
    ]
    return results


def attempt(
    results: Results, program: str, command: list[str], options: argparse.Namespace
) -> None:
    """Run a program once, unless it has failed before."""
    if program in results.failures:
        return
    try:
        results.costs[program].append(run(command, limit=options.limit, own=program == LIBRARY))
    except Failure as failure:
        results.failures[program] = str(failure)


def _library(name: str, models: Path, output: Path) -> list[str]:
    case = CASES[name]
    settings = {
        "method": name,
        "arguments": case.arguments,
        "base": str(models / "base") if case.based else None,
        "experts": [str(models / expert) for expert in EXPERTS],
        "output": str(output),
    }
    return [sys.executable, str(HERE / "merge_library.py"), json.dumps(settings)]


def _command(name: str, models: Path, work: Path, experts: tuple[str, ...] = EXPERTS) -> list[str]:
    case = CASES[name]
    content = {
        "base": str(models / "base") if case.based else None,
        "experts": [str(models / expert) for expert in experts],
        "method": {"class_path": name, "init_args": case.arguments},
        "output": str(work / "out"),
    }
    (work / "merge.yaml").write_text(json.dumps(content))  # JSON is YAML
    return [sys.executable, "-m", "lit_merge", "merge", "--config", str(work / "merge.yaml")]


def _mergekit(python: str, case: Case, models: Path, work: Path) -> list[str]:
    overall, each = case.parameters
    content = {
        "merge_method": case.peer,
        "parameters": overall,
        "models": [{"model": str(models / expert), "parameters": each} for expert in EXPERTS],
        "dtype": "bfloat16",
    }
    if case.based:
        content["base_model"] = str(models / "base")
    (work / "mergekit.yaml").write_text(json.dumps(content))
    module = "mergekit.scripts.run_yaml"
    config, output = str(work / "mergekit.yaml"), str(work / "peer")
    return [python, "-m", module, config, output, "--no-copy-tokenizer", "--quiet"]


def table_of(title: str, results: Results) -> Table:
    """Return one row for each program."""
    table = Table("program", "CPU s", "× floor", "wall s", "peak MB", "", title=title)
    for program in (FLOOR, LIBRARY, COMMAND, MERGEKIT, MERGEKIT_ALONE):
        failure = results.failures.get(program, "")
        if not results.costs[program] and not failure:
            continue
        peak = results.median(program, "peak")
        table.add_row(
            program,
            _text(results.median(program, "cpu")),
            _text(results.ratio(program, FLOOR)),
            _text(results.median(program, "wall")),
            "–" if peak is None else f"{'+' if program == LIBRARY else ''}{peak / 1e6:.0f}",
            failure,
        )
    return table


def goals(size: str, name: str, results: Results) -> list[tuple[str, ...]]:
    """Return what is asked of a method, and what it does."""
    case, what = CASES[name], f"{name}, {size}"
    rows = []
    ratio, peak = results.ratio(LIBRARY, FLOOR), results.median(LIBRARY, "peak")
    if case.floor_goal is not None and ratio is not None:
        rows.append(_goal(what, "CPU of the library, × floor", ratio, case.floor_goal, "at most"))
    if peak is not None:
        rows.append(_goal(what, "memory beside imports, MB", peak / 1e6, 64.0, "at most"))
    for peer, own in ((MERGEKIT, COMMAND), (MERGEKIT_ALONE, LIBRARY)):
        ratio = results.ratio(peer, own)
        if ratio is not None and case.peer_goal is not None:
            label = f"CPU of {peer}, × {own}"
            rows.append(_goal(what, label, ratio, case.peer_goal, "at least"))
    return rows


def minilm(options: argparse.Namespace) -> tuple[str, ...]:
    """Return how long the command takes for two experts of MiniLM, imports included."""
    models = options.cache / "MiniLM"
    results = Results()
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=models) as folder:
            command = _command("TaskArithmetic", models, Path(folder), EXPERTS[:2])
            attempt(results, COMMAND, command, options)
    wall = results.median(COMMAND, "wall")
    if wall is None:
        return ("two MiniLM experts", "command, wall s", results.failures[COMMAND], "4.00", "")
    return _goal("two MiniLM experts", "command, wall s", wall, 4.0, "at most")


def _goal(what: str, of: str, value: float, goal: float, kind: str) -> tuple[str, ...]:
    met = value <= goal if kind == "at most" else value >= goal
    return what, of, f"{value:.2f}", f"{kind} {goal:g}", "met" if met else "missed"


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=("50M", "250M", "1B"), default=["250M", "1B"])
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="50M only, three rounds")
    parser.add_argument("--cache", type=Path, help="keep the models here; else they are deleted")
    parser.add_argument("--mergekit", help="the Python that has mergekit")
    parser.add_argument("--install-peers", action="store_true", help="install mergekit")
    parser.add_argument("--mergekit-rounds", type=int, default=1)
    parser.add_argument("--limit", type=float, default=900, help="seconds for one run")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.rounds = ["50M"], 3
    peers = Path(tempfile.gettempdir()) / "lit-merge-peers"
    if options.install_peers:
        install_mergekit(peers)
    if options.mergekit is None and (peers / "complete").exists():
        options.mergekit = str(peers / "bin" / "python")
    return options


def main() -> None:
    """Print a table for each size and method, and one of what is asked."""
    options = _options()
    console = Console(width=120)
    if options.mergekit is None:
        console.print("mergekit is left out: name its Python by --mergekit, or --install-peers")
    console.print(environment())
    asked = Table("what", "", "is", "asked", "", title="What is asked")
    with tempfile.TemporaryDirectory() as temporary:
        options.cache = options.cache or Path(temporary)
        for size in ("MiniLM", *options.sizes):
            command = [sys.executable, str(HERE / "merge_models.py"), str(options.cache), size]
            try:
                run(command, limit=3600)
            except Failure as failure:
                console.print(f"{size} is left out: {failure}")
                continue
            if size == "MiniLM":
                asked.add_row(*minilm(options))
                continue
            for name in options.methods:
                results = measure(name, options.cache / size, options)
                console.print(table_of(f"{name}, {size}, base + 4 experts", results))
                for row in goals(size, name, results):
                    asked.add_row(*row)
            if options.cache == Path(temporary):
                shutil.rmtree(options.cache / size)
    console.print(asked)


if __name__ == "__main__":
    main()
