"""Writing safetensors files: a stream with the header first, or a whole dict at once."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_merge.checkpoint.safetensors_file import DTYPES
from lit_merge.checkpoint.tensor_source import TensorInfo, require_tensors
from lit_merge.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """A safetensors file whose tensors are written in any order, in flat chunks, from any thread.

    The header and the size of the file are written first. Tensors lie in the order of ``infos``,
    wide types before narrow ones, so that each is aligned.

    Args:
        path: The file; its folder must exist. An existing file is overwritten: write inside
            :func:`lit_merge.output.new_folder`.
        infos: Shape and type of every tensor by name.
        metadata: Text by name for the header.
        shared: Whether other processes, or an earlier run, write other tensors of the same file:
            what is there stays, and nobody checks here that all is written.

    Raises:
        InputError: If the format has no such type, or the disk has no room.
    """

    def __init__(
        self,
        path: Path,
        infos: Mapping[str, TensorInfo],
        metadata: Mapping[str, str] | None = None,
        *,
        shared: bool = False,
    ) -> None:
        self.path = path
        self.infos = dict(infos)
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in infos}
        self._offsets, header, size = _layout(path, self.infos, dict(metadata or {}))
        free = shutil.disk_usage(path.parent).free
        have = path.stat().st_blocks * 512 if shared and path.exists() else 0
        if size > free + have:
            raise InputError(
                f"{path}: must have {size:,} bytes free on its disk; got {free:,}. "
                "Free some space, or name an output on another disk."
            )
        flags = os.O_RDWR | os.O_CREAT | (0 if shared else os.O_TRUNC)
        self._shared = shared
        self._descriptor = os.open(path, flags, 0o666)
        self._finalizer = weakref.finalize(self, os.close, self._descriptor)
        os.truncate(self._descriptor, size)
        self._write_bytes(memoryview(header), 0)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write elements from ``start`` on.

        Args:
            name: The tensor.
            start: Index of the first element, row-major.
            values: The elements, of any shape and type, in row-major order; cast to the declared
                type.
        """
        info = self.infos[name]
        stop = start + values.numel()
        if not 0 <= start <= stop <= info.numel:
            raise IndexError(f"{name}: no elements {start}:{stop} in {info.numel}")
        if values.numel():
            flat = values.detach().to(device="cpu", dtype=info.dtype).reshape(-1).contiguous()
            position = self._offsets[name] + start * info.dtype.itemsize
            self._write_bytes(flat.view(torch.uint8).numpy().data, position)
        if not self._shared:
            self._written[name].append((start, stop))

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file.

        Raises:
            RuntimeError: If elements were not written.
        """
        self._finalizer()
        for name, info in self.infos.items() if not self._shared else ():
            end = 0
            for start, stop in sorted(self._written[name]):
                if start > end:
                    break
                end = max(end, stop)
            if end < info.numel:
                raise RuntimeError(
                    f"{self.path}: {name}: element {end} of {info.numel} not written"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._finalizer()

    def _write_bytes(self, buffer: memoryview, position: int) -> None:
        while buffer.nbytes:
            count = os.pwrite(self._descriptor, buffer, position)
            buffer = buffer[count:]
            position += count


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors into one safetensors file.

    Tensors that share memory (tied weights, views) are each written in full, under every name.

    Args:
        path: The file; its folder must exist. An existing file is overwritten.
        tensors: Tensors by name, on any device, of any strides.
        metadata: Text by name for the header.

    Raises:
        InputError: If there is no tensor, or one that the format cannot hold, or the disk has no
            room.
    """
    require_tensors(tensors, path)
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with SafetensorsWriter(path, infos, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, 0, tensor)


def dtype_name(dtype: torch.dtype, name: str, path: Path) -> str:
    """Return what the format calls a type.

    Raises:
        InputError: If it has no name for it.
    """
    if dtype not in _NAMES:
        raise InputError(
            f"{path}: tensor {name!r} must be of a type that safetensors has; got {dtype}. "
            "Convert it to float32 first."
        )
    return _NAMES[dtype]


def _layout(
    path: Path, infos: Mapping[str, TensorInfo], metadata: dict[str, str]
) -> tuple[dict[str, int], bytes, int]:
    """Return the position of every tensor, the bytes before the data, and the size of the file."""
    fields: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for name, info in sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize):
        fields[name] = {
            "dtype": dtype_name(info.dtype, name, path),
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        starts[name] = end
        end += info.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    header = len(text).to_bytes(8, "little") + text
    return {name: first + start for name, start in starts.items()}, header, first + end
