"""Other libraries and lit-merge side by side: same inputs, same evaluation.

    python benchmarks/peers.py --output peers [--experts RUNS] [--cache FOLDER]
    python benchmarks/peers.py --install-peers    # the others, in an environment of their own
    python benchmarks/peers.py --python PYTHON    # or the Python that has them

MiniLM and four experts (:mod:`peers_experts`) are merged by fusion-bench's functions, PEFT's
merge_utils, the formula of gradient matching's authors, and mergekit as a command; each beside our
method with the settings that docs/methods.md names for it. Shown are the largest difference of the
weights, the error of each side against the library's own function in float64, accuracy and
negative log-likelihood of both by one evaluator (:mod:`peers_evaluation`), and time and memory,
taken in turn. Then small inputs on which one is wrong (:mod:`peers_inputs`). Everything lies in
OUTPUT/peers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peers_mergekit
from merge_process import environment, install_mergekit
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).parent
LIBRARIES = ("fusion-bench", "PEFT", "authors")
FUSION_BENCH = "fusion-bench==0.2.33"
SAME = 1e-6  # weights that differ by less are evaluated once


def merge_all(python: str, models: Path, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Run every case and return what is to be told of each."""
    reports: list[dict[str, Any]] = []
    for library in LIBRARIES:
        _in_peers(python, "peers_calls.py", str(models), str(folder), library)
        lines = (folder / f"{library}.jsonl").read_text().splitlines()
        reports += [json.loads(line) for line in lines]
    prefixed = models.parent / "prefixed"
    return reports + list(peers_mergekit.compare(python, prefixed, folder, rounds))


def evaluate_all(
    reports: list[dict[str, Any]], models: Path, examples: int | None, max_length: int
) -> None:
    """Add how far both sides' weights are apart, and accuracy and NLL of both, to the reports.

    Weights that are equal are tested once. Tensors that the other library left out are named, and
    taken from ours.
    """
    from peers_cases import State, differing_entries, largest_difference
    from peers_evaluation import Evaluator

    evaluator = Evaluator(models, examples, max_length)
    tested: list[tuple[State, dict[str, float]]] = []
    for report in reports:
        if "failure" in report:
            continue
        print(f"testing: {report['peer']}, {report['name']}", flush=True)
        sides = {side: _weights(report.pop(f"{side}_weights")) for side in ("ours", "peer")}
        left_out = sides["ours"].keys() - sides["peer"].keys()
        report["left_out"] = sorted(left_out)
        sides["peer"].update({name: sides["ours"][name] for name in left_out})
        if report["equal"]:
            report["difference"] = largest_difference(sides["ours"], sides["peer"])
            report["differing"] = differing_entries(sides["ours"], sides["peer"])
        for side, weights in sides.items():
            result = next((r for w, r in tested if largest_difference(w, weights) < SAME), None)
            if result is None:
                result = evaluator(weights)
                tested.append((weights, result))
            report[f"{side}_accuracy"], report[f"{side}_nll"] = result["accuracy"], result["nll"]


def _weights(path: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name.removeprefix("bert."): tensor for name, tensor in load_file(path).items()}


def inputs_findings(python: str, folder: Path) -> list[dict[str, Any]]:
    """Return what came out on the small inputs."""
    file = folder / "findings.json"
    _in_peers(python, "peers_inputs.py", str(file))
    findings: list[dict[str, Any]] = json.loads(file.read_text())
    return findings


def _in_peers(python: str, script: str, *arguments: str) -> None:
    """Run a script in the environment of the other libraries, with this lit-merge."""
    paths = {"PYTHONPATH": str(HERE.parent)}
    command = [python, str(HERE / script), *arguments]
    subprocess.run(command, check=True, env={**os.environ, **paths})


