r"""One task's plain model out of a merged folder: shared weights, masked, with the task's own head.

Where the merge gave masks, the shared weights become :math:`θ_0 + λ_t m_t ⊙ (θ - θ_0)`
(:mod:`lit_merge.checkpoint.bit_masks`); tensors of the task's own then take the place of the
shared ones, whatever their shapes. All of it is computed as it is read, chunk by chunk.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_merge.checkpoint import Checkpoint, fingerprint
from lit_merge.checkpoint.bit_masks import MaskedCheckpoint, scale_of, share_of_ones
from lit_merge.checkpoint.tensor_source import check_range
from lit_merge.errors import InputError
from lit_merge.location import Location
from lit_merge.merged.folder import CORRECTION, MERGE, MergedParts, open_merged
from lit_merge.merged.recorded_base import open_recorded_base
from lit_merge.streaming.values import all_finite


@dataclass(frozen=True)
class TaskModels:
    """The models of a merged folder, one per task.

    Attributes:
        path: The folder.
        parts: What it holds.
        base: What masks are applied to; None without masks.
    """

    path: Path
    parts: MergedParts
    base: Checkpoint | None

    def require(self, task: str) -> None:
        """Check that there is a model for a task.

        Raises:
            InputError: There is none; names those that are near.
        """
        require_task(task, self.parts.tasks, path=self.path)

    def model(self, task: str, *, dtype: torch.dtype | None = None) -> TaskModel:
        """Return one task's model; it is valid as long as the folder is open.

        Args:
            task: Its name.
            dtype: The floating type to read it in; None for the merge's, tensor by tensor.

        Raises:
            InputError: There is no such task, or its parts do not fit each other.
        """
        self.require(task)
        return TaskModel(self.parts, task, self.base, dtype=dtype)

    def mask_share(self, task: str) -> float | None:
        """Return the share of the masked weights that a task uses; None without masks."""
        if not self.parts.masks:
            return None
        assert isinstance(self.parts.weights, Checkpoint), "opened from a folder"
        return share_of_ones(self.parts.masks[task], self.parts.weights.infos)


def require_task(task: str, tasks: Sequence[str], *, path: str | Path) -> None:
    """Check that a folder has a task.

    Args:
        task: The task.
        tasks: Those that there are.
        path: The folder, for the message.

    Raises:
        InputError: There is none; names those that are near.
    """
    if task not in tasks:
        near = difflib.get_close_matches(str(task), tasks, n=1)
        fix = f'Did you mean "{near[0]}"?' if near else "Name one of them."
        raise InputError(
            f"task: must be one of {', '.join(tasks)}, which {path} has; got {task!r}. {fix}"
        )


@contextmanager
def open_task_models(path: str | Path, *, base: str | Path | None = None) -> Iterator[TaskModels]:
    """Open a merged folder for the models of its tasks.

    Args:
        path: What ``lit_merge.merge`` has written.
        base: What was merged onto, where it is no longer at the recorded path. Given, it is checked
            in any case.

    Raises:
        InputError: It is no such folder, has corrections, holds other weights than its record says,
            or the base is missing or another one.
    """
    folder = Path(path)
    if (folder / CORRECTION).exists() or (folder / "corrections.safetensors").exists():
        raise InputError(
            f"{path}: must be a merge without corrections; got a corrected folder, whose scales "
            f"and shifts act between the layers and are in no plain model. Name the merged folder "
            f"that was corrected, or use this one by MergeModule.from_folder."
        )
    with ExitStack() as stack:
        parts = stack.enter_context(open_merged(path, base=base))
        found, recorded = fingerprint(parts.weights), parts.merge.get("fingerprint")
        if found != recorded:
            raise InputError(
                f"{path}: must hold the weights that {MERGE} names, {str(recorded)[:8]}…; got "
                f"{found[:8]}…. Merge again."
            )
        under = None
        if parts.masks or base is not None:
            source = folder / MERGE
            under = stack.enter_context(open_recorded_base(parts.merge, base, source=source))
        yield TaskModels(folder, parts, under)


class TaskModel(Checkpoint):
    """One task's model as a checkpoint.

    Args:
        parts: The merged folder, opened.
        task: The task.
        base: What masks are applied to; needed only for masks.
        dtype: The type of floating tensors; None for their own.

    Attributes:
        head: Shape and type of the task's own tensors.
        shared: Shape and type of the merged model's.
        tied: Groups of names that are one tensor.
        scale: What the masked task vector is multiplied with; None without masks.

    Raises:
        InputError: The task's masks or tensors are missing or do not fit the others.

    Note:
        Closing it closes nothing: the folder serves other tasks too.
    """

    def __init__(
        self,
        parts: MergedParts,
        task: str,
        base: Checkpoint | None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        assert isinstance(parts.weights, Checkpoint), "opened from a folder"
        shared: Checkpoint = parts.weights
        self.path: Location = shared.path
        self.source = shared.source
        self.metadata: Mapping[str, str] = {}
        self.shared = shared.infos
        self.scale: float | None = None
        self._masks: Checkpoint | None = None
        if parts.masks:
            assert base is not None, "opened where there are masks"
            masks = _with_tied(parts.masks[task], shared, parts.merge)
            self.scale = scale_of(masks)
            self._masks = masks
            shared = MaskedCheckpoint(base, shared, masks, self.scale)
        own = parts.heads.get(task)
        assert own is None or isinstance(own, Checkpoint), "opened from a folder"
        per_task = _per_task(parts.merge)
        if per_task and own is None:
            raise InputError(
                f"{shared.path}: must lie beside the head of task {task!r}; got none for "
                f"{sorted(per_task)[0]!r}, which each task has of its own. Merge again."
            )
        head = self.head = own.infos if own is not None else {}
        infos = {
            name: head.get(name, info)
            for name, info in shared.infos.items()
            if name in head or name not in per_task
        }
        infos |= {name: info for name, info in head.items() if name not in infos}
        self._sources = {name: own if own and name in head else shared for name in infos}
        groups: dict[str, list[str]] = {}
        for name, leader in _recorded(parts.merge, "alias_of").items():
            if isinstance(leader, str) and name in infos and leader in infos:
                groups.setdefault(leader, [leader]).append(name)
        self.tied = tuple(map(tuple, groups.values()))
        self.infos = {
            name: replace(info, dtype=dtype) if dtype and info.dtype.is_floating_point else info
            for name, info in infos.items()
        }

    def file_of(self, name: str) -> Location:
        """Return the file that holds a tensor's values, unmasked."""
        return self._sources[name].file_of(name)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """See :meth:`Checkpoint.read_into`.

        Raises:
            InputError: A file cannot be read, or the type to read in does not hold a value.
        """
        stop = start + out.numel()
        check_range(self.infos[name], name, start, stop)
        source = self._sources[name]
        if out.dtype == source.infos[name].dtype:
            source.read_into(name, start, out)
            if self._masks is not None and name in self._masks and not all_finite(out):
                raise self._too_large(name, out.dtype, f"scaled by {self.scale:g}")
            return
        values = source.read(name, start, stop)
        out.copy_(values)
        if not all_finite(out) and all_finite(values):
            raise self._too_large(name, out.dtype, f"{values.abs().max().item():g}")

    def _too_large(self, name: str, dtype: torch.dtype, got: str) -> InputError:
        return InputError(
            f"{self.file_of(name)}: tensor {name!r} must fit {str(dtype).removeprefix('torch.')}; "
            f"got values that do not, {got}. Export in a wider type: --dtype float32."
        )


