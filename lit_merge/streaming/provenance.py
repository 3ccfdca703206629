"""What a merged folder says about itself: ``merge.json``, and what else its base's folder held.

``merge.json`` is JSON of primitives:

================= ==================================================================================
format_version    1
created           when, in UTC (ISO 8601)
seconds           how long the merge took
tasks             the experts' names, in order
leaves            how many experts that is, those within merges counted
method            class_path and init_args, as in a configuration
base              path as given, file, source and fingerprint of the weights; null without a base
base_hessian      path as given, or null
experts           by task: path as given, file, source, fingerprint, curvature (hessian, trace,
                  estimator, labels, num_examples) and base_fingerprint
policy, dtype     as given; so are overrides and accumulate
tensors           per tensor: name, action, reason, shape, dtype, alias_of
heads             by task: the file with its own tensors
masks             by task: the file with its masks; empty without
fingerprint       of the merged weights
traces            by task: the sum of the Hessian over the merged tensors
notes, warnings   texts
versions          of lit_merge, torch and lightning
================= ==================================================================================
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lit_merge.checkpoint import Checkpoint
from lit_merge.expert.info import ExpertInfo, current_versions
from lit_merge.location import Location, locate
from lit_merge.methods import MergeMethod
from lit_merge.streaming.inputs import MergeInputs
from lit_merge.streaming.plan import MergePlan
from lit_merge.streaming.request import Output, Request
from lit_merge.streaming.result import MergeResult

FORMAT_VERSION = 1

# What a model of Hugging Face needs beside its weights. Neither its README, which is about another
# model, nor code.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "*preprocessor_config.json",
    "processor_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.*",
    "merges.txt",
    "*.model",
)


def merge_record(
    request: Request,
    output: Output,
    inputs: MergeInputs,
    result: MergeResult,
    *,
    fingerprint: str,
    heads: Collection[str],
) -> dict[str, Any]:
    """Return the contents of ``merge.json``; the module's docstring says what they are.

    Args:
        request: What was asked for.
        output: The merge.
        inputs: What was merged.
        result: What was done.
        fingerprint: Of the merged weights.
        heads: Heads that were carried over from experts which are merges, by task.
    """
    plan = output.plan
    return {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(result.seconds, 3),
        "tasks": list(inputs.tasks),
        "leaves": sum(inputs.leaves),
        "method": method_settings(output.method),
        "overrides": {
            pattern: {
                "method": None if override.method is None else method_settings(override.method),
                "scale": override.scale,
                "action": override.action,
            }
            for pattern, override in request.overrides.items()
        },
        "base": None
        if inputs.base is None
        else _weights(request.base, inputs.base) | {"fingerprint": inputs.base_fingerprint},
        "base_hessian": None if request.base_hessian is None else str(request.base_hessian),
        "experts": {
            task: _expert(task, path, inputs, result.traces)
            for task, path in request.experts.items()
        },
        "policy": dataclasses.asdict(request.policy),
        "dtype": request.dtype,
        "accumulate": request.accumulate,
        "tensors": [
            {
                "name": tensor.name,
                "action": tensor.action,
                "reason": tensor.reason,
                "shape": list(tensor.info.shape),
                "dtype": str(plan.infos.get(tensor.name, tensor.info).dtype).removeprefix("torch."),
                "alias_of": tensor.alias_of,
            }
            for tensor in plan.tensors
        ],
        "heads": {task: f"heads/{task}.safetensors" for task in (*plan.heads, *heads)},
        "masks": {
            task: f"masks/{task}.safetensors"
            for task in inputs.tasks
            if any(method.masks for method in plan.methods.values())
        },
        "fingerprint": fingerprint,
        "traces": dict(result.traces),
        "notes": list(result.notes),
        "warnings": list(result.warnings),
        "versions": current_versions(),
    }


def expert_info(
    inputs: MergeInputs, plan: MergePlan, method: MergeMethod, *, fingerprint: str, weights: str
) -> ExpertInfo:
    """Return what ``expert.json`` says of a merge that is an expert of the same base again.

    Args:
        inputs: What was merged.
        plan: What was done with each tensor.
        method: How.
        fingerprint: Of the merged weights.
        weights: Their file.
    """
    experts = inputs.infos.values()
    kinds = {(info.estimator, info.labels) for info in experts}
    estimator, labels = next(iter(kinds)) if len(kinds) == 1 else ("merged", None)
    counts = [info.num_examples for info in experts]
    known = [count for count in counts if count is not None]

    def here(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in names if name in plan.infos)

    return ExpertInfo(
        estimator=estimator or "merged",
        labels=labels,
        num_examples=sum(known) if len(known) == len(counts) else None,
        fingerprint=fingerprint,
        base_fingerprint=inputs.base_fingerprint,
        head_parameters=here(inputs.heads),
        frozen_parameters=here(inputs.frozen),
        tied_parameters=tuple(group for group in map(here, inputs.tied) if len(group) > 1),
        weights=weights,
        versions=current_versions(),
        details={"merged": list(inputs.tasks), "method": method_settings(method)},
    )


def input_files(inputs: MergeInputs) -> list[tuple[str, int, int]]:
    """Return path, size and time of the last change (ns) of every file that is read."""
    checkpoints = [
        *inputs.experts.values(),
        *inputs.hessians.values(),
        *inputs.grams.values(),
        *inputs.kronecker.values(),
        *(c for c in (inputs.base, inputs.base_hessian) if c is not None),
    ]
    files = dict.fromkeys(c.file_of(name) for c in checkpoints for name in c)
    found = []
    for file in files:
        status = file.stat() if file.exists() else None  # what is not on a disk has none
        found.append(
            (str(file), status.st_size if status else 0, status.st_mtime_ns if status else 0)
        )
    return found


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write ``merge.json``."""
    text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def method_settings(method: MergeMethod) -> dict[str, Any]:
    """Return a method as a configuration has it.

    >>> from lit_merge.methods import TaskArithmetic
    >>> method_settings(TaskArithmetic(0.3))
    {'class_path': 'lit_merge.methods.task_arithmetic.TaskArithmetic', 'init_args': {'scale': 0.3}}
    """
    kind: Any = type(method)
    names = list(vars(method))  # somebody else's method need not be a dataclass
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": {name: _primitive(getattr(method, name)) for name in names},
    }


