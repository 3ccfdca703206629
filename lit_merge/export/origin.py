"""What an exported model takes over from its merge: the expert's names and configuration, records.

All of it is optional: the experts may be gone, and then the base's configuration does, with the
right number of classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lit_merge.checkpoint import Checkpoint, TensorInfo, alignment
from lit_merge.checkpoint import fingerprint as fingerprint_of
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from lit_merge.expert.info import ExpertInfo, current_versions
from lit_merge.location import is_remote
from lit_merge.merged.task_config import with_classes
from lit_merge.streaming.pieces import chunks
from lit_merge.streaming.progress import MergeProgress
from lit_merge.streaming.provenance import copy_companions, write_record
from lit_merge.streaming.shards import INDEX, ShardedWriter, shards_of, write_index
from lit_merge.strict_json import parse_json

CONFIG = "config.json"
EXPERT = "expert.json"
LIGHTNING = "model.ckpt"
RECORD = "export.json"


class TaskWeights(Protocol):
    """The weights of one task's model."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Shape and type of all tensors."""

    @property
    def head(self) -> Mapping[str, TensorInfo]:
        """Those of the task's own."""

    @property
    def shared(self) -> Mapping[str, TensorInfo]:
        """Those of the merged model."""

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Groups of names that are one tensor."""


@dataclass(frozen=True)
class RecordedExpert:
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


def recorded_expert(
    merge: Mapping[str, Any], task: str, *, base: Checkpoint | None
) -> RecordedExpert:
    """Return what is left of the expert that was merged for a task.

    Args:
        merge: Contents of ``merge.json``.
        task: The task.
        base: What an adapter is added to, where it is at hand.
    """
    entry = expert_entry(merge, task)
    path, known = entry.get("path"), entry.get("fingerprint")
    if not isinstance(path, str) or is_remote(path) or not Path(path).exists():
        return RecordedExpert()
    if entry.get("source") == "adapter":  # it has the base's names and configuration
        return RecordedExpert()
    try:
        with closing(open_expert(path, base=base)) as expert:
            names = tuple(expert.weights)
            found = fingerprint_of(expert.weights)
            file = expert.weights.path
            by_lightning = expert.weights.source == "lightning"
    except InputError:  # another file lies there now
        found = ""
    if found != known:
        note = f"{path}: is no longer the expert that was merged; nothing was taken from it"
        return RecordedExpert(notes=(note,))
    return RecordedExpert(
        names=names,
        config=Path(path) if (Path(path) / CONFIG).is_file() else None,
        checkpoint=file if by_lightning and isinstance(file, Path) else None,
    )


def expert_entry(merge: Mapping[str, Any], task: str) -> Mapping[str, Any]:
    """Return what the merge recorded of a task's expert."""
    experts = merge.get("experts")
    entry = experts.get(task) if isinstance(experts, Mapping) else None
    return entry if isinstance(entry, Mapping) else {}


def base_entry(merge: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the merge recorded of its base; empty without one."""
    base = merge.get("base")
    return base if isinstance(base, Mapping) else {}


def lightning_template(
    merge: Mapping[str, Any], model: TaskWeights, expert: RecordedExpert
) -> Path | None:
    """Return the Lightning checkpoint whose hyper-parameters fit a task's model."""
    if expert.checkpoint is not None:
        return expert.checkpoint
    path = base_entry(merge).get("weights")
    if not isinstance(path, str) or is_remote(path) or not Path(path).is_file():
        return None
    same = all(
        name in model.shared and model.shared[name].shape == info.shape
        for name, info in model.infos.items()
    )
    return Path(path) if same else None


def write_weights(folder: Path, weights: Checkpoint, shown: MergeProgress, task: str) -> None:
    """Write ``model.safetensors``, or shards with an index, chunk by chunk."""
    shards = shards_of(weights.infos)
    advance = shown.start(f"exporting {task}", sum(i.nbytes for i in weights.infos.values()))
    with ShardedWriter(folder, shards) as writer:
        for name, info in weights.infos.items():
            for start, stop in chunks(info.numel):
                values = weights.read(name, start, stop)
                writer.write(name, start, values)
                advance(values.nbytes)
    write_index(folder, shards)


def write_companions(
    folder: Path,
    source: Path | None,
    expert: RecordedExpert,
    *,
    infos: Mapping[str, TensorInfo],
    classes: int | None,
    differs: bool,
) -> tuple[str, ...]:
    """Copy what stands beside the weights; return what a user should be told about it.

    Args:
        folder: Where the model is written.
        source: The folder with the base's configuration, if there is one.
        expert: What is left of the expert, whose configuration goes first.
        infos: Shape and type of the tensors that are written.
        classes: Number of classes of the task; None where it is not known.
        differs: Whether it may be another one than the base's.

    Raises:
        InputError: A configuration is no JSON object.
    """
    sources = [
        found
        for found in (source, expert.config)
        if found is not None and (found / CONFIG).is_file()
    ]
    for found in sources:
        read_config(found / CONFIG)  # refused before it is copied
        copy_companions(found, folder, dtype=main_dtype(infos))
    if expert.config is not None or not sources:
        return ()
    if classes is None:
        note = f"{CONFIG}: is the base's, and its number of classes may be another; check it"
        return (note,) if differs else ()
    copied = read_config(folder / CONFIG)  # with its dtype
    fitting = with_classes(copied, classes)
    if fitting == copied:
        return ()
    write_record(folder / CONFIG, fitting)
    return (
        f"{CONFIG}: is the base's with {classes} classes, whose names are not known, as the "
        f"expert has no {CONFIG}",
    )


def read_config(file: Path) -> dict[str, Any]:
    """Return the contents of a ``config.json``.

    Raises:
        InputError: It is no JSON object.
    """
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


def main_dtype(infos: Mapping[str, TensorInfo]) -> str:
    """Return the floating type that most elements have."""
    counts: Counter[str] = Counter()
    for info in infos.values():
        if info.dtype.is_floating_point:
            counts[str(info.dtype).removeprefix("torch.")] += info.numel
    return max(counts, key=lambda name: counts[name], default="float32")


def expert_info(
    merge: Mapping[str, Any],
    model: TaskWeights,
    weights: Checkpoint,
    task: str,
    *,
    folder: Path,
    fingerprint: str,
) -> ExpertInfo:
    """Return what ``expert.json`` says of a task's model.

    Args:
        merge: Contents of ``merge.json``.
        model: The task's model under the merge's names.
        weights: The same under the names that were written.
        task: The task.
        folder: Where it was written.
        fingerprint: Of what was written.
    """
    names = alignment(model.infos, weights)
    files = [file for file in ("model.safetensors", INDEX, LIGHTNING) if (folder / file).exists()]
    return ExpertInfo(
        task=task,
        fingerprint=fingerprint,
        base_fingerprint=base_entry(merge).get("fingerprint"),
        head_parameters=tuple(names[name] for name in model.head),
        tied_parameters=tuple(tuple(names[name] for name in group) for group in model.tied),
        weights=files[0],
        versions=current_versions(),
    )


def merge_origin(merge: Mapping[str, Any], path: Path, task: str) -> dict[str, Any]:
    """Return where a task's model comes from, for its record."""
    entry = expert_entry(merge, task)
    return {
        "merged": {
            "path": str(path),
            "fingerprint": merge.get("fingerprint"),
            "method": merge.get("method"),
        },
        "expert": {key: entry.get(key) for key in ("path", "fingerprint")} if entry else None,
    }
