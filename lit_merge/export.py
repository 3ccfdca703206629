"""One task's model out of a merged folder, as a plain checkpoint that needs nothing of lit-merge.

The folder that is written holds ``model.safetensors`` (shards with an index where it is large) or
``model.ckpt``, what a Hugging Face folder has beside its weights, ``expert.json``, by which
lit-merge knows the head when the model is tested or merged as an expert, and ``export.json``:

================= ==================================================================================
format_version    1
created           when, in UTC (ISO 8601)
task              its name
merged            path, fingerprint of the shared weights, and method of the merge
base              path and fingerprint of what masks were applied to; null without masks
mask              scale, and the share of the masked weights that the task uses; null without masks
expert            path and fingerprint of the task's expert, as the merge recorded them, or null
head              names of the tensors of the task's own
names             whose names the tensors have, and whose configuration was taken: "expert" or
                  "merged"
format, dtype     as given
fingerprint       of the weights
notes             texts
versions          of lit_merge, torch and lightning
================= ==================================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

from lit_merge.checkpoint import Checkpoint, aligned, alignment, fingerprint, open_checkpoint
from lit_merge.checkpoint.lightning_writer import write_lightning_checkpoint
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from lit_merge.expert.info import ExpertInfo, current_versions
from lit_merge.location import is_remote
from lit_merge.merged.task_config import num_classes_of, with_classes
from lit_merge.merged.task_model import TaskModel, TaskModels, open_task_models
from lit_merge.output import new_folder
from lit_merge.streaming.pieces import chunks
from lit_merge.streaming.progress import MergeProgress, merge_progress
from lit_merge.streaming.provenance import copy_companions, write_record
from lit_merge.streaming.request import dtype_of
from lit_merge.streaming.shards import INDEX, ShardedWriter, shards_of, write_index
from lit_merge.strict_json import parse_json

FORMAT_VERSION = 1

ExportFormat = Literal["safetensors", "lightning"]

_RECORD = "export.json"
_CONFIG = "config.json"
_EXPERT = "expert.json"
_LIGHTNING = "model.ckpt"


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        path: The folder.
        task: The task.
        num_bytes: Size of the weights.
        share: Share of the masked weights that the task uses; None without masks.
        notes: What a user should be told.
    """

    path: Path
    task: str
    num_bytes: int
    share: float | None
    notes: tuple[str, ...]


def export_task(
    merged: str | Path,
    task: str,
    output: str | Path,
    *,
    base: str | Path | None = None,
    format: ExportFormat = "safetensors",
    dtype: str | None = None,
    replace: bool = False,
    progress: bool = True,
) -> ExportResult:
    """Write one task's plain model: the merged weights, masked where there are masks, and its head.

    Memory holds one chunk of one tensor. The folder appears whole or not at all.

    Args:
        merged: What :func:`lit_merge.merge` has written.
        task: Whose model.
        output: The folder to write.
        base: What was merged onto, for a merge with masks or one that was written as an adapter;
            None for where the merge found it.
        format: "safetensors", as transformers and timm read it, or "lightning": ``model.ckpt``,
            with the hyper-parameters of the expert's or the base's checkpoint where that is one.
        dtype: The floating type to write ("float32", "bfloat16", "float16", "float64"); None for
            the merge's, tensor by tensor.
        replace: Whether a folder that exists may be replaced.
        progress: Whether to show progress on the standard error.

    Raises:
        InputError: The folder is no merge, is damaged or corrected, or has no such task; the base
            is missing or another one; a value does not fit the type; or the output is not free.
    """
    number = dtype_of(dtype)
    if format not in get_args(ExportFormat):
        raise InputError(
            f"format: must be one of {', '.join(get_args(ExportFormat))}; got {format!r}. "
            f"Correct it."
        )
    with (
        open_task_models(merged, base=base) as models,
        new_folder(output, replace=replace) as folder,
        merge_progress(shown=progress) as shown,
    ):
        model = models.model(task, dtype=number)
        expert = _recorded_expert(models, task)
        weights: Checkpoint = model
        if expert.config is not None:  # it is about the expert's names
            weights = aligned(model, expert.names)
        if format == "lightning":
            template = _template(models, model, expert)
            notes = write_lightning_checkpoint(folder / _LIGHTNING, weights, template)
            notes = tuple(note.replace(str(folder), str(output)) for note in notes)
        else:
            _write_safetensors(folder, weights, shown, task)
            notes = ()
        notes = (*expert.notes, *notes, *_write_companions(folder, models, model, expert))
        with open_checkpoint(folder) as written:
            found = fingerprint(written)
        share = models.mask_share(task)
        record = {
            "format_version": FORMAT_VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "task": task,
            **_origin(models, model, task, share),
            "names": "merged" if expert.config is None else "expert",
            "format": format,
            "dtype": dtype,
            "fingerprint": found,
            "notes": list(notes),
            "versions": current_versions(),
        }
        write_record(folder / _RECORD, record)
        info = _expert_info(models, model, weights, task, folder=folder, fingerprint=found)
        (folder / _EXPERT).write_text(info.to_json(), encoding="utf-8")
        num_bytes = sum(info.nbytes for info in weights.infos.values())
    return ExportResult(Path(output), task, num_bytes, share, notes)


@dataclass(frozen=True)
class _Expert:
    """The expert of a task, where it is still the one that was merged.

    Attributes:
        names: Of its tensors; empty where it is gone.
        config: The folder of its ``config.json``, or None.
        checkpoint: Its file, where that is one of Lightning.
        notes: What a user should be told.
    """

    names: tuple[str, ...] = ()
    config: Path | None = None
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()