class _TiedMasks(Checkpoint):
    """Masks under the names of the tensors that are tied to theirs, too."""

    def __init__(self, masks: Checkpoint, leaders: Mapping[str, str]) -> None:
        self._masks = masks
        self._leaders = leaders
        self.path = masks.path
        self.source = masks.source
        self.metadata = masks.metadata
        tied = {name: masks.infos[leader] for name, leader in leaders.items()}
        self.infos = {**masks.infos, **tied}

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """See :meth:`Checkpoint.read_into`."""
        self._masks.read_into(self._leaders.get(name, name), start, out)


def _with_tied(masks: Checkpoint, shared: Checkpoint, merge: Mapping[str, Any]) -> Checkpoint:
    """Return masks also for tied tensors, which were merged once but are stored under each name."""
    leaders = {
        name: leader
        for name, leader in _recorded(merge, "alias_of").items()
        if isinstance(leader, str) and leader in masks and name in shared and name not in masks
    }
    return _TiedMasks(masks, leaders) if leaders else masks


def _per_task(merge: Mapping[str, Any]) -> frozenset[str]:
    actions = _recorded(merge, "action")
    return frozenset(name for name, action in actions.items() if action == "per-task")


def _recorded(merge: Mapping[str, Any], key: str) -> dict[str, object]:
    """Return an entry of the record by tensor."""
    tensors = merge.get("tensors")
    return {
        tensor["name"]: tensor.get(key)
        for tensor in (tensors if isinstance(tensors, list) else ())
        if isinstance(tensor, Mapping) and isinstance(tensor.get("name"), str)
    }