def table_of(reports: list[dict[str, Any]]) -> Table:
    """Return one row for each case; where two numbers stand, the other library's comes first."""
    table = Table(
        "library, function",
        "ours",
        "largest difference",
        "entries",
        "error, theirs / ours",
        "accuracy",
        "NLL",
        "CPU, theirs / ours",
        "peak MB",
        title="Side by side: theirs / ours",
    )
    for report in reports:
        first = f"{report['peer']}: {report['name']}"
        if "failure" in report:
            table.add_row(first, _ours(report), report["failure"][:200])
            continue
        table.add_row(
            first,
            _ours(report),
            _text(report.get("difference"), ".1e"),
            _text(report.get("differing"), "d"),
            _both(report, "error", ".1e"),
            _both(report, "accuracy", ".1f"),
            _both(report, "nll", ".3f"),
            f"{report['ratio']:.2f}" + (" (commands)" if report.get("whole") else ""),
            f"{report['peer_peak'] / 1e6:.0f} / {report['ours_peak'] / 1e6:.0f}",
        )
    return table


def _ours(report: dict[str, Any]) -> str:
    settings = ", ".join(f"{key}={value!r}" for key, value in report["arguments"].items())
    return f"{report['method']}({settings})"


def _both(report: dict[str, Any], what: str, form: str) -> str:
    theirs, ours = report.get(f"peer_{what}"), report.get(f"ours_{what}")
    return "–" if theirs is None else f"{_text(theirs, form)} / {_text(ours, form)}"


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def tell(console: Console, findings: list[dict[str, Any]]) -> None:
    """Print each finding: the input, what the library gives, what is right, and ours."""
    for finding in findings:
        verdict = "right" if finding["peer_right"] else "WRONG"
        console.print(f"{finding['peer']} on {finding['input']}: {verdict}", markup=False)
        console.print(f"  gives {finding['gives'][:160]}", markup=False)
        console.print(f"  right {finding['right']}", markup=False)
        own = "right" if finding["ours_right"] else "WRONG"
        console.print(f"  lit-merge ({own}) {finding['ours'][:160]}", markup=False)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    temporary = Path(tempfile.gettempdir())
    parser.add_argument("--output", type=Path, default=Path("peers"))
    parser.add_argument("--cache", type=Path, default=temporary / "lit-merge-peers-experts")
    parser.add_argument("--experts", type=Path, help="folder with experts that exist")
    parser.add_argument("--examples", type=int, default=200, help="test texts of a task; 0: all")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a test text")
    parser.add_argument("--rounds", type=int, default=2, help="how often each command runs")
    parser.add_argument("--python", help="the Python that has the other libraries")
    parser.add_argument("--install-peers", action="store_true", help="install them")
    options = parser.parse_args()
    peers = temporary / "lit-merge-all-peers"
    if options.install_peers:
        install_mergekit(peers)
        python = str(peers / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", FUSION_BENCH], check=True)
    if options.python is None:
        if not (peers / "bin" / "python").exists():
            parser.error(
                "name the Python that has the other libraries by --python, or install them"
            )
        options.python = str(peers / "bin" / "python")
    return options


def main() -> None:
    """Print both tables and write peers.json."""
    options = _options()
    console = Console(width=200)
    console.print(environment())
    models = options.cache.resolve() / "models"
    making = [sys.executable, str(HERE / "peers_experts.py"), str(models.parent)]
    making += ["--experts", str(options.experts)] if options.experts else []
    subprocess.run(making, check=True)  # not in this process, which must stay small
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        findings = inputs_findings(options.python, folder)
        prefixed = models.parent / "prefixed"
        findings += peers_mergekit.findings(options.python, models, prefixed, folder)
        reports = merge_all(options.python, models, folder, options.rounds)
        evaluate_all(reports, models, options.examples or None, options.max_length)
    content = {"environment": environment(), "cases": reports, "inputs": findings}
    (options.output / "peers.json").write_text(json.dumps(content, indent=1))
    console.print(table_of(reports))
    tell(console, findings)


if __name__ == "__main__":
    main()
