"""The sums of an unfinished fit, in a file of their own beside its checkpoints.

They are as large as the model. In a checkpoint they would be copied around with every callback
state, and sharded checkpoints keep only the first rank's; so a checkpoint holds this file's name.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.checkpoint import open_checkpoint, save_tensors
from lit_merge.errors import InputError
from lit_merge.output import new_file

_SUFFIX = ".safetensors"


def file_name(estimator: str, step: int) -> str:
    """Return the name of the file that holds the sums after so many optimizer steps.

    >>> file_name("squared-batch-gradient", 120)
    'squared-batch-gradient-step=120.safetensors'
    """
    return f"{estimator}-step={step}{_SUFFIX}"


def save_sums(path: Path, sums: Mapping[str, Tensor], *, run: str) -> None:
    """Write the sums, whole or not at all, over those of an earlier run if need be.

    Args:
        path: The file.
        sums: Tensors by name.
        run: Identifier of the run.
    """
    with new_file(path, replace=True) as file:
        save_tensors(file, {name: value.cpu() for name, value in sums.items()}, {"run": run})


def load_sums(
    name: str, folders: Iterable[Path], *, run: str, shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor] | None:
    """Return the sums of a run, or None where no folder has them.

    Args:
        name: Name of the file.
        folders: Where to look, in this order.
        run: Identifier of the run; a file of another one is passed over.
        shapes: The shape of each parameter, by the last part of the sum's name after a dot.

    Raises:
        InputError: The file is damaged, or of another model.
    """
    for folder in folders:
        path = folder / name
        if not path.is_file():
            continue
        with open_checkpoint(path) as checkpoint:
            if checkpoint.metadata.get("run") != run:
                continue
            for key, info in checkpoint.infos.items():
                parameter = key.partition(".")[2]
                if shapes.get(parameter) != torch.Size(info.shape):
                    raise InputError(
                        f"{path}: must hold sums of the module's parameters; got {parameter!r} of "
                        f"shape {list(info.shape)}. Resume with the module that was trained, or "
                        "remove this file to begin the sums again."
                    )
            return {key: checkpoint.tensor(key).clone() for key in checkpoint}
    return None


def remove_unused(folder: Path, *, estimator: str, state_key: str) -> None:
    """Remove the files in a folder that none of its checkpoints names any more.

    That is only looked for when there are more files than checkpoints. When a checkpoint cannot be
    read (it may still be being written), nothing is removed.

    Args:
        folder: Where checkpoints and files lie.
        estimator: Whose files.
        state_key: The key of the callback's state in the checkpoints.
    """
    files = sorted(folder.glob(f"{estimator}-step=*{_SUFFIX}"))
    checkpoints = list(folder.glob("**/*.ckpt"))
    if len(files) <= len(checkpoints):
        return
    used = set()
    for path in checkpoints:
        try:
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            state = checkpoint.get("callbacks", {}).get(state_key, {})
        except (OSError, RuntimeError, ValueError, AttributeError, pickle.UnpicklingError):
            return
        used.add((state.get("steps") or {}).get("file"))
    for file in files:
        if file.name not in used:
            file.unlink(missing_ok=True)
