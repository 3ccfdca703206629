"""Reading safetensors files: the header once, then any range of elements by its position.

A file is 8 bytes (little-endian length of the header), the header (JSON: name → dtype, shape and
data_offsets relative to its end, and ``__metadata__``), then the data without gaps. The header is
checked against the size of the file before anything is read, by the safetensors library and by us;
elements then come by ``preadv`` straight into the caller's buffer, so a chunk costs only itself.

See https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lit_merge.checkpoint.tensor_source import Checkpoint, TensorInfo, check_range
from lit_merge.errors import InputError
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
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise InputError(
                f"{path}: must be a file that can be read; got {error.strerror}. Check the path."
            ) from error
        self._descriptor = descriptor
        self._finalizer = weakref.finalize(self, os.close, descriptor)
        self.path = path
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
            count = os.preadv(self._descriptor, [buffer], position)
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
        InputError: For any bytes that are not a whole, well-formed safetensors file; nothing else.
    """
    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER):
        raise InputError(
            f"{path}: must be a whole safetensors file; got {size} bytes where the header should "
            f"end at byte {8 + length}. {_FIX}"
        )
    try:
        fields = parse_json(os.pread(descriptor, length, 8))
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
    end = 0
    for name, info, start in entries:
        if start != end:
            raise _malformed(
                path, f"tensor {name!r} at byte {start} of the data where {end} is due"
            )
        end += info.nbytes
    if 8 + length + end != size:
        raise InputError(
            f"{path}: must be a whole safetensors file of {8 + length + end} bytes; got {size} "
            f"bytes. {_FIX}"
        )
    if not entries:
        raise InputError(f"{path}: must hold tensors; got none. Save the model again.")
    _check_with_library(path)
    return Header(
        infos={name: info for name, info, _ in entries},
        offsets={name: 8 + length + start for name, _, start in entries},
        metadata=metadata,
    )


def _check_with_library(path: Path) -> None:
    try:
        with safe_open(str(path), framework="numpy"):
            return
    except Exception as error:  # the library names no base class of its errors
        raise _malformed(path, str(error)) from error


def _entry(name: str, field: object, path: Path) -> tuple[str, TensorInfo, int]:
    """Return name, info and first byte of one tensor."""
    if not isinstance(field, dict) or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(path, f"tensor {name!r} without dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(
            f"{path}: tensor {name!r} must be of a type that torch {torch.__version__} can compute "
            f"with; got {dtype!r}. Save it as F32, F16 or BF16."
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _malformed(path, f"tensor {name!r} with shape {shape!r} and data_offsets {offsets!r}")
    info = TensorInfo(tuple(shape), DTYPES[dtype])
    if math.prod(shape) * info.dtype.itemsize != offsets[1] - offsets[0]:
        raise _malformed(
            path,
            f"tensor {name!r} with shape {shape!r}, {dtype}, in {offsets[1] - offsets[0]} bytes",
        )
    return name, info, offsets[0]


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _position(entry: tuple[str, TensorInfo, int]) -> tuple[int, int]:
    return entry[2], entry[1].nbytes  # an empty tensor stands before the one that shares its place


def _malformed(path: Path, got: str) -> InputError:
    return InputError(f"{path}: must be a well-formed safetensors file; got {got}. {_FIX}")
