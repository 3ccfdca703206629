"""One network for all tasks of a corrected folder, in one file that needs nothing of lit-merge.

``multi_task.safetensors`` holds the shared weights once (``shared/<name>``), each task's head
(``heads/<index>/<name>``) and the scales and shifts of all tasks (``corrections/<site>/weight`` and
``/bias``, ``[T, C]``); ``correction.py`` beside it needs torch alone::

    import correction
    model = correction.load_multi_task(model, "multi_task.safetensors")
    model.set_task("svhn")
    logits = model(images)                               # or model(images, task=[...])

The export is proved as that of one task: by each task alone, and by a batch that mixes them.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.checkpoint import TensorInfo, fingerprint, open_checkpoint, save_tensors
from lit_merge.errors import InputError
from lit_merge.expert.info import current_versions
from lit_merge.export.corrected_folder import (
    Corrected,
    example_inputs,
    hooked_corrections,
    in_dtype,
    is_corrected,
    open_corrected,
)
from lit_merge.export.example_inputs import num_examples
from lit_merge.export.leftover import HookedCorrection, sites_entry, tensors_by_name
from lit_merge.export.origin import (
    CONFIG,
    RECORD,
    RecordedExpert,
    merge_origin,
    read_config,
    recorded_expert,
    write_companions,
)
from lit_merge.export.proof import CODE, import_file, prove, write_code
from lit_merge.export.task import FORMAT_VERSION, ExportResult
from lit_merge.merged.task_model import require_task
from lit_merge.output import new_folder
from lit_merge.streaming.provenance import write_record
from lit_merge.streaming.request import dtype_of
from lit_merge.tasks.classification import read_logits
from lit_merge.tasks.task import Task

MULTI_TASK = "multi_task.safetensors"


def export_multi_task(
    merged: str | Path,
    output: str | Path,
    *,
    model: nn.Module | None,
    tasks: Sequence[str] | None = None,
    examples: Mapping[str, Task] | None = None,
    dtype: str | None = None,
    replace: bool = False,
) -> ExportResult:
    """Write a corrected folder's network for several tasks as one file.

    Args:
        merged: What ``lit-merge correct`` has written.
        output: The folder to write.
        model: The architecture.
        tasks: Names of the tasks, in the order of their indices in the file; None for all.
        examples: Tasks whose inputs prove the export; None makes inputs up where the network tells
            what it takes.
        dtype: The floating type to write; None for the folder's, tensor by tensor.
        replace: Whether a folder that exists may be replaced.

    Returns:
        What was written; its task is the names of all.

    Raises:
        InputError: The folder is not corrected or does not fit the network, a task is unknown, the
            proof fails, or the output is not free.
    """
    number = dtype_of(dtype)
    if not is_corrected(merged):
        raise InputError(
            f"{merged}: must be a corrected folder for an export of several tasks in one file; got "
            f"another. Export each task by itself: --format safetensors."
        )
    corrected = open_corrected(merged, model)
    names = tuple(corrected.network.tasks if tasks is None else tasks)
    for task in names:
        require_task(task, corrected.network.tasks, path=merged)
    tensors = _tensors(corrected, names)
    about = _about(corrected, names)
    inputs = {task: example_inputs(corrected, task, examples) for task in names}
    with new_folder(output, replace=replace) as folder:
        file = folder / MULTI_TASK
        metadata = {"format": "pt", "multi_task": json.dumps(about)}
        # First as precise as they are, for the proof.
        save_tensors(file, tensors, metadata)
        write_code(folder)
        error, told = _prove(folder, corrected, {task: inputs[task][0] for task in names})
        typed = _typed(corrected, tensors, number)
        save_tensors(file, typed, metadata)
        infos = {n: TensorInfo(tuple(v.shape), v.dtype) for n, v in typed.items()}
        notes = (*told, *_write_companions(folder, corrected, names, infos))
        with open_checkpoint(file) as written:
            found = fingerprint(written)
        record = {
            "format_version": FORMAT_VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "tasks": {
                task: {
                    **merge_origin(corrected.merge, corrected.path, task),
                    "examples": num_examples(inputs[task][0]),
                    "inputs": inputs[task][1],
                }
                for task in names
            },
            "sites": [site.name for site in corrected.network.sites],
            "code": CODE,
            "file": MULTI_TASK,
            "error": error,
            "format": "multi_task",
            "dtype": dtype,
            "fingerprint": found,
            "notes": list(notes),
            "versions": current_versions(),
        }
        write_record(folder / RECORD, record)
        num_bytes = sum(info.nbytes for info in infos.values())
    return ExportResult(Path(output), ", ".join(names), num_bytes, None, notes, error)


def _tensors(corrected: Corrected, tasks: Sequence[str]) -> dict[str, Tensor]:
    """Return the contents of the file, as precise as they are."""
    network = corrected.network
    heads = network.head_state()
    made = {f"shared/{name}": value for name, value in network.shared_state().items()}
    for index, task in enumerate(tasks):
        made |= {f"heads/{index}/{name}": v for name, v in heads.get(task, {}).items()}
    named = tensors_by_name(_corrections(corrected, tasks))
    made |= {f"corrections/{name}": value for name, value in named.items()}
    return made


def _corrections(corrected: Corrected, tasks: Sequence[str]) -> list[HookedCorrection]:
    every = [site.name for site in corrected.network.sites]
    return hooked_corrections(corrected, tasks, every)


def _typed(
    corrected: Corrected, tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return the contents in the types to write; corrections are few and stay precise."""
    made = {}
    for name, value in tensors.items():
        group, _, inner = name.partition("/")
        own = corrected.dtypes.get(inner, value.dtype) if group == "shared" else value.dtype
        wanted = value.dtype if group == "corrections" else dtype or own
        made[name] = in_dtype(value, wanted, name)
    return made


