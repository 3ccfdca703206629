"""The expert folder: weights, how sure each of them is, and what that was measured on.

============================ ======================================================================
``model.safetensors``        the weights
``hessian.safetensors``      Σ over the training examples of the per-example Fisher, fp32, a tensor
                             per parameter under the parameter's name
``activations.safetensors``  ``<site>.count`` (int64, []), ``<site>.mean`` and ``<site>.m2`` ([C])
``expert.json``              :class:`~lit_merge.expert.info.ExpertInfo`
============================ ======================================================================

Only the weights must be there. Curvature belongs to weights by their fingerprint, and is refused
beside any others.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lit_merge.checkpoint import (
    Checkpoint,
    aligned,
    alignment,
    fingerprint,
    has_weights,
    open_checkpoint,
    open_state_dict,
    save_tensors,
    unwrapped,
)
from lit_merge.errors import InputError
from lit_merge.expert.contents import (
    check_activations,
    check_finite,
    check_hessian,
    check_names,
    checked_activations,
    checked_hessian,
    listed,
    plain,
    renamed,
)
from lit_merge.expert.info import FORMAT_VERSION, ExpertInfo, current_versions, read_info
from lit_merge.output import new_file, new_folder, require_free

__all__ = ["FORMAT_VERSION", "Expert", "ExpertInfo", "add_to_expert", "open_expert", "write_expert"]

_INFO = "expert.json"
_HESSIAN = "hessian.safetensors"
_ACTIVATIONS = "activations.safetensors"


@dataclasses.dataclass(frozen=True)
class Expert:
    """An opened expert; nothing but headers and the fingerprint's samples has been read.

    Attributes:
        path: What the user named.
        info: What is known about it; all defaults without ``expert.json``.
        weights: The weights.
        hessian: The curvature under the names of the weights, or None.
        activations: The activation statistics, or None.
        notes: What a user should be told about how it was taken.
    """

    path: Path
    info: ExpertInfo
    weights: Checkpoint
    hessian: Checkpoint | None
    activations: Checkpoint | None
    notes: tuple[str, ...]

    def close(self) -> None:
        """Close every file."""
        for checkpoint in (self.weights, self.hessian, self.activations):
            if checkpoint is not None:
                checkpoint.close()


def open_expert(
    path: str | Path,
    *,
    weights: Literal["averaged", "raw"] = "averaged",
    hessian: str | Path | None = None,
) -> Expert:
    """Open an expert.

    Args:
        path: An expert folder; the folder of a run with exactly one expert folder below it; or any
            checkpoint that :func:`lit_merge.checkpoint.open_checkpoint` takes, with
            ``hessian.safetensors`` beside it or without. In a run folder ``expert/`` goes before
            weights that lie in the folder itself, and these before experts further down.
        weights: Which weights to take from a Lightning checkpoint that holds two.
        hessian: A file with the curvature, instead of the one in the folder.

    Raises:
        InputError: If there is no expert or there are several, or if the curvature does not fit the
            weights: other names, shapes or types, or the fingerprint of other weights.
    """
    try:
        folder = _find_folder(Path(path))
    except OSError as error:
        raise InputError(
            f"{path}: must be readable; got {error.strerror}. Check the path and its permissions."
        ) from error
    with ExitStack() as stack:
        if (folder / _INFO).is_file():
            info = read_info(folder / _INFO)
            opened = stack.enter_context(open_checkpoint(folder / info.weights, weights=weights))
            names = alignment(_named(info), opened)
            info = renamed(info, lambda name: names[name])
            check_names(info, opened)
        else:
            info = ExpertInfo()
            opened = stack.enter_context(open_checkpoint(folder, weights=weights))
        notes = []
        if "weights" in opened.metadata:
            notes.append(f"{opened.path}: holds averaged and raw weights: took {weights}")
        file = _hessian_file(folder, hessian)
        curvature = None
        if file is not None:
            curvature = stack.enter_context(aligned(open_checkpoint(file), opened))
            check_hessian(curvature, opened)
            owner = curvature.metadata.get("fingerprint", info.fingerprint)
            if owner is None:
                notes.append(f"{file}: no expert.json: curvature taken as it is")
            elif owner != (found := fingerprint(opened)):
                raise _of_other_weights(file, owner, opened.path, found)
        statistics = None
        if (folder / _ACTIVATIONS).is_file():
            statistics = stack.enter_context(open_checkpoint(folder / _ACTIVATIONS))
            check_activations(statistics)
        stack.pop_all()  # from here on, the caller closes them
    return Expert(Path(path), info, opened, curvature, statistics, tuple(notes))


def write_expert(
    path: str | Path,
    *,
    weights: Mapping[str, Tensor],
    info: ExpertInfo,
    hessian: Mapping[str, Tensor] | None = None,
    activations: Mapping[str, Tensor] | None = None,
    replace: bool = False,
) -> Path:
    """Write an expert folder, whole or not at all.

    What wrappers such as torch.compile have put into names is removed from all of them.

    Args:
        path: The folder.
        weights: Parameters and buffers by name.
        info: What to record; ``fingerprint`` and ``versions`` are filled in.
        hessian: Σ over ``info.num_examples`` examples, by parameter name, in the weights' shapes.
        activations: ``<site>.count``, ``<site>.mean`` and ``<site>.m2`` by site.
        replace: Whether an existing non-empty folder may be replaced.

    Returns:
        The path.

    Raises:
        InputError: If the folder may not be written, a value is NaN or infinite, a Hessian is
            negative, or names and shapes do not fit each other.
    """
    if Path(info.weights).suffix != ".safetensors":
        raise InputError(
            f"weights: must be a .safetensors file; got {info.weights!r}. Leave the default."
        )
    require_free(path, replace=replace)
    stored = plain(weights, "weights")
    check_finite(stored, "weights", "Take a checkpoint from before the training diverged.")
    opened = open_state_dict(stored, path="weights")
    info = dataclasses.replace(
        renamed(info, unwrapped), fingerprint=fingerprint(opened), versions=current_versions()
    )
    check_names(info, opened)
    text = info.to_json()
    curvature = None if hessian is None else checked_hessian(hessian, opened)
    statistics = None if activations is None else checked_activations(activations)
    with new_folder(path, replace=replace) as folder:
        file = folder / info.weights
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, stored, {"format": "pt"})
        _save_artifacts(folder, info, curvature, statistics)
        (folder / _INFO).write_text(text, encoding="utf-8")
    return Path(path)


def add_to_expert(
    path: str | Path,
    *,
    weights_fingerprint: str,
    info_changes: Mapping[str, Any] | None = None,
    hessian: Mapping[str, Tensor] | None = None,
    activations: Mapping[str, Tensor] | None = None,
) -> Path:
    """Add curvature or statistics to an expert folder that holds the same weights.

    Each file is written aside and renamed, ``expert.json`` last. What is there already of the same
    kind is replaced: it belongs to the same weights.

    Args:
        path: The folder.
        weights_fingerprint: Of the weights that the addition was measured on.
        info_changes: Entries of :class:`ExpertInfo` to set.
        hessian: As for :func:`write_expert`.
        activations: As for :func:`write_expert`.

    Returns:
        The path.

    Raises:
        InputError: If this is no expert folder, or one of other weights, or the addition does not
            fit; see :func:`write_expert`.
    """
    folder = Path(path)
    if not (folder / _INFO).is_file():
        raise InputError(
            f"{path}: must be an expert folder; got no {_INFO} in it. Write the expert first."
        )
    info = read_info(folder / _INFO)
    known = {f.name for f in dataclasses.fields(ExpertInfo)} - {
        "fingerprint",
        "weights",
        "versions",
    }
    for key in info_changes or {}:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise InputError(
                f"info_changes: must be entries of expert.json that may change; got {key!r}. "
                + (f"Did you mean {near[0]!r}?" if near else "Put it under details.")
            )
    with open_checkpoint(folder / info.weights) as weights:
        found = fingerprint(weights)
        if weights_fingerprint != found:
            raise InputError(
                f"{path}: belongs to other weights, {found[:8]}…; got an addition measured on "
                f"{weights_fingerprint[:8]}…. Write it into a folder of its own."
            )
        info = renamed(dataclasses.replace(info, **dict(info_changes or {})), unwrapped)
        info = dataclasses.replace(info, fingerprint=found, versions=current_versions())
        check_names(info, weights)
        text = info.to_json()
        curvature = None if hessian is None else checked_hessian(hessian, weights)
        statistics = None if activations is None else checked_activations(activations)
    _save_artifacts(folder, info, curvature, statistics)
    with new_file(folder / _INFO, replace=True) as file:
        file.write_text(text, encoding="utf-8")
    return folder


def _save_artifacts(
    folder: Path,
    info: ExpertInfo,
    hessian: Mapping[str, Tensor] | None,
    activations: Mapping[str, Tensor] | None,
) -> None:
    metadata = {"fingerprint": info.fingerprint or ""}
    if hessian is not None:
        with new_file(folder / _HESSIAN, replace=True) as file:
            save_tensors(file, hessian, {**metadata, "reduction": info.reduction})
    if activations is not None:
        with new_file(folder / _ACTIVATIONS, replace=True) as file:
            save_tensors(file, activations, metadata)


def _find_folder(path: Path) -> Path:
    """Return the expert folder that is meant, or the path itself where there is none."""
    if path.is_file():
        # The weights inside an expert folder, named directly: their curvature is beside them.
        beside = path.parent / _INFO
        if beside.is_file() and (path.parent / read_info(beside).weights) == path:
            return path.parent
        return path
    if not path.is_dir() or (path / _INFO).is_file():
        return path
    if (path / "expert" / _INFO).is_file():
        return path / "expert"
    if has_weights(path):
        return path
    found = sorted(file.parent for file in path.glob(f"**/expert/{_INFO}"))
    if len(found) > 1:
        raise InputError(
            f"{path}: must hold one expert folder; got {listed(str(p) for p in found)}. "
            "Name one of them."
        )
    return found[0] if found else path


def _named(info: ExpertInfo) -> tuple[str, ...]:
    tied = (name for group in info.tied_parameters for name in group)
    return (*info.head_parameters, *info.frozen_parameters, *tied)


def _hessian_file(folder: Path, hessian: str | Path | None) -> Path | None:
    """Return the file of the curvature: the one that was named, or the one in the folder."""
    if hessian is None:
        beside = folder / _HESSIAN
        return beside if beside.is_file() else None
    named = Path(hessian)
    return named / _HESSIAN if named.is_dir() else named


def _of_other_weights(file: Path, owner: str, weights: Path, found: str) -> InputError:
    return InputError(
        f"{file}: belongs to weights {owner[:8]}…, but {weights} is {found[:8]}…. "
        'Run "lit-merge curvature" on these weights.'
    )
