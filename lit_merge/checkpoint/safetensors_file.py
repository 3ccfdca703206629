"""Reading safetensors files: the header once, then any range of elements by its position.

A file is 8 bytes (little-endian length of the header), the header (JSON: name → dtype, shape and
data_offsets relative to its end, and ``__metadata__``), then the data without gaps. The header is
checked against the size of the file before any data is read, at least as strictly as the
safetensors library does it; elements then come by ``preadv`` straight into the caller's buffer, so
a chunk costs only itself.

See https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.checkpoint.regular_file import open_regular_file, unreadable
from lit_merge.checkpoint.tensor_source import Checkpoint, TensorInfo, check_range
from lit_merge.errors import InputError
from lit_merge.location import Location
from lit_merge.strict_json import parse_json

# The names of the format that torch has a type for; some came to torch after 2.6.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype)
    for name, dtype in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
        "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2": "float8_e5m2",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
    }.items()
    if hasattr(torch, dtype)
}

_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_FIX = "Copy or save the file again."


@dataclass(frozen=True)
class Header:
    """What stands before the data: infos and positions (bytes from the start) by name."""

    infos: Mapping[str, TensorInfo]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]


class SafetensorsFile(Checkpoint):
    """One safetensors file, kept open.

    Raises:
        InputError: If the file is not a whole safetensors file with at least one tensor.
    """

    def __init__(self, path: Path) -> None:
        descriptor = open_regular_file(path)
        self._descriptor = descriptor
        self._finalizer = weakref.finalize(self, os.close, descriptor)
        self.path = self._file = path
        self.source = "safetensors"
        try:
            header = read_header(descriptor, path)
        except BaseException:
            self._finalizer()
            raise
        self.metadata = header.metadata
        self.infos = header.infos
        self._offsets = header.offsets

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read by position; see :meth:`Checkpoint.read_into`."""
        info = self.infos[name]
        check_range(info, name, start, start + out.numel())
        if out.dtype != info.dtype or not out.is_contiguous():
            raise TypeError(f"{name}: the buffer must be contiguous {info.dtype}; got {out.dtype}")
        if not self._finalizer.alive:
            raise ValueError(f"{self.path}: is closed")
        if out.numel() == 0:
            return
        buffer = out.view(torch.uint8).numpy().data
        position = self._offsets[name] + start * info.dtype.itemsize
        while buffer.nbytes:
            try:
                count = os.preadv(self._descriptor, [buffer], position)
            except OSError as error:
                raise unreadable(self._file, error) from error
            if count == 0:
                raise InputError(
                    f"{self.path}: tensor {name!r} must be whole; got the end of the file, which "
                    f"has been cut since it was opened. {_FIX}"
                )
            buffer = buffer[count:]
            position += count

    def close(self) -> None:
        """Close the file."""
        self._finalizer()


def read_header(descriptor: int, path: Path) -> Header:
    """Read and check the header of an open safetensors file.

    Raises:
        InputError: For any bytes that are not a whole, well-formed safetensors file, and for a file
            that cannot be read; nothing else.
    """
    try:
        return header_of(
            os.fstat(descriptor).st_size,
            lambda start, stop: os.pread(descriptor, stop - start, start),
            path,
        )
    except OSError as error:
        raise unreadable(path, error) from error


def header_of(size: int, read: Callable[[int, int], bytes], path: Location) -> Header:
    """Read and check the header of a safetensors file, wherever it is.

    Args:
        size: Of the file, in bytes.
        read: Returns the bytes from the first position up to the second.
        path: What messages call it.

    Raises:
        InputError: For any bytes that are not a whole, well-formed safetensors file.
    """
    prefix = read(0, min(8, size))
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
        raise InputError(
            f"{path}: must be a whole safetensors file; got {size} bytes where the header "
            f"should end at byte {8 + length}. {_FIX}"
        )
    text = read(8, 8 + length)
    entries, metadata = _parse(text, path)
    end = 0
    for name, info, start in entries:
        if start != end:
            raise _malformed(
                path, f"tensor {_short(name)} at byte {start} of the data where {end} is due"
            )
        end += info.nbytes
    if 8 + length + end != size:
        raise InputError(
            f"{path}: must be a whole safetensors file of {8 + length + end} bytes; got {size} "
            f"bytes. {_FIX}"
        )
    if not entries:
        raise InputError(f"{path}: must hold tensors; got none. Save the model again.")
    return Header(
        infos={name: info for name, info, _ in entries},
        offsets={name: 8 + length + start for name, _, start in entries},
        metadata=metadata,
    )


def _parse(
    text: bytes, path: Location
) -> tuple[list[tuple[str, TensorInfo, int]], Mapping[str, str]]:
    """Return name, info and first byte of every tensor in the order of the data, and metadata."""
    try:
        # Decoded here, as json would guess UTF-16 or UTF-32, which the format does not allow.
        fields = parse_json(text.decode())
    except ValueError as error:
        raise InputError(
            f"{path}: must have a header of JSON; got {error}. It is no safetensors file, or "
            f"damaged. {_FIX}"
        ) from error
    if not isinstance(fields, dict):
        raise _malformed(path, "a header that is no JSON object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _malformed(path, "__metadata__ that is not text by name")
    entries = sorted((_entry(name, field, path) for name, field in fields.items()), key=_position)
    return entries, metadata


def _entry(name: str, field: object, path: Location) -> tuple[str, TensorInfo, int]:
    """Return name, info and first byte of one tensor."""
    if not isinstance(field, dict) or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(path, f"tensor {_short(name)} without dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(
            f"{path}: tensor {_short(name)} must be of a type that torch {torch.__version__} can "
            f"compute with; got {_short(dtype)}. Save it as F32, F16 or BF16."
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _malformed(
            path,
            f"tensor {_short(name)} with shape {_short(shape)} and data_offsets {_short(offsets)}",
        )
    info = TensorInfo(tuple(shape), DTYPES[dtype])
    if _too_large(info):
        raise _malformed(path, f"tensor {_short(name)} with shape {_short(shape)}, too large")
    if info.nbytes != offsets[1] - offsets[0]:
        raise _malformed(
            path,
            f"tensor {_short(name)} with shape {_short(shape)}, {dtype}, in "
            f"{offsets[1] - offsets[0]} bytes",
        )
    return name, info, offsets[0]


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _too_large(info: TensorInfo) -> bool:
    """Return whether torch could not count its bytes, with 1 for a side that is 0 (as strides)."""
    size = info.dtype.itemsize
    for side in info.shape:
        size *= max(side, 1)
        if size >= 2**63:  # at once: a product of a million sides would take hours
            return True
    return False


def _position(entry: tuple[str, TensorInfo, int]) -> tuple[int, int]:
    return entry[2], entry[1].nbytes  # an empty tensor stands before the one that shares its place


def _short(value: object) -> str:
    """Return a value for a message, which a hostile file may not make as long as it likes."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]} … ({len(text)} characters)"


def _malformed(path: Location, got: str) -> InputError:
    return InputError(f"{path}: must be a well-formed safetensors file; got {got}. {_FIX}")