def _about(corrected: Corrected, tasks: Sequence[str]) -> dict[str, Any]:
    """Return what correction.py reads of the file."""
    network = corrected.network
    classes = dict(zip(network.tasks, corrected.num_classes, strict=True))
    return {
        "tasks": list(tasks),
        "num_classes": [classes[task] for task in tasks],
        "labels": {task: _labels(corrected, task) for task in tasks},
        "sites": sites_entry(_corrections(corrected, tasks)),
    }


def _labels(corrected: Corrected, task: str) -> list[str] | None:
    """Return the names of a task's classes, where its expert says them."""
    expert = recorded_expert(corrected.merge, task, base=None)
    if expert.config is None:
        return None
    config = read_config(expert.config / CONFIG)
    named = config.get("id2label")
    if isinstance(named, Mapping) and all(str(i) in named for i in range(len(named))):
        return [str(named[str(i)]) for i in range(len(named))]
    listed = config.get("label_names")
    return [str(name) for name in listed] if isinstance(listed, list) else None


def _prove(
    folder: Path, corrected: Corrected, inputs: Mapping[str, Any]
) -> tuple[float, tuple[str, ...]]:
    """Return how exact the written files are, task by task and mixed, and what to tell the user."""
    network = corrected.network
    code = import_file(folder / CODE)
    plain = copy.deepcopy(corrected.architecture).eval()
    loaded = code.load_multi_task(plain, folder / MULTI_TASK)
    tasks = tuple(inputs)
    prove_networks = partial(prove, sites=network.sites, networks=(network.network, plain))

    def alone(task: str) -> Tensor:
        loaded.set_task(task)
        return read_logits(loaded, inputs[task])

    errors = [
        prove_networks(
            partial(corrected.logits, inputs[task], task), partial(alone, task), task=task
        )
        for task in tasks
    ]
    first = inputs[tasks[0]]
    ids = torch.arange(num_examples(first)) % len(tasks)
    indices = torch.tensor([network.tasks.index(task) for task in tasks])[ids]
    try:
        network(first, indices)
    except InputError as error:  # a site whose values are not per example
        return max(errors), (f"every batch must be of one task: {error}",)
    errors.append(
        prove_networks(
            lambda: _padded(network(first, indices)),
            lambda: _padded(_mixed(loaded, first, ids)),
            task=", ".join(tasks),
        )
    )
    return max(errors), ()


def _padded(logits: Tensor) -> Tensor:
    """Return logits of mixed tasks with zeros, and marks, in the place of what is no class."""
    absent = logits == -math.inf
    width = int((~absent).any(0).sum())  # a network may pad to the widest head, or in the batch
    absent = absent[:, :width]
    return torch.cat((logits[:, :width].masked_fill(absent, 0.0), absent), 1)


def _mixed(loaded: Any, inputs: Any, ids: Tensor) -> Tensor:
    output = loaded(**inputs, task=ids) if isinstance(inputs, Mapping) else loaded(inputs, task=ids)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def _write_companions(
    folder: Path, corrected: Corrected, tasks: Sequence[str], infos: Mapping[str, TensorInfo]
) -> tuple[str, ...]:
    """Copy the configuration of the base, or of the first expert that has one."""
    experts = [recorded_expert(corrected.merge, task, base=None) for task in tasks]
    base = corrected.base_folder()
    source = next(
        (f for f in (base, *(e.config for e in experts)) if f and (f / CONFIG).is_file()), None
    )
    # The number of classes is left as it is: each task has its own.
    return write_companions(
        folder, source, RecordedExpert(), infos=infos, classes=None, differs=False
    )
