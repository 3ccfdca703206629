"""Merged and corrected models as folders, as MergeModule reads and writes them.

============================ ======================================================================
``model.safetensors``        the merged weights that all tasks share; in a merged folder shards with
                             an index, ``model.ckpt`` or another form of :func:`lit_merge.merge`
``heads/<task>.safetensors`` the tensors of a task's own, where there are any
``masks/<task>.safetensors`` which of the merged weights a task uses, after a merge that says so
                             (:mod:`lit_merge.checkpoint.bit_masks`)
``merge.json``               how the merge was made: in a merged folder, from ``lit_merge.merge``
``corrections.safetensors``  ``<site>.weight`` and so on, with ``/`` for the dots of the site's name
``surgery.safetensors``      ``surgery.down``, ``surgery.up``: the representation surgery before the
                             head, where there is one
``correction.json``          tasks, classes, sites and origin of the corrections: likewise
============================ ======================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_merge import methods
from lit_merge.checkpoint import Checkpoint, is_inside, open_checkpoint, save_tensors
from lit_merge.correction import Site
from lit_merge.errors import InputError
from lit_merge.expert.info import current_versions
from lit_merge.least_squares.layer_solver import SolvedLayer
from lit_merge.merged.recorded_base import open_recorded_base
from lit_merge.output import new_folder

FORMAT_VERSION = 1

WEIGHTS = "model.safetensors"
HEADS = "heads"
MASKS = "masks"
ADAPTER = "adapter_config.json"
MERGE = "merge.json"
CORRECTIONS = "corrections.safetensors"
SURGERY = "surgery.safetensors"
CORRECTION = "correction.json"

_OF_SOLVED = ("ridge", "before", "after")


@dataclass(frozen=True)
class CorrectionRecord:
    """What ``correction.json`` says; Lightning checkpoints of a MergeModule carry it along.

    Attributes:
        tasks: Names of the tasks in the order of their indices.
        num_classes: Number of classes of each task; None where it is not known.
        sites: Where the corrections are.
        correction: Qualified name of the module that corrects a site.
        calibrated: Whether the closed form or a fit has set the corrections.
        settings: Options of the fit.
        merge: Contents of the ``merge.json`` of the merge that was corrected.
        surgery_rank: Rank of the representation surgery before the head; 0 for none.
        solved: The layers that were solved by least squares, in their order.
        configuration: The YAML with which ``lit-merge correct`` makes it again, where that did.
    """

    tasks: tuple[str, ...]
    num_classes: tuple[int | None, ...]
    sites: tuple[Site, ...]
    correction: str
    calibrated: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    merge: Mapping[str, Any] = field(default_factory=dict)
    surgery_rank: int = 0
    solved: tuple[SolvedLayer, ...] = ()
    configuration: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON primitives."""
        content = {
            "format_version": FORMAT_VERSION,
            **asdict(self),
            "versions": current_versions(),
        }
        if self.configuration is None:
            del content["configuration"]
        return dict(json.loads(json.dumps(content)))

    @classmethod
    def from_dict(cls, content: object, *, source: str) -> CorrectionRecord:
        """Return the record of JSON primitives.

        Args:
            content: What :meth:`as_dict` has returned.
            source: The file, for messages.

        Raises:
            InputError: If it is no such record, or one of another format version.
        """
        fix = "Correct the merged model again."
        if not isinstance(content, Mapping):
            raise InputError(f"{source}: must hold the record of a correction; got none. {fix}")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{source}: must have format_version {FORMAT_VERSION}; got {version!r}. Use the "
                "lit-merge that wrote it."
            )
        try:
            sites = tuple(
                Site(str(site["name"]), int(site["num_features"]), int(site["channel_dim"]))
                for site in content["sites"]
            )
            classes = [None if n is None else int(n) for n in content["num_classes"]]
            record = cls(
                tasks=_task_names(content["tasks"], source=source),
                num_classes=tuple(classes),
                sites=sites,
                correction=str(content["correction"]),
                calibrated=bool(content["calibrated"]),
                settings=dict(content["settings"]),
                merge=dict(content["merge"]),
                surgery_rank=int(content.get("surgery_rank", 0)),
                solved=tuple(
                    SolvedLayer(str(one["name"]), *(float(one[k]) for k in _OF_SOLVED))
                    for one in content.get("solved", ())
                ),
                configuration=_text(content.get("configuration")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{source}: must hold tasks, num_classes, sites, correction, calibrated, settings "
                f"and merge; got a damaged record ({type(error).__name__}: {error}). {fix}"
            ) from error
        if len(record.tasks) != len(record.num_classes):
            raise InputError(
                f"{source}: must have num_classes for each task; got {len(record.num_classes)} for "
                f"{list(record.tasks)}. {fix}"
            )
        return record


@dataclass(frozen=True)
class MergedParts:
    """What a merged or corrected model consists of.

    Attributes:
        weights: The tensors that all tasks share.
        heads: The tensors of each task's own; empty where the tasks share everything.
        tasks: Names of the tasks.
        merge: Contents of ``merge.json``, or what is known of a merge in memory.
        record: The record of the correction; None for a model that is only merged.
        corrections: The corrections' tensors; None for a model that is only merged.
        masks: The packed bits of each task's mask; empty unless each task has a model of its own,
            the shared one masked.
        surgery: The tensors of the representation surgery; None without one.
    """

    weights: Checkpoint | Mapping[str, Tensor]
    heads: Mapping[str, Checkpoint | Mapping[str, Tensor]]
    tasks: tuple[str, ...]
    merge: Mapping[str, Any]
    record: CorrectionRecord | None = None
    corrections: Checkpoint | None = None
    masks: Mapping[str, Checkpoint] = field(default_factory=dict)
    surgery: Checkpoint | None = None

    def require_one_model(self, source: str) -> None:
        """Check that all tasks share their weights.

        Args:
            source: The folder, for messages.

        Raises:
            InputError: Each task has weights of its own.
        """
        if self.masks:
            raise InputError(
                f"{source}: must be one model for all tasks; got a merge with masks, which gives "
                f"each task its own. Take them apart: lit-merge export --merged {source} "
                f"--tasks all --output FOLDER."
            )


@contextmanager
def open_merged(path: str | Path, *, base: str | Path | None = None) -> Iterator[MergedParts]:
    """Open what ``lit_merge.merge`` or :func:`write_corrected` has written.

    Args:
        path: The folder.
        base: Of a merge that was written as an adapter: what to add it to; None for where
            merge.json says that it was.

    Yields:
        Its parts; the files are closed at the end of the block.

    Raises:
        InputError: If it is no such folder, or its files do not belong together.
    """
    folder = Path(path)
    corrected, merged = folder / CORRECTION, folder / MERGE
    if not corrected.is_file() and not merged.is_file():
        raise InputError(
            f"{path}: must be a folder with {MERGE} or {CORRECTION}; got neither in it. Name the "
            'output of "lit-merge merge" or "lit-merge correct".'
        )
    record, merge = None, {}
    if corrected.is_file():
        record = CorrectionRecord.from_dict(_read_json(corrected), source=str(corrected))
        tasks, merge = record.tasks, dict(record.merge)
    else:
        merge = _read_json(merged)
        tasks = _task_names(merge.get("tasks"), source=str(merged))
    with ExitStack() as stack:
        weights = stack.enter_context(_open_weights(folder, merge, base, stack))
        masked = record is None and _gives_masks(folder, merge)
        present = tasks if record is not None else _own_tasks(merge, tasks, masked=masked)
        heads = _open_each(folder / HEADS, present, "head", stack)
        masks: dict[str, Checkpoint] = {}
        if masked:
            masks = _open_each(folder / MASKS, present, "mask", stack)
            if not masks:
                raise InputError(
                    f"{folder / MASKS}: must hold the mask of every task, as the merge gave each "
                    f"task a model of its own; got no such folder. Copy the whole merged folder, "
                    f"or merge again."
                )
        corrections = None
        if record is not None and record.sites:
            corrections = stack.enter_context(open_checkpoint(folder / CORRECTIONS))
        surgery = None
        if record is not None and record.surgery_rank:
            surgery = stack.enter_context(open_checkpoint(folder / SURGERY))
        yield MergedParts(weights, heads, present, merge, record, corrections, masks, surgery)


def has_masks(path: str | Path) -> bool:
    """Return whether a path is a merged folder in which each task has a model of its own.

    Raises:
        InputError: Its ``merge.json`` is damaged.
    """
    folder = Path(path)
    if not (folder / MERGE).is_file() or (folder / CORRECTION).is_file():
        return False
    return _gives_masks(folder, _read_json(folder / MERGE))


def _gives_masks(folder: Path, merge: Mapping[str, Any]) -> bool:
    if "masks" in merge:
        return bool(merge["masks"])
    overrides = merge.get("overrides")
    used = [merge.get("method")]
    used += [
        override.get("method")
        for override in (overrides.values() if isinstance(overrides, Mapping) else ())
        if isinstance(override, Mapping)
    ]
    return (folder / MASKS).is_dir() or any(map(_method_gives_masks, used))


def _own_tasks(
    merge: Mapping[str, Any], tasks: tuple[str, ...], *, masked: bool
) -> tuple[str, ...]:
    """Return the tasks that a merged folder has a model for.

    They are the experts' names, unless an expert was a merge itself: that one has no head, and has
    brought along those of its tasks, for which there are no masks.
    """
    heads = merge.get("heads")
    named = list(heads) if isinstance(heads, Mapping) else []
    if set(named) <= set(tasks):
        return tasks
    return _task_names([t for t in named if t in tasks or not masked], source=MERGE)


def _method_gives_masks(settings: object) -> bool:
    path = settings.get("class_path") if isinstance(settings, Mapping) else None
    if not isinstance(path, str) or not path.startswith(f"{methods.__name__}."):
        return False
    return bool(getattr(getattr(methods, path.rpartition(".")[2], None), "masks", False))


def _open_weights(
    folder: Path, merge: Mapping[str, Any], base: str | Path | None, stack: ExitStack
) -> Checkpoint:
    if (folder / CORRECTION).is_file():
        return open_checkpoint(folder / WEIGHTS)
    if (folder / ADAPTER).is_file():
        under = stack.enter_context(open_recorded_base(merge, base, source=folder / MERGE))
        return open_checkpoint(folder, base=under)
    return open_checkpoint(folder)


def _open_each(
    folder: Path, tasks: Sequence[str], what: str, stack: ExitStack
) -> dict[str, Checkpoint]:
    """Return the checkpoint of every task in a folder; none without the folder."""
    opened: dict[str, Checkpoint] = {}
    for task in tasks if folder.is_dir() else ():
        file = folder / f"{task}.safetensors"
        if not file.is_file():
            raise InputError(
                f"{folder}: must hold the {what} of every task; got none for {task!r}. Merge again."
            )
        opened[task] = stack.enter_context(open_checkpoint(file))
    return opened


def write_corrected(
    path: str | Path,
    *,
    weights: Mapping[str, Tensor],
    heads: Mapping[str, Mapping[str, Tensor]],
    corrections: Mapping[str, Tensor],
    record: CorrectionRecord,
    surgery: Mapping[str, Tensor] | None = None,
    replace: bool = False,
) -> Path:
    """Write a corrected folder, whole or not at all.

    Args:
        path: The folder.
        weights: The tensors that all tasks share, by name in the network.
        heads: The tensors of each task's own.
        corrections: The corrections' tensors by site.
        record: What to say about them.
        surgery: The tensors of the representation surgery; None or empty without one.
        replace: Whether an existing non-empty folder may be replaced.

    Returns:
        The path.

    Raises:
        InputError: If the folder may not be written.
    """
    with new_folder(path, replace=replace) as folder:
        save_tensors(folder / WEIGHTS, weights, {"format": "pt"})
        if heads:
            (folder / HEADS).mkdir()
        for task, own in heads.items():
            save_tensors(folder / HEADS / f"{task}.safetensors", own, {"format": "pt"})
        if corrections:
            save_tensors(folder / CORRECTIONS, corrections, {"format": "pt"})
        if surgery:
            save_tensors(folder / SURGERY, surgery, {"format": "pt"})
        text = json.dumps(record.as_dict(), indent=2, ensure_ascii=False)
        (folder / CORRECTION).write_text(text + "\n", encoding="utf-8")
    return Path(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: must be JSON; got {error}. Write the folder again.") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: must hold entries by name; got a {type(content).__name__}. "
            "Write the folder again."
        )
    return content


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _task_names(value: object, *, source: str) -> tuple[str, ...]:
    """Return task names after checking that each can name a file in the folder of the heads."""
    tasks = value if isinstance(value, list) else []
    names = [t for t in tasks if isinstance(t, str) and is_inside(t) and not set(t) & set("/\\")]
    if not tasks or len(names) != len(tasks):
        raise InputError(
            f"{source}: must hold the names of the tasks; got {value!r}. Write the folder again."
        )
    return tuple(names)
