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
correction        what became of the corrections, and the error of the proof; null without
                  (:mod:`lit_merge.export.corrected`)
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

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

from lit_merge.checkpoint import Checkpoint, aligned, fingerprint, open_checkpoint
from lit_merge.checkpoint.lightning_writer import write_lightning_checkpoint
from lit_merge.errors import InputError
from lit_merge.expert.info import current_versions
from lit_merge.export.origin import (
    EXPERT,
    LIGHTNING,
    RECORD,
    RecordedExpert,
    TaskWeights,
    base_entry,
    expert_info,
    lightning_template,
    merge_origin,
    recorded_expert,
    write_companions,
    write_weights,
)
from lit_merge.merged.task_config import num_classes_of
from lit_merge.merged.task_model import open_task_models
from lit_merge.output import new_folder
from lit_merge.streaming.progress import MergeProgress, merge_progress
from lit_merge.streaming.provenance import write_record
from lit_merge.streaming.request import dtype_of

FORMAT_VERSION = 1

ExportFormat = Literal["safetensors", "lightning"]


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        path: The folder.
        task: The task.
        num_bytes: Size of the weights.
        share: Share of the masked weights that the task uses; None without masks.
        notes: What a user should be told.
        error: Largest difference from the corrected model's logits, in units of the largest (or of
            1); None without corrections.
    """

    path: Path
    task: str
    num_bytes: int
    share: float | None
    notes: tuple[str, ...]
    error: float | None = None


def export_merged(
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

    Memory holds one chunk of one tensor. The arguments are those of
    :func:`lit_merge.export.export_task`.

    Raises:
        InputError: The folder is no merge, is damaged or corrected, or has no such task; the base
            is missing or another one; a value does not fit the type; or the output is not free.
    """
    number = dtype_of(dtype)
    require_format(format)
    with (
        open_task_models(merged, base=base) as models,
        new_folder(output, replace=replace) as folder,
        merge_progress(shown=progress) as shown,
    ):
        merge = models.parts.merge
        model = models.model(task, dtype=number)
        expert = recorded_expert(merge, task, base=models.base)
        weights = under_expert_names(model, expert)
        share = models.mask_share(task)
        classes, differs = num_classes_of(model.head, model.shared)
        recorded = base_entry(merge)
        notes = (
            *expert.notes,
            *write_model(
                folder, weights, model, merge, expert,
                task=task, output=output, format=format, shown=shown,
            ),
            *write_companions(
                folder, models.path, expert, infos=model.infos, classes=classes, differs=differs
            ),
        )  # fmt: skip
        write_records(
            folder,
            model,
            weights,
            merge,
            task=task,
            entries={
                **merge_origin(merge, models.path, task),
                "base": None
                if models.base is None or not recorded
                else {"path": str(models.base.path), "fingerprint": recorded.get("fingerprint")},
                "mask": None if share is None else {"scale": model.scale, "share": share},
                "correction": None,
                "names": "merged" if expert.config is None else "expert",
                "format": format,
                "dtype": dtype,
                "notes": list(notes),
            },
        )
        num_bytes = sum(info.nbytes for info in weights.infos.values())
    return ExportResult(Path(output), task, num_bytes, share, notes)


def require_format(format: str) -> None:
    """Check the name of a format.

    Raises:
        InputError: There is no such format.
    """
    if format not in get_args(ExportFormat):
        raise InputError(
            f"format: must be one of {', '.join(get_args(ExportFormat))}; got {format!r}. "
            f"Correct it."
        )


def under_expert_names(model: Checkpoint, expert: RecordedExpert) -> Checkpoint:
    """Return a model's weights under the expert's names, where its configuration is taken."""
    return model if expert.config is None else aligned(model, expert.names)


def write_model(
    folder: Path,
    weights: Checkpoint,
    model: TaskWeights,
    merge: Mapping[str, Any],
    expert: RecordedExpert,
    *,
    task: str,
    output: str | Path,
    format: ExportFormat,
    shown: MergeProgress,
) -> tuple[str, ...]:
    """Write a task's weights in a format; return what a user should be told.

    Args:
        folder: Where, for now.
        weights: The weights, under the names to write.
        model: The same under the merge's names.
        merge: Contents of ``merge.json``.
        expert: What is left of the expert.
        task: The task.
        output: What the folder will be called.
        format: The format.
        shown: Where progress is shown.

    Raises:
        InputError: A value does not fit the type to write.
    """
    if format == "safetensors":
        write_weights(folder, weights, shown, task)
        return ()
    template = lightning_template(merge, model, expert)
    notes = write_lightning_checkpoint(folder / LIGHTNING, weights, template)
    return tuple(note.replace(str(folder), str(output)) for note in notes)


def write_records(
    folder: Path,
    model: TaskWeights,
    weights: Checkpoint,
    merge: Mapping[str, Any],
    *,
    task: str,
    entries: Mapping[str, Any],
) -> None:
    """Write ``export.json`` and ``expert.json`` beside weights that are written.

    Args:
        folder: Where.
        model: The weights under the merge's names.
        weights: The same under the names that were written.
        merge: Contents of ``merge.json``.
        task: The task.
        entries: Further entries of ``export.json``.
    """
    with open_checkpoint(folder) as written:
        found = fingerprint(written)
    record = {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "task": task,
        **entries,
        "head": list(model.head),
        "fingerprint": found,
        "versions": current_versions(),
    }
    write_record(folder / RECORD, record)
    info = expert_info(merge, model, weights, task, folder=folder, fingerprint=found)
    (folder / EXPERT).write_text(info.to_json(), encoding="utf-8")
