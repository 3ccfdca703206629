"""The expert folder: weights, how sure each of them is, and what that was measured on.

============================ ======================================================================
``model.safetensors``        the weights
``hessian.safetensors``      Σ over the training examples of the per-example Fisher, fp32, a tensor
                             per parameter under the parameter's name
``activations.safetensors``  ``<site>.count`` (int64, []), ``<site>.mean`` and ``<site>.m2`` ([C])
``gram.safetensors``         Σ over the training examples and their positions of x xᵀ, fp32 [n, n],
                             under the name of the weight [m, n] that multiplies the inputs x; see
                             :mod:`lit_merge.curvature.input_grams`
``kronecker.safetensors``    ``<weight>.input`` [n, n] and ``<weight>.output`` [m, m], fp32, whose
                             Kronecker product stands for the Hessian summed over the examples; see
                             :mod:`lit_merge.curvature.kronecker`
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
    AdapterCheckpoint,
    Checkpoint,
    aligned,
    alignment,
    fingerprint,
    has_weights,
    open_checkpoint,
    open_state_dict,
    require_no_factors,
    save_tensors,
    unwrapped,
)
from lit_merge.errors import InputError
from lit_merge.expert.contents import (
    check_activations,
    check_finite,
    check_hessian,
    check_names,
    check_owners,
    checked_activations,
    checked_hessian,
    listed,
    plain,
    renamed,
)
from lit_merge.expert.factors import (
    aligned_factors,
    check_gram,
    check_kronecker,
    checked_gram,
    checked_kronecker,
)
from lit_merge.expert.info import FORMAT_VERSION, ExpertInfo, current_versions, read_info
from lit_merge.location import Location, RemotePath, locate
from lit_merge.output import new_file, new_folder, require_free

__all__ = ["FORMAT_VERSION", "Expert", "ExpertInfo", "add_to_expert", "open_expert", "write_expert"]

_INFO = "expert.json"
_HESSIAN = "hessian.safetensors"
_ACTIVATIONS = "activations.safetensors"
_GRAM = "gram.safetensors"
_KRONECKER = "kronecker.safetensors"


@dataclasses.dataclass(frozen=True)
class Expert:
    """An opened expert; nothing but headers and the fingerprint's samples has been read.

    Attributes:
        path: What the user named.
        info: What is known about it; all defaults without ``expert.json``.
        weights: The weights.
        hessian: The curvature under the names of the weights, or None.
        activations: The activation statistics, or None.
        gram: The Gram matrices of the inputs under the names of the weights, or None.
        kronecker: The Kronecker factors under the names of the weights and ``.input`` or
            ``.output``, or None.
        notes: What a user should be told about how it was taken.
    """

    path: Location
    info: ExpertInfo
    weights: Checkpoint
    hessian: Checkpoint | None
    activations: Checkpoint | None
    gram: Checkpoint | None
    kronecker: Checkpoint | None
    notes: tuple[str, ...]

    def close(self) -> None:
        """Close every file."""
        artifacts = (self.hessian, self.activations, self.gram, self.kronecker)
        for checkpoint in (self.weights, *artifacts):
            if checkpoint is not None:
                checkpoint.close()


def open_expert(
    path: str | Path | RemotePath,
    *,
    weights: Literal["averaged", "raw"] = "averaged",
    hessian: str | Path | RemotePath | None = None,
    base: Checkpoint | None = None,
) -> Expert:
    """Open an expert.

    Args:
        path: An expert folder; the folder of a run with exactly one expert folder below it; or any
            checkpoint that :func:`lit_merge.checkpoint.open_checkpoint` takes, with
            ``hessian.safetensors`` beside it or without; also behind a URL. In a run folder
            ``expert/`` goes before weights that lie in the folder itself, and these before experts
            further down.
        weights: Which weights to take from a Lightning checkpoint that holds two.
        hessian: A file with the curvature, instead of the one in the folder.
        base: What a PEFT LoRA adapter was trained on. It stays open when the expert is closed.

    Raises:
        InputError: If there is no expert or there are several, or if the curvature does not fit the
            weights: other names, shapes or types, or the fingerprint of other weights.
    """
    try:
        named = locate(path)
        folder = _find_folder(named)
    except OSError as error:
        raise InputError(
            f"{path}: must be readable; got {error.strerror}. Check the path and its permissions."
        ) from error
    with ExitStack() as stack:
        if (folder / _INFO).exists():
            info = read_info(folder / _INFO)
            file = folder / info.weights
            opened = stack.enter_context(open_checkpoint(file, weights=weights, base=base))
            names = alignment(_named(info), opened)
            info = renamed(info, lambda name: names[name])
            check_names(info, opened)
        else:
            info = ExpertInfo()
            opened = stack.enter_context(open_checkpoint(folder, weights=weights, base=base))
        notes = []
        if "weights" in opened.metadata:
            notes.append(f"{opened.path}: holds averaged and raw weights: took {weights}")
        if isinstance(opened, AdapterCheckpoint):
            notes.append(f"{opened.path}: {opened.description}")
        beside = _hessian_file(folder, hessian)
        curvature = None
        if beside is not None:
            curvature = stack.enter_context(aligned(open_checkpoint(beside), opened))
            require_no_factors(curvature)
            check_hessian(curvature, opened)
        gram = None
        if (folder / _GRAM).exists():
            gram = stack.enter_context(aligned(open_checkpoint(folder / _GRAM), opened))
            check_gram(gram, opened)
        kronecker = None
        if (folder / _KRONECKER).exists():
            factors = open_checkpoint(folder / _KRONECKER)
            kronecker = stack.enter_context(aligned_factors(factors, opened))
            check_kronecker(kronecker, opened)
        measured = [artifact for artifact in (curvature, gram, kronecker) if artifact is not None]
        notes += check_owners(measured, info, opened)
        statistics = None
        if (folder / _ACTIVATIONS).exists():
            statistics = stack.enter_context(open_checkpoint(folder / _ACTIVATIONS))
            check_activations(statistics)
        stack.pop_all()  # from here on, the caller closes them
    return Expert(named, info, opened, curvature, statistics, gram, kronecker, tuple(notes))


def write_expert(
    path: str | Path,
    *,
    weights: Mapping[str, Tensor],
    info: ExpertInfo,
    hessian: Mapping[str, Tensor] | None = None,
    activations: Mapping[str, Tensor] | None = None,
    gram: Mapping[str, Tensor] | None = None,
    kronecker: Mapping[str, Tensor] | None = None,
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
        gram: Σ x xᵀ over the examples' positions, [n, n] by weight name.
        kronecker: ``<weight>.input`` [n, n] and ``<weight>.output`` [m, m].
        replace: Whether an existing non-empty folder may be replaced.

    Returns:
        The path.

    Raises:
        InputError: If the folder may not be written, a value is NaN or infinite, a Hessian is
            negative, a matrix not symmetric, or names and shapes do not fit each other.
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
    artifacts = _checked_artifacts(opened, hessian, activations, gram, kronecker)
    with new_folder(path, replace=replace) as folder:
        file = folder / info.weights
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, stored, {"format": "pt"})
        _save_artifacts(folder, info, artifacts)
        (folder / _INFO).write_text(text, encoding="utf-8")
    return Path(path)


def add_to_expert(
    path: str | Path,
    *,
    weights_fingerprint: str,
    info_changes: Mapping[str, Any] | None = None,
    hessian: Mapping[str, Tensor] | None = None,
    activations: Mapping[str, Tensor] | None = None,
    gram: Mapping[str, Tensor] | None = None,
    kronecker: Mapping[str, Tensor] | None = None,
    base: Checkpoint | None = None,
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
        gram: As for :func:`write_expert`.
        kronecker: As for :func:`write_expert`.
        base: Where the weights are a PEFT LoRA adapter, what it was trained on.

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
    with open_checkpoint(folder / info.weights, base=base) as weights:
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
        artifacts = _checked_artifacts(weights, hessian, activations, gram, kronecker)
    _save_artifacts(folder, info, artifacts)
    with new_file(folder / _INFO, replace=True) as file:
        file.write_text(text, encoding="utf-8")
    return folder


def _checked_artifacts(
    weights: Checkpoint,
    hessian: Mapping[str, Tensor] | None,
    activations: Mapping[str, Tensor] | None,
    gram: Mapping[str, Tensor] | None,
    kronecker: Mapping[str, Tensor] | None,
) -> dict[str, dict[str, Tensor]]:
    """Return what is given as it is stored, by file."""
    artifacts = {}
    if hessian is not None:
        artifacts[_HESSIAN] = checked_hessian(hessian, weights)
    if activations is not None:
        artifacts[_ACTIVATIONS] = checked_activations(activations)
    if gram is not None:
        artifacts[_GRAM] = checked_gram(gram, weights)
    if kronecker is not None:
        artifacts[_KRONECKER] = checked_kronecker(kronecker, weights)
    return artifacts


def _save_artifacts(
    folder: Path, info: ExpertInfo, artifacts: Mapping[str, Mapping[str, Tensor]]
) -> None:
    for name, tensors in artifacts.items():
        metadata = {"fingerprint": info.fingerprint or ""}
        if name != _ACTIVATIONS:
            metadata["reduction"] = info.reduction
        with new_file(folder / name, replace=True) as file:
            save_tensors(file, tensors, metadata)


def _find_folder(path: Location) -> Location:
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
    found = sorted((file.parent for file in path.glob(f"**/expert/{_INFO}")), key=str)
    if len(found) > 1:
        raise InputError(
            f"{path}: must hold one expert folder; got {listed(str(p) for p in found)}. "
            "Name one of them."
        )
    return found[0] if found else path


def _named(info: ExpertInfo) -> tuple[str, ...]:
    tied = (name for group in info.tied_parameters for name in group)
    return (*info.head_parameters, *info.frozen_parameters, *tied)


def _hessian_file(folder: Location, hessian: str | Path | RemotePath | None) -> Location | None:
    """Return the file of the curvature: the one that was named, or the one in the folder."""
    if hessian is None:
        beside = folder / _HESSIAN
        return beside if beside.exists() else None
    named = locate(hessian)
    return named / _HESSIAN if named.is_dir() else named
