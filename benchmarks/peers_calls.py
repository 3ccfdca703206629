"""All cases of one library, in a process of its own: differences, time and memory.

    PYTHONPATH=<repository> PYTHON benchmarks/peers_calls.py MODELS OUTPUT LIBRARY

PYTHON has the library besides what lit-merge needs; LIBRARY is ``fusion-bench``, ``PEFT`` or
``authors``. For each case both sides take turns; what they merged goes to OUTPUT as safetensors,
and a line of JSON to OUTPUT/<library>.jsonl. CPU seconds are user + system of all threads, memory
is what the peak of the resident memory lies above what was held before the call.

The reference for rounding is the library's own function on the same numbers in float64.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers_cases import Case, Inputs, State, largest_difference, merge_by_us, read_inputs
from peers_experts import BASE, EXPERTS
from safetensors.torch import save_file

WARM_UP = "encoder.layer.5.attention.output.dense.*"
MODULES = {
    "fusion-bench": "peers_fusion_bench",
    "PEFT": "peers_peft",
    "authors": "peers_gradient_matching",
}


def compare(case: Case, everything: Inputs, folder: Path) -> dict[str, Any]:
    """Run one case on both sides and return what is to be told of it."""
    inputs = everything.chosen(case.tensors, case.reads)
    report: dict[str, Any] = {
        "peer": case.peer,
        "name": case.name,
        "method": case.method,
        "arguments": dict(case.arguments),
        "equal": case.equal,
    }
    sides: list[tuple[str, Callable[[Inputs], State]]] = [
        ("ours", lambda i: merge_by_us(case, i)),
        ("peer", case.call),
    ]
    costs: dict[str, list[tuple[float, float]]] = {side: [] for side, _ in sides}
    merged: dict[str, State] = {}
    for number in range(case.rounds):
        for side, call in sides if number % 2 else reversed(sides):
            try:
                if number == 0:  # what is imported on the way is no part of the merge
                    quietly(call, everything.chosen((WARM_UP,), case.reads))
                merged[side], cpu, peak = measured(call, inputs.chosen(("*",), case.reads))
            except Exception as error:  # another library's failure is a result
                return {**report, "failure": f"{side}: {type(error).__name__}: {error}"}
            costs[side].append((cpu, peak))
    for side, all_costs in costs.items():
        report[f"{side}_cpu"] = statistics.median(cpu for cpu, _ in all_costs)
        report[f"{side}_peak"] = statistics.median(peak for _, peak in all_costs)
    pairs = zip(costs["peer"], costs["ours"], strict=True)
    report["ratio"] = statistics.median(peer[0] / ours[0] for peer, ours in pairs)
    if case.equal:
        exact = quietly(case.call, inputs.double())
        report["peer_error"] = largest_difference(merged["peer"], exact)
        report["ours_error"] = largest_difference(merged["ours"], exact)
    for side, state in merged.items():
        whole = {name: state.get(name, tensor) for name, tensor in everything.base.items()}
        path = folder / f"{case.call.__module__}-{case.method}-{len(list(folder.iterdir()))}"
        save_file({n: t.detach().clone().contiguous() for n, t in whole.items()}, path)
        report[f"{side}_weights"] = str(path)
    return report


def measured(call: Callable[[Inputs], State], inputs: Inputs) -> tuple[State, float, float]:
    """Return what a call gives, its CPU seconds and the bytes it needed on top."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = _resident("VmRSS"), time.process_time()
    merged = quietly(call, inputs)
    return merged, time.process_time() - start, _resident("VmHWM") - before


def quietly(call: Callable[[Inputs], State], inputs: Inputs) -> State:
    """Call a function that prints and warns, without either."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        return call(inputs)


def _resident(kind: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(kind))
    return float(line.split()[1]) * 1024


def main() -> None:
    models, folder, library = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.manual_seed(0)
    inputs = read_inputs(models, BASE, EXPERTS)
    with (folder / f"{library}.jsonl").open("w") as file:
        for case in importlib.import_module(MODULES[library]).cases():
            print(f"merging: {library}, {case.name}", flush=True)
            file.write(json.dumps(compare(case, inputs, folder)) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
