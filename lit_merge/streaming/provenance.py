"""What a merged folder says about itself: ``merge.json``, and what else its base's folder held.

``merge.json`` is JSON of primitives:

================= ==================================================================================
format_version    1
created           when, in UTC (ISO 8601)
seconds           how long the merge took
tasks             the experts' names, in order
method            class_path and init_args, as in a configuration
base              path as given, file, source and fingerprint of the weights; null without a base
base_hessian      path as given, or null
experts           by task: path as given, file, source, fingerprint, curvature (hessian, trace,
                  estimator, labels, num_examples) and base_fingerprint
policy, dtype     as given
tensors           per tensor: name, action, reason, shape, dtype, alias_of
heads             by task: the file with its own tensors
fingerprint       of the merged weights
traces            by task: the sum of the Hessian over the merged tensors
notes, warnings   texts
versions          of lit_merge, torch and lightning
================= ==================================================================================
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lit_merge.checkpoint import Checkpoint
from lit_merge.expert.info import current_versions
from lit_merge.methods import MergeMethod
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming.inputs import MergeInputs
from lit_merge.streaming.plan import MergePlan

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
    *,
    base: str | Path | None,
    experts: Mapping[str, str | Path],
    base_hessian: str | Path | None,
    method: MergeMethod,
    policy: ParametersPolicy,
    dtype: str | None,
    inputs: MergeInputs,
    plan: MergePlan,
    fingerprint: str,
    traces: Mapping[str, float],
    notes: tuple[str, ...],
    warnings: tuple[str, ...],
    seconds: float,
) -> dict[str, Any]:
    """Return the contents of ``merge.json``; the module's docstring says what they are."""
    return {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "tasks": list(inputs.tasks),
        "method": method_settings(method),
        "base": None
        if inputs.base is None
        else _weights(base, inputs.base) | {"fingerprint": inputs.base_fingerprint},
        "base_hessian": None if base_hessian is None else str(base_hessian),
        "experts": {task: _expert(task, path, inputs, traces) for task, path in experts.items()},
        "policy": dataclasses.asdict(policy),
        "dtype": dtype,
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
        "heads": {task: f"heads/{task}.safetensors" for task in plan.heads},
        "fingerprint": fingerprint,
        "traces": dict(traces),
        "notes": list(notes),
        "warnings": list(warnings),
        "versions": current_versions(),
    }


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
    fields: tuple[dataclasses.Field[Any], ...] = ()
    if dataclasses.is_dataclass(kind):  # somebody else's method need not be one
        fields = dataclasses.fields(kind)
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": {field.name: _primitive(getattr(method, field.name)) for field in fields},
    }


def copy_companions(base: str | Path | None, folder: Path, *, dtype: str | None) -> None:
    """Copy what a Hugging Face folder holds beside its weights, so that the result loads alike.

    Args:
        base: The base as given; nothing is copied unless it is a folder with ``config.json``.
        folder: The merged folder.
        dtype: The floating type of the merged weights, for the copied configuration; None for the
            base's.
    """
    if base is None or not (Path(base) / "config.json").is_file():
        return
    for pattern in _COMPANIONS:
        for file in sorted(Path(base).glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
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
