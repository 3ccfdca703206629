"""Reading safetensors where they are stored, by ranges, through fsspec.

A merge asks for chunks of a few hundred kilobytes, and each request over a network waits as long as
one for megabytes. So whole blocks are fetched and the last few are kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future

import torch
from torch import Tensor

from lit_merge.checkpoint.safetensors_file import header_of
from lit_merge.checkpoint.tensor_source import Checkpoint, check_range
from lit_merge.errors import InputError
from lit_merge.location import RemotePath

_BLOCK = 4 * 2**20  # bytes
_KEPT = 4  # blocks of a file
_PICKLES = (b"PK\x03\x04", b"\x80")


class RemoteSafetensors(Checkpoint):
    """One safetensors file behind a URL; at most 16 MiB of it are held in memory.

    Raises:
        InputError: If it cannot be read, or is not a whole safetensors file.
    """

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        self.source = "safetensors"
        self._blocks = _Blocks(path)
        start = self._blocks.read(0, min(9, self._blocks.size))
        if start.startswith(_PICKLES) and start[8:] != b"{":
            raise InputError(
                f"{path}: must be safetensors to be read from a URL; got a file of torch.save. "
                "Copy it to this machine first, or save it as safetensors."
            )
        header = header_of(self._blocks.size, self._blocks.read, path)
        self.metadata = header.metadata
        self.infos = header.infos
        self._offsets = header.offsets
        self._closed = False

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read by position; see :meth:`Checkpoint.read_into`."""
        info = self.infos[name]
        check_range(info, name, start, start + out.numel())
        if out.dtype != info.dtype or not out.is_contiguous():
            raise TypeError(f"{name}: the buffer must be contiguous {info.dtype}; got {out.dtype}")
        if self._closed:
            raise ValueError(f"{self.path}: is closed")
        if out.numel():
            position = self._offsets[name] + start * info.dtype.itemsize
            self._blocks.read_into(position, out.view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Drop the blocks."""
        self._closed = True
        self._blocks.clear()


class _Blocks:
    """The blocks of a file that were used last; threads that want the same one fetch it once."""

    def __init__(self, path: RemotePath) -> None:
        self._path = path
        self.size = path.size()
        self._kept: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes ``start:stop``, which must lie in the file."""
        buffer = bytearray(stop - start)
        self.read_into(start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, position: int, buffer: memoryview) -> None:
        """Fill a buffer of bytes with those from a position on."""
        while buffer.nbytes:
            index, offset = divmod(position, _BLOCK)
            part = memoryview(self._block(index))[offset : offset + buffer.nbytes]
            buffer[: part.nbytes] = part
            buffer = buffer[part.nbytes :]
            position += part.nbytes

    def clear(self) -> None:
        """Forget every block."""
        with self._lock:
            self._kept.clear()

    def _block(self, index: int) -> bytes:
        with self._lock:
            future = self._kept.get(index)
            if future is not None:
                self._kept.move_to_end(index)
            else:
                mine = self._kept[index] = Future()
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
        if future is not None:
            return future.result()
        try:
            start = index * _BLOCK
            mine.set_result(self._path.read_range(start, min(start + _BLOCK, self.size)))
        except BaseException as error:
            with self._lock:  # the next one to ask tries again
                if self._kept.get(index) is mine:
                    del self._kept[index]
            mine.set_exception(error)
        return mine.result()
