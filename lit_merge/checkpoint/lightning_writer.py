"""Writing weights as a checkpoint of Lightning, which ``Module.load_from_checkpoint`` takes.

The hyper-parameters and the names of the tensors are those of a template, the checkpoint that the
merge began with; what belongs to its training (optimizers, loops, callbacks) is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_merge.checkpoint.dcp import LIGHTNING, METADATA, DistributedCheckpoint
from lit_merge.checkpoint.state_dict import alignment
from lit_merge.checkpoint.tensor_source import Checkpoint, unwrapped
from lit_merge.checkpoint.torch_file import load_torch_file
from lit_merge.checkpoint.torch_writer import save_streamed
from lit_merge.errors import InputError
from lit_merge.location import is_remote
from lit_merge.output import new_file

_VERSION = "pytorch-lightning_version"
# What a trainer stores to go on training; the last are those of WeightAveraging and of AMP.
_OF_TRAINING = frozenset(
    (
        "state_dict",
        "epoch",
        "global_step",
        "loops",
        "callbacks",
        "optimizer_states",
        "lr_schedulers",
        "current_model_state",
        "averaging_state",
        "native_amp_scaling_state",
    )
)


def write_lightning_checkpoint(
    path: str | Path,
    weights: Checkpoint,
    template: str | Path | None = None,
    *,
    replace: bool = False,
) -> tuple[str, ...]:
    """Write weights as a Lightning checkpoint, whole or not at all.

    Memory holds one chunk of one tensor.

    Args:
        path: The file, such as ``merged.ckpt``.
        weights: The tensors.
        template: A Lightning checkpoint, or a folder of torch.distributed.checkpoint that Lightning
            wrote, of the same model. The result has its hyper-parameters, what the module's own
            ``on_save_checkpoint`` added, and its names; names that it ties are tied.
        replace: Whether an existing file may be replaced.

    Returns:
        What a user should be told: that there was no template, or what of it was left out.

    Raises:
        InputError: If the weights and the template do not have the same tensors, the template is
            damaged, or the file may not be written.
    """
    content, names, notes = lightning_contents(path, weights, template)
    with new_file(path, replace=replace) as file:
        save_streamed(file, content, "state_dict", weights, names=names)
    return notes


def lightning_contents(
    path: str | Path, weights: Checkpoint, template: str | Path | None
) -> tuple[dict[str, Any], Mapping[str, str], tuple[str, ...]]:
    """Return what stands beside the weights in a checkpoint of Lightning, their names, and notes.

    Args:
        path: What will be written, for the notes.
        weights: The tensors.
        template: As for :func:`write_lightning_checkpoint`.

    Returns:
        Contents without tensors; the name in the weights by the name in the result; notes.

    Raises:
        InputError: As :func:`write_lightning_checkpoint`.
    """
    content: dict[str, Any] = {"epoch": 0, "global_step": 0, _VERSION: _lightning_version()}
    given = None if template is None or is_remote(template) else Path(template)
    found = None if given is None else read_template(given)
    if found is None:
        note = (
            f"{path}: has no hyper-parameters, since {template or 'the base'} is no Lightning "
            "checkpoint: give them to load_from_checkpoint"
        )
        return content, {name: name for name in weights}, (note,)
    settings, state = found
    dropped = sorted(key for key, value in settings.items() if _holds_tensor(value))
    kept = {key: value for key, value in settings.items() if key not in dropped}
    notes = (f"{path}: without {key!r} of {template}, which holds tensors" for key in dropped)
    return {**content, **kept}, _names(weights, state, Path(str(template))), tuple(notes)


class _Slot(NamedTuple):
    """A tensor of a template: its shape, and what tells where it is stored, alike for tied ones."""

    shape: tuple[int, ...]
    place: object


def read_template(template: Path) -> tuple[dict[str, Any], dict[str, _Slot]] | None:
    """Return what a Lightning checkpoint holds beside training and weights, and of the weights.

    Returns:
        The contents that a merged checkpoint takes over, and the tensors by name; None if it is no
        Lightning checkpoint.

    Raises:
        InputError: If it cannot be read without running code in it.
    """
    if template.is_dir():
        if not (template / METADATA).is_file():
            files = sorted(template.glob("*.ckpt"))
            return read_template(files[0]) if len(files) == 1 else None
        if not (template / LIGHTNING).is_file():
            return None
        content = load_torch_file(template / LIGHTNING)
        with DistributedCheckpoint(template) as opened:
            state = {n: _Slot(info.shape, n) for n, info in opened.infos.items()}
    else:
        if template.suffix == ".safetensors":
            return None
        content = load_torch_file(template)
        tensors = content.get("state_dict") if isinstance(content, Mapping) else None
        state = {
            name: _Slot(tuple(value.shape), _place(value) if value.numel() else name)
            for name, value in (tensors if isinstance(tensors, Mapping) else {}).items()
            if isinstance(value, Tensor)
        }
    if not isinstance(content, Mapping) or _VERSION not in content or not state:
        return None
    return {key: value for key, value in content.items() if not _is_of_training(key)}, state


def _place(value: Tensor) -> object:
    return value.data_ptr(), value.stride(), value.dtype


def _names(weights: Checkpoint, state: Mapping[str, _Slot], template: Path) -> dict[str, str]:
    """Return the name in the weights by the name in the template.

    Raises:
        InputError: If one has a tensor that the other lacks, or of another shape.
    """
    plain = {name: unwrapped(name) for name in state}
    by_plain = {new: old for old, new in alignment(weights, plain.values()).items()}
    by_slot = {state[name]: by_plain[own] for name, own in plain.items() if own in by_plain}
    names: dict[str, str] = {}
    for name, own in plain.items():
        # Tied tensors may be stored once in the weights.
        source = by_plain.get(own, by_slot.get(state[name]))
        if source is None:
            raise InputError(
                f"{weights.path}: must hold every tensor of {template}; got none for {name!r}. "
                "Name the checkpoint of the same model as template."
            )
        shape = weights.infos[source].shape
        if shape != state[name].shape:
            raise InputError(
                f"{weights.file_of(source)}: tensor {source!r} must have the shape "
                f"{list(state[name].shape)} of {template}, whose hyper-parameters the result gets; "
                f"got {list(shape)}. Name the checkpoint of the same model as template."
            )
        names[name] = source
    extra = [name for name in weights if name not in names.values()]
    if extra:
        raise InputError(
            f"{weights.file_of(extra[0])}: must hold only tensors of {template}; got {extra[0]!r}. "
            "Name the checkpoint of the same model as template."
        )
    return names


def _is_of_training(key: str) -> bool:
    return key in _OF_TRAINING or key.endswith("Precision")  # the state of a precision plugin


def _holds_tensor(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Tensor)):
        return any(map(_holds_tensor, value))
    return isinstance(value, (Tensor, torch.UntypedStorage, torch.TypedStorage))


def _lightning_version() -> str:
    try:
        return version("lightning")
    except PackageNotFoundError:
        return "2.0.0"  # the oldest whose layout this is