def _recorded_expert(models: TaskModels, task: str) -> _Expert:
    """Return what is left of the expert that was merged for a task."""
    entry = _entry(models, task)
    path, known = entry.get("path"), entry.get("fingerprint")
    if not isinstance(path, str) or is_remote(path) or not Path(path).exists():
        return _Expert()
    if entry.get("source") == "adapter":  # it has the base's names and configuration
        return _Expert()
    try:
        with closing(open_expert(path, base=models.base)) as expert:
            names = tuple(expert.weights)
            found = fingerprint(expert.weights)
            file = expert.weights.path
            by_lightning = expert.weights.source == "lightning"
    except InputError:  # another file lies there now
        found = ""
    if found != known:
        note = f"{path}: is no longer the expert that was merged; nothing was taken from it"
        return _Expert(notes=(note,))
    return _Expert(
        names=names,
        config=Path(path) if (Path(path) / _CONFIG).is_file() else None,
        checkpoint=file if by_lightning and isinstance(file, Path) else None,
    )


def _entry(models: TaskModels, task: str) -> Mapping[str, Any]:
    """Return what the merge recorded of a task's expert."""
    experts = models.parts.merge.get("experts")
    entry = experts.get(task) if isinstance(experts, Mapping) else None
    return entry if isinstance(entry, Mapping) else {}


def _template(models: TaskModels, model: TaskModel, expert: _Expert) -> Path | None:
    """Return the Lightning checkpoint whose hyper-parameters fit a task's model."""
    if expert.checkpoint is not None:
        return expert.checkpoint
    base = models.parts.merge.get("base")
    path = base.get("weights") if isinstance(base, Mapping) else None
    if not isinstance(path, str) or is_remote(path) or not Path(path).is_file():
        return None
    same = all(
        name in model.shared and model.shared[name].shape == info.shape
        for name, info in model.infos.items()
    )
    return Path(path) if same else None


def _write_safetensors(folder: Path, weights: Checkpoint, shown: MergeProgress, task: str) -> None:
    shards = shards_of(weights.infos)
    advance = shown.start(f"exporting {task}", sum(i.nbytes for i in weights.infos.values()))
    with ShardedWriter(folder, shards) as writer:
        for name, info in weights.infos.items():
            for start, stop in chunks(info.numel):
                values = weights.read(name, start, stop)
                writer.write(name, start, values)
                advance(values.nbytes)
    write_index(folder, shards)


def _write_companions(
    folder: Path, models: TaskModels, model: TaskModel, expert: _Expert
) -> tuple[str, ...]:
    """Copy what stands beside the weights; return what a user should be told about it."""
    dtype = _main_dtype(model)
    sources = [
        source
        for source in (models.path, expert.config)
        if source is not None and (source / _CONFIG).is_file()
    ]
    for source in sources:
        _read_config(source / _CONFIG)  # refused before it is copied
        copy_companions(source, folder, dtype=dtype)
    if expert.config is not None or not sources:
        return ()
    classes, differs = num_classes_of(model.head, model.shared)
    if classes is None:
        note = f"{_CONFIG}: is the base's, and its number of classes may be another; check it"
        return (note,) if differs else ()
    copied = _read_config(folder / _CONFIG)  # with its dtype
    fitting = with_classes(copied, classes)
    if fitting == copied:
        return ()
    write_record(folder / _CONFIG, fitting)
    return (
        f"{_CONFIG}: is the base's with {classes} classes, whose names are not known, as the "
        f"expert has no {_CONFIG}",
    )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise InputError(f"{file}: must be JSON; got {error}. Save the model again.") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{file}: must hold entries by name; got {type(content).__name__}. Save the model "
            f"again."
        )
    return content


def _main_dtype(model: TaskModel) -> str:
    """Return the floating type that most elements have."""
    counts: Counter[str] = Counter()
    for info in model.infos.values():
        if info.dtype.is_floating_point:
            counts[str(info.dtype).removeprefix("torch.")] += info.numel
    return max(counts, key=lambda name: counts[name], default="float32")


def _expert_info(
    models: TaskModels,
    model: TaskModel,
    weights: Checkpoint,
    task: str,
    *,
    folder: Path,
    fingerprint: str,
) -> ExpertInfo:
    """Return what ``expert.json`` says of a task's model.

    Args:
        models: The merged folder.
        model: The task's model under the merge's names.
        weights: The same under the names that were written.
        task: The task.
        folder: Where it was written.
        fingerprint: Of what was written.
    """
    names = alignment(model, weights)
    base = models.parts.merge.get("base")
    files = [file for file in ("model.safetensors", INDEX, _LIGHTNING) if (folder / file).exists()]
    return ExpertInfo(
        task=task,
        fingerprint=fingerprint,
        base_fingerprint=base.get("fingerprint") if isinstance(base, Mapping) else None,
        head_parameters=tuple(names[name] for name in model.head),
        tied_parameters=tuple(tuple(names[name] for name in group) for group in model.tied),
        weights=files[0],
        versions=current_versions(),
    )


def _origin(models: TaskModels, model: TaskModel, task: str, share: float | None) -> dict[str, Any]:
    """Return where a task's model comes from, for its record."""
    merge, entry = models.parts.merge, _entry(models, task)
    base = merge.get("base")
    return {
        "merged": {
            "path": str(models.path),
            "fingerprint": merge.get("fingerprint"),
            "method": merge.get("method"),
        },
        "base": None
        if models.base is None or not isinstance(base, Mapping)
        else {"path": str(models.base.path), "fingerprint": base.get("fingerprint")},
        "mask": None if share is None else {"scale": model.scale, "share": share},
        "expert": {key: entry.get(key) for key in ("path", "fingerprint")} if entry else None,
        "head": list(model.head),
    }
