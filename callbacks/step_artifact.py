"""The sums of an unfinished fit, in a file of their own beside its checkpoints.

They are as large as the model. In a checkpoint they would be copied around with every callback
state, and sharded checkpoints keep only the first rank's; so a checkpoint holds this file's name.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.checkpoint import open_checkpoint, save_tensors
from lit_merge.distributed import failing_together, is_sharded, rank
from lit_merge.errors import InputError
from lit_merge.expert.sharded import write_whole
from lit_merge.output import new_file
from lit_merge.sharding import own_part

_SUFFIX = ".safetensors"
_METADATA = "meta.pt"  # what is no tensor in a checkpoint of one part per rank


def file_name(estimator: str, step: int, batches: int | None = None) -> str:
    """Return the name of the file that holds the sums after so many optimizer steps.

    Where the sums also grow between two steps, the batches that they are over tell them apart.

    >>> file_name("squared-batch-gradient", 120)
    'squared-batch-gradient-step=120.safetensors'
    >>> file_name("exact-in-training", 120, 7)
    'exact-in-training-step=120-batches=7.safetensors'
    """
    part = "" if batches is None else f"-batches={batches}"
    return f"{estimator}-step={step}{part}{_SUFFIX}"


def save_sums(path: Path, sums: Mapping[str, Tensor], *, run: str) -> None:
    """Write the sums, whole or not at all, over those of an earlier run if need be.

    Collective if they are sharded: the first rank writes.

    Args:
        path: The file.
        sums: Tensors by name.
        run: Identifier of the run.
    """
    if not any(map(is_sharded, sums.values())):
        with new_file(path, replace=True) as file:
            save_tensors(file, {name: value.cpu() for name, value in sums.items()}, {"run": run})
        return
    with ExitStack() as stack:
        file = path
        with failing_together():
            if rank() == 0:
                file = stack.enter_context(new_file(path, replace=True))
        write_whole(file, sums, metadata={"run": run})
        with failing_together():
            stack.close()


def load_sums(
    name: str, folders: Iterable[Path], *, run: str, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """Return this process' part of the sums of a run, or None where no folder has them.

    Args:
        name: Name of the file.
        folders: Where to look, in this order.
        run: Identifier of the run; a file of another one is passed over.
        parameters: Each parameter, sharded or not, by what follows the first dot of a sum's name.

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
                if parameter not in parameters or parameters[parameter].shape != info.shape:
                    raise InputError(
                        f"{path}: must hold sums of the module's parameters; got {parameter!r} of "
                        f"shape {list(info.shape)}. Resume with the module that was trained, or "
                        "remove this file to begin the sums again."
                    )
            return {
                key: own_part(checkpoint.tensor(key), parameters[key.partition(".")[2]]).clone()
                for key in checkpoint
            }
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
            file = path / _METADATA if path.is_dir() else path
            checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            state = checkpoint.get("callbacks", {}).get(state_key, {})
        except (OSError, RuntimeError, ValueError, AttributeError, pickle.UnpicklingError):
            return
        used.add((state.get("steps") or {}).get("file"))
    for file in files:
        if file.name not in used:
            file.unlink(missing_ok=True)
