"""What the ``.metadata`` of a distributed checkpoint says, read without running what is in it.

``torch.distributed.checkpoint`` (DCP) writes a folder: files ``*.distcp`` in which one
``torch.save`` after the other lies, each with a part of a tensor, and a ``.metadata`` that says
which part lies where. ``.metadata`` is a pickle. It is read here by an unpickler that knows the few
classes of that format, and puts plain records in their place: no class of torch or of anybody else
is made or called, and any other name is refused.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

import torch

from lit_merge.checkpoint.tensor_source import TensorInfo
from lit_merge.errors import InputError
from lit_merge.location import is_inside

_FIX = "Copy or save the checkpoint again."
_RECORDS = frozenset(
    f"{module}.{name}"
    for module, names in {
        "torch.distributed.checkpoint.metadata": (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.distributed._shard.sharded_tensor.metadata": (
            "MEM_FORMAT_ENCODING",
            "TensorProperties",
        ),
        "torch.serialization": ("_get_layout",),
        "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
        "pathlib._local": ("PosixPath", "WindowsPath"),
    }.items()
    for name in names
)
_inside = lru_cache(is_inside)  # a few files, and a piece of every tensor in each
_CONTAINERS = {"collections.OrderedDict": OrderedDict, "torch.Size": tuple}


@dataclass(frozen=True)
class Piece:
    """A block of a tensor, and where its ``torch.save`` lies.

    Attributes:
        offsets: Index of its first element in the tensor, by axis.
        sizes: Its shape.
        file: Name of the file, relative to the folder.
        position: First byte in the file.
        length: Number of bytes.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int
    length: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Entry:
    """A tensor of the checkpoint.

    Attributes:
        keys: The keys that lead to it in the dict that was saved, ``("model", "fc.weight")``; just
            its name where the file does not say.
        info: Shape and type of the whole.
        pieces: Blocks that cover each element once.
    """

    keys: tuple[str, ...]
    info: TensorInfo
    pieces: tuple[Piece, ...]


def read_metadata(path: Path) -> tuple[Entry, ...]:
    """Read ``.metadata``; what is no tensor (numbers, texts) is passed over.

    Raises:
        InputError: If the file names anything but the classes of the format, is damaged, or says
            what cannot be: pieces that overlap or leave gaps, a file outside the folder.
    """
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, path).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise _malformed(path, f"a pickle that cannot be read ({error})") from error
    tensors = _field(content, "state_dict_metadata", dict, path)
    stored = _field(content, "storage_data", dict, path)
    keys = getattr(content, "planner_data", None)
    files = _files(stored, path)
    return tuple(
        _entry(name, value, keys if isinstance(keys, dict) else {}, files, path)
        for name, value in tensors.items()
        if hasattr(value, "chunks")
    )


