"""mergekit and lit-merge as whole commands on the same folders.

Nothing here may import torch: the peak of a command's memory is never below that of the process
that starts it.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_process import MERGEKIT_VERSION, Cost, Failure, run
from peers_experts import BASE, EXPERTS

PEER = f"mergekit {MERGEKIT_VERSION}"


@dataclass(frozen=True)
class Merge:
    """A merge as both commands are told it.

    Attributes:
        name: mergekit's method and what is set.
        peer: mergekit's name of the method.
        overall: Its parameters of the merge.
        each: Its parameters of every expert.
        method: Our class.
        arguments: Of it.
        experts: Which are merged.
        based: Whether the base takes part; else the first expert stands first.
        equal: Whether both compute the same.
        dtype: What is written, and what mergekit computes in.
    """

    name: str
    peer: str
    overall: Mapping[str, Any]
    each: Mapping[str, Any]
    method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    experts: tuple[str, ...] = EXPERTS
    based: bool = True
    equal: bool = True
    dtype: str = "float32"


MERGES = (
    Merge(
        "task_arithmetic",
        "task_arithmetic",
        {"normalize": False},
        {"weight": 1.0},
        "TaskArithmetic",
    ),
    Merge(
        "ties, 0.2",
        "ties",
        {"normalize": True},
        {"weight": 1.0, "density": 0.2},
        "TIES",
        {"density": 0.2, "scope": "tensor", "divide": "weights", "weigh": "votes"},
    ),
    Merge(
        "dare_ties, 0.5",
        "dare_ties",
        {"normalize": False},
        {"weight": 1.0, "density": 0.5},
        "DARE",
        {"density": 0.5, "rescale": "norm", "combine": "ties", "weigh": "votes", "divide": "none"},
        equal=False,
    ),
    Merge("model_stock", "model_stock", {}, {}, "ModelStock"),
    Merge(
        "slerp, 0.5, two experts",
        "slerp",
        {"t": 0.5},
        {},
        "SLERP",
        experts=EXPERTS[:2],
        based=False,
    ),
)


def compare(python: str, models: Path, folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Run every merge on both sides and yield what is to be told of it.

    Args:
        python: The Python that has mergekit.
        models: The folder of the models, as mergekit can read them.
        folder: For what is written.
        rounds: How often each command runs.
    """
    for number, merge in enumerate(MERGES):
        print(f"merging: {PEER}, {merge.name}", flush=True)
        report: dict[str, Any] = {
            "peer": PEER,
            "name": merge.name,
            "method": merge.method,
            "arguments": dict(merge.arguments),
            "equal": merge.equal,
            "whole": True,
        }
        outputs = {side: folder / f"mergekit-{number}-{side}" for side in ("ours", "peer")}
        costs: dict[str, list[Cost]] = {"ours": [], "peer": []}
        try:
            for _ in range(rounds):
                for side, output in outputs.items():
                    shutil.rmtree(output, ignore_errors=True)
                    command = _own if side == "ours" else _mergekit
                    arguments = command(python, merge, models, folder, output)
                    costs[side].append(run(arguments, limit=300))
        except Failure as failure:
            yield {**report, "failure": _in_words(failure)}
            continue
        for side, all_costs in costs.items():
            report[f"{side}_cpu"] = statistics.median(cost.cpu for cost in all_costs)
            report[f"{side}_peak"] = statistics.median(cost.peak for cost in all_costs)
            report[f"{side}_weights"] = str(outputs[side] / "model.safetensors")
        pairs = zip(costs["peer"], costs["ours"], strict=True)
        report["ratio"] = statistics.median(peer.cpu / ours.cpu for peer, ours in pairs)
        yield report


def findings(python: str, models: Path, prefixed: Path, folder: Path) -> list[dict[str, Any]]:
    """Return what comes of MiniLM as it is: a BertModel, whose tensors have no prefix.

    Args:
        python: The Python that has mergekit.
        models: The models as transformers has them.
        prefixed: The same under an unknown architecture's name.
        folder: For what is written.
    """
    nameless = folder / "nameless"
    for name in (BASE, *EXPERTS):
        (nameless / name).mkdir(parents=True, exist_ok=True)
        (nameless / name / "model.safetensors").symlink_to(models / name / "model.safetensors")
        shutil.copy(prefixed / name / "config.json", nameless / name)
    given = {
        "MiniLM, a BertModel": models,
        "MiniLM under an architecture's name that it does not know": nameless,
        "the same, every tensor's name after bert.": prefixed,
    }
    told = []
    for number, (text, source) in enumerate(given.items()):
        print(f"small inputs: {PEER}, {text}", flush=True)
        files = {side: folder / f"finding-{number}-{side}" for side in ("peer", "ours")}
        results = {
            "peer": _tensors(
                _mergekit(python, MERGES[0], source, folder, files["peer"]), files["peer"]
            ),
            "ours": _tensors(_own(python, MERGES[0], source, folder, files["ours"]), files["ours"]),
        }
        told.append(
            {
                "peer": f"{PEER} task_arithmetic",
                "input": text,
                "gives": results["peer"],
                "right": (right := _count(source / BASE / "model.safetensors")),
                "peer_right": results["peer"] == right,
                "ours": results["ours"],
                "ours_right": results["ours"] == right,
            }
        )
    return told


def _tensors(command: list[str], output: Path) -> str:
    """Run a merge and say how many tensors came out, or how it failed."""
    try:
        run(command, limit=300)
    except Failure as failure:
        return _in_words(failure)
    return _count(output / "model.safetensors")


def _in_words(failure: Failure) -> str:
    """Return a failure without the marks that a traceback puts under its lines."""
    return " ".join(str(failure).replace("~", "").replace("^", "").split())


def _count(file: Path) -> str:
    """Return how many tensors a safetensors file has, from its header."""
    if not file.exists():
        return "a folder without weights, and no error"
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return f"{len(header.keys() - {'__metadata__'})} tensors"


def _own(python: str, merge: Merge, models: Path, folder: Path, output: Path) -> list[str]:
    settings = {
        "base": str(models / BASE) if merge.based else None,
        "experts": {name: str(models / name) for name in merge.experts},
        "method": {"class_path": merge.method, "init_args": dict(merge.arguments)},
        "output": str(output),
    }
    file = folder / "merge.yaml"
    file.write_text(json.dumps(settings))
    return [sys.executable, "-m", "lit_merge", "merge", "--config", str(file)]


def _mergekit(python: str, merge: Merge, models: Path, folder: Path, output: Path) -> list[str]:
    settings: dict[str, Any] = {
        "merge_method": merge.peer,
        "parameters": dict(merge.overall),
        "models": [
            {"model": str(models / name), "parameters": dict(merge.each)} for name in merge.experts
        ],
        "base_model": str(models / (BASE if merge.based else merge.experts[0])),
        "dtype": merge.dtype,
    }
    file = folder / "mergekit.yaml"
    file.write_text(json.dumps(settings))
    command = [python, "-m", "mergekit.scripts.run_yaml", str(file), str(output)]
    return [*command, "--no-copy-tokenizer", "--quiet"]
