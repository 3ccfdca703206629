"""Checkpoints: one lazy interface to every way in which people store weights.

:func:`open_checkpoint` takes a safetensors file, a file of ``torch.save`` (as Lightning's .ckpt is)
or a folder in the layout of Hugging Face, in one file or in shards with an index, or one of
torch.distributed.checkpoint; safetensors also from where fsspec reads (``s3://…``). Nothing is
unpickled that is no tensor, and no path outside the folder is followed. The other names of this
module are those of its parts, so that ``lit_merge.checkpoint`` is the one place to import from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor

from lit_merge.checkpoint.adapter import (
    AdaptedWeight,
    AdapterCheckpoint,
    LowRankUpdate,
    adapter_folder,
    open_adapter,
)
from lit_merge.checkpoint.adapter_tensors import require_no_factors
from lit_merge.checkpoint.dcp import METADATA, DistributedCheckpoint
from lit_merge.checkpoint.regular_file import require_regular_file
from lit_merge.checkpoint.remote import RemoteSafetensors
from lit_merge.checkpoint.safetensors_file import SafetensorsFile
from lit_merge.checkpoint.safetensors_writer import SafetensorsWriter, save_tensors
from lit_merge.checkpoint.state_dict import (
    aligned,
    alignment,
    common_prefix,
    fingerprint,
    load_into,
)
from lit_merge.checkpoint.tensor_source import (
    Checkpoint,
    RenamedCheckpoint,
    StateDict,
    TensorInfo,
    open_state_dict,
    plain_names,
    unwrapped,
)
from lit_merge.checkpoint.torch_file import open_torch_file
from lit_merge.errors import InputError
from lit_merge.location import Location, RemotePath, is_inside, locate
from lit_merge.strict_json import parse_json

__all__ = [
    "AdaptedWeight",
    "AdapterCheckpoint",
    "Checkpoint",
    "DistributedCheckpoint",
    "LowRankUpdate",
    "RenamedCheckpoint",
    "SafetensorsWriter",
    "StateDict",
    "TensorInfo",
    "aligned",
    "alignment",
    "common_prefix",
    "fingerprint",
    "has_weights",
    "is_inside",
    "load_into",
    "open_checkpoint",
    "open_state_dict",
    "plain_names",
    "require_no_factors",
    "save_tensors",
    "unwrapped",
]

# In the order in which they are looked for: safetensors before pickles, as in transformers.
_SINGLE = {"safetensors": "model.safetensors", "torch": "pytorch_model.bin"}
_INDEX = {"safetensors": "model.safetensors.index.json", "torch": "pytorch_model.bin.index.json"}
_NOT_WEIGHTS = (
    "hessian.safetensors",
    "activations.safetensors",
    "gram.safetensors",
    "kronecker.safetensors",
)
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def open_checkpoint(
    path: str | Path | RemotePath,
    *,
    weights: Literal["averaged", "raw"] = "averaged",
    base: Checkpoint | None = None,
) -> Checkpoint:
    """Open a checkpoint of any known kind; only headers are read.

    Args:
        path: A safetensors file, a file of ``torch.save``, an index of shards, or a folder that
            holds ``model.safetensors`` or ``pytorch_model.bin`` or an index of one of them, or the
            ``.metadata`` of torch.distributed.checkpoint, or else exactly one checkpoint file. A
            URL of safetensors is read where it is, by ranges.
        weights: Which weights to take from a Lightning checkpoint that holds both those that were
            trained ("raw") and their running average ("averaged").
        base: What a PEFT LoRA adapter is added to
            (:class:`~lit_merge.checkpoint.adapter.AdapterCheckpoint`). It stays open when the
            adapter is closed. Other checkpoints do not need it.

    Returns:
        The tensors under the names in which they are stored, less what wrappers have added to them;
        see :func:`unwrapped`.

    Raises:
        InputError: If there is no checkpoint, more than one, or one that is damaged, asks for code
            to be run, or reaches outside its folder.
    """
    if weights not in ("averaged", "raw"):
        raise InputError(
            f'weights: must be "averaged" or "raw"; got {weights!r}. Choose one of the two.'
        )
    named = locate(path)
    try:
        if not named.exists():
            raise InputError(f"{path}: must exist; got no such file or folder. Check the path.")
        adapter = adapter_folder(named)
        if adapter is not None and (named != adapter or not has_weights(adapter)):
            return open_adapter(adapter, base)
        checkpoint = _open_folder(named, weights) if named.is_dir() else _open_file(named, weights)
    except OSError as error:
        raise InputError(
            f"{path}: must be readable; got {error.strerror}. Check the path and its permissions."
        ) from error
    names = plain_names(checkpoint)
    if any(old != new for old, new in names.items()):
        return RenamedCheckpoint(checkpoint, names)
    return checkpoint


def has_weights(folder: Location) -> bool:
    """Return whether a folder holds weights under one of the standard names."""
    return any((folder / name).exists() for name in (*_SINGLE.values(), *_INDEX.values()))


def _open_folder(folder: Location, weights: Literal["averaged", "raw"]) -> Checkpoint:
    if (folder / METADATA).is_file():
        if isinstance(folder, RemotePath):
            raise InputError(
                f"{folder}: must be safetensors to be read from a URL; got a distributed "
                "checkpoint. Copy it to this machine first."
            )
        return DistributedCheckpoint(folder)
    for kind in _SINGLE:
        single, index = folder / _SINGLE[kind], folder / _INDEX[kind]
        if single.exists() and index.exists():
            raise InputError(
                f"{folder}: must hold one set of weights; got {single.name} and {index.name}, and "
                "nothing tells which is newer. Remove one of them, or name it."
            )
        if index.exists():
            return ShardedCheckpoint(index, path=folder)
        if single.exists():
            checkpoint = _open_file(single, weights)
            if (folder / "config.json").exists():
                checkpoint.source = "huggingface"
            return checkpoint
    found = sorted(
        p for p in folder.iterdir() if p.suffix in _SUFFIXES and p.name not in _NOT_WEIGHTS
    )
    if len(found) > 1:
        raise InputError(
            f"{folder}: must hold one checkpoint; got {', '.join(p.name for p in found[:5])}"
            f"{' …' if len(found) > 5 else ''}. Name the file."
        )
    if not found:
        entries = sorted(p.name for p in folder.iterdir())
        raise InputError(
            f"{folder}: must hold model.safetensors, another checkpoint or an index of shards; got "
            f"{', '.join(entries[:5]) if entries else 'an empty folder'}. Check the path."
        )
    return open_checkpoint(found[0], weights=weights)


def _open_file(path: Location, weights: Literal["averaged", "raw"]) -> Checkpoint:
    """Open a file by what it begins with, whatever its suffix."""
    if path.name.endswith(".index.json"):
        return ShardedCheckpoint(path, path=path)
    if isinstance(path, RemotePath):
        return RemoteSafetensors(path)
    require_regular_file(path)
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return SafetensorsFile(path)
    if start.startswith((_ZIP, _PICKLE)):
        return open_torch_file(path, weights=weights)
    raise InputError(
        f"{path}: must be a checkpoint of safetensors or torch.save; got a file that begins with "
        f"{start!r}. Convert it to safetensors."
    )


class ShardedCheckpoint(Checkpoint):
    """Shards with an index, as transformers saves large models.

    Args:
        index: The ``*.index.json``.
        path: What the user named, the folder or the index.

    Raises:
        InputError: If index and shards do not hold the same tensors, or the index names a file that
            is missing or not in its folder.
    """

    def __init__(self, index: Location, *, path: Location) -> None:
        self.path = path
        self.source = "huggingface"
        files, self.metadata = _read_index(index)
        self._shards: dict[str, Checkpoint] = {}
        infos: dict[str, TensorInfo] = {}
        try:
            for file in dict.fromkeys(files.values()):
                shard = self._open_shard(index, file)
                for name in shard:
                    if files.get(name) != file:
                        raise InputError(
                            f"{index.parent / file}: must hold only what {index.name} says; got "
                            f"tensor {name!r} beside it. Save the model again."
                        )
                    self._shards[name] = shard
                    infos[name] = shard.infos[name]
            for name, file in files.items():
                if name not in infos:
                    raise InputError(
                        f"{index.parent / file}: must hold tensor {name!r}, as {index.name} says; "
                        "got a shard without it. Copy or save the model again."
                    )
        except BaseException:
            self.close()
            raise
        self.infos = infos

    @staticmethod
    def _open_shard(index: Location, file: str) -> Checkpoint:
        shard = index.parent / file
        if not shard.exists():
            raise InputError(
                f"{shard}: must exist, as {index.name} names it; got no such file. "
                "Copy or download the missing shard."
            )
        return _open_file(shard, "averaged")

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """See :meth:`Checkpoint.read_into`."""
        self._shards[name].read_into(name, start, out)

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """See :meth:`Checkpoint.read`."""
        return self._shards[name].read(name, start, stop, buffer)

    def tensor(self, name: str) -> Tensor:
        """See :meth:`Checkpoint.tensor`."""
        return self._shards[name].tensor(name)

    def file_of(self, name: str) -> Location:
        """Return the shard that holds a tensor."""
        return self._shards[name].file_of(name)

    def close(self) -> None:
        """Close every shard."""
        for shard in self._shards.values():
            shard.close()


def _read_index(index: Location) -> tuple[dict[str, str], dict[str, str]]:
    """Return the file of every tensor, and the metadata as text."""
    fix = "Copy or save the model again."
    if isinstance(index, Path):
        require_regular_file(index)
    try:
        content = parse_json(index.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{index}: must be an index of shards in JSON; got {error}. {fix}"
        ) from error
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files:
        raise InputError(f"{index}: must have a weight_map with tensors; got {files!r}. {fix}")
    for name, file in files.items():
        if not isinstance(file, str) or not is_inside(file):
            raise InputError(
                f"{index}: tensor {name!r} must be in a file of the same folder; got {file!r}. "
                f"{fix}"
            )
    metadata = content.get("metadata")
    items = metadata.items() if isinstance(metadata, dict) else ()
    return files, {name: str(value) for name, value in items}