class _Record:
    """Stands for an object of any class of the format: its fields, and nothing that acts."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


# The one written in Python: in the one written in C, five bytes can ask for any amount of memory.
class _Unpickler(pickle._Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path
        # A class of its own for each file: a pickle can set attributes of a class it has got.
        self._record = type("Record", (_Record,), {})

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _RECORDS:
            return self._record
        if full in _CONTAINERS:
            return _CONTAINERS[full]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise InputError(
            f"{self._path}: must hold only what torch.distributed.checkpoint writes, so that "
            f"opening it runs no code; got {full}. Save the checkpoint again with "
            "torch.distributed.checkpoint, on a machine where you trust the file."
        )


def _files(stored: Mapping[object, object], path: Path) -> dict[tuple[str, object], Any]:
    """Return the storage of each piece by name of the tensor and offsets of the piece."""
    files: dict[tuple[str, object], Any] = {}
    for index, storage in stored.items():
        name, offset = getattr(index, "fqn", None), getattr(index, "offset", None)
        if not isinstance(name, str) or not (offset is None or _naturals(offset)):
            raise _malformed(path, "a piece without name or offset")
        files[name, offset] = storage
    return files


def _entry(
    name: object,
    value: object,
    keys: Mapping[object, object],
    files: Mapping[tuple[str, object], Any],
    path: Path,
) -> Entry:
    if not isinstance(name, str):
        raise _malformed(path, f"a tensor with the name {name!r}")
    size, chunks = getattr(value, "size", None), getattr(value, "chunks", None)
    properties = getattr(value, "properties", None)
    state = getattr(properties, "state", None)
    # The state of TensorProperties is a tuple with the type first; very old ones are by name.
    dtype = state[0] if isinstance(state, tuple) and state else getattr(properties, "dtype", None)
    if not _naturals(size) or not isinstance(dtype, torch.dtype) or not isinstance(chunks, list):
        raise _malformed(path, f"tensor {name!r} without shape, type and pieces")
    info = TensorInfo(size, dtype)
    # By offset: a piece that several ranks hold alike is stored, and wanted, once.
    by_offset = {p.offsets: p for p in (_piece(name, chunk, info, files, path) for chunk in chunks)}
    pieces = tuple(p for p in by_offset.values() if p.numel)
    if sum(p.numel for p in pieces) != info.numel or _overlap(pieces):
        raise _malformed(
            path, f"pieces of tensor {name!r} that do not cover its shape {list(info.shape)} once"
        )
    found = keys.get(name)
    own = tuple(map(str, found)) if isinstance(found, tuple) and found else (name,)
    return Entry(own, info, pieces)


def _piece(
    name: str,
    chunk: object,
    info: TensorInfo,
    files: Mapping[tuple[str, object], Any],
    path: Path,
) -> Piece:
    offsets, sizes = getattr(chunk, "offsets", None), getattr(chunk, "sizes", None)
    if not (_naturals(offsets) and _naturals(sizes)) or not (
        len(offsets) == len(sizes) == len(info.shape)
        and all(o + s <= n for o, s, n in zip(offsets, sizes, info.shape, strict=True))
    ):
        raise _malformed(
            path,
            f"a piece of tensor {name!r} at {offsets!r} of size {sizes!r}, which does not lie in "
            f"its shape {list(info.shape)}",
        )
    storage = files.get((name, offsets))
    file = getattr(storage, "relative_path", None)
    place = (getattr(storage, "offset", None), getattr(storage, "length", None))
    if not isinstance(file, str) or not _naturals(place):
        if math.prod(sizes) == 0:  # an empty part need not be stored
            return Piece(offsets, sizes, "", 0, 0)
        raise _malformed(path, f"a piece of tensor {name!r} at {offsets!r} that lies nowhere")
    if not _inside(file):
        raise InputError(
            f"{path}: tensor {name!r} must be in a file of the same folder; got {file!r}. {_FIX}"
        )
    transforms = getattr(storage, "transform_descriptors", None)
    if transforms:
        raise InputError(
            f"{path}: tensor {name!r} must be stored as it is; got one that went through "
            f"{transforms!r}. Save the checkpoint without extensions."
        )
    return Piece(offsets, sizes, file, *place)


def _overlap(pieces: Iterable[Piece]) -> bool:
    """Return whether two blocks share an element."""
    ordered = sorted(pieces, key=lambda p: p.offsets)
    for i, piece in enumerate(ordered):
        for other in itertools.islice(ordered, i + 1, None):
            if piece.offsets and other.offsets[0] >= piece.offsets[0] + piece.sizes[0]:
                break  # the further ones begin later still
            if all(
                a < b + n and b < a + m
                for a, m, b, n in zip(
                    piece.offsets, piece.sizes, other.offsets, other.sizes, strict=True
                )
            ):
                return True
    return False


def _field(content: object, name: str, kind: type, path: Path) -> Any:
    value = getattr(content, name, None)
    if not isinstance(value, kind):
        raise _malformed(path, f"no {name}")
    return value


def _naturals(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _malformed(path: Path, got: str) -> InputError:
    return InputError(
        f"{path}: must be the metadata of a distributed checkpoint; got {got}. {_FIX}"
    )