def copy_companions(base: str | Path | None, folder: Path, *, dtype: str | None) -> None:
    """Copy what a Hugging Face folder holds beside its weights, so that the result loads alike.

    Args:
        base: The base as given; nothing is copied unless it is a folder with ``config.json``.
        folder: The merged folder.
        dtype: The floating type of the merged weights, for the copied configuration; None for the
            base's.
    """
    if base is None or not ((named := locate(base)) / "config.json").is_file():
        return
    for pattern in _COMPANIONS:
        files: list[Location] = list(named.glob(pattern))
        for file in files:
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
    if dtype is not None:
        config = folder / "config.json"
        content = json.loads(config.read_text(encoding="utf-8"))
        content |= {key: dtype for key in ("dtype", "torch_dtype") if key in content}
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _weights(path: str | Path | None, checkpoint: Checkpoint) -> dict[str, Any]:
    return {"path": str(path), "weights": str(checkpoint.path), "source": checkpoint.source}


def _expert(
    task: str, path: str | Path, inputs: MergeInputs, traces: Mapping[str, float]
) -> dict[str, Any]:
    info = inputs.infos[task]
    hessian = inputs.hessians.get(task)
    return _weights(path, inputs.experts[task]) | {
        "fingerprint": inputs.fingerprints[task],
        "base_fingerprint": info.base_fingerprint,
        "hessian": None if hessian is None else str(hessian.path),
        "hessian_trace": traces.get(task),
        "estimator": info.estimator,
        "labels": info.labels,
        "num_examples": info.num_examples,
    }


def _primitive(value: object) -> Any:
    """Return a setting as JSON has it: mappings as dicts, sequences as lists."""
    if isinstance(value, Mapping):
        return {str(key): _primitive(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_primitive(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)
