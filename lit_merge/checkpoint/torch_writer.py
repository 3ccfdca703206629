"""Writing a file of ``torch.save`` whose tensors are never in memory together.

``torch.save`` writes the archive with the places of the tensors left empty, and the elements are
then filled in, chunk by chunk, from wherever they are.
"""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from lit_merge.checkpoint.tensor_source import Checkpoint, TensorInfo
from lit_merge.errors import InputError

_CHUNK = 2**18  # elements
_LOCAL_HEADER = 30  # bytes, before the name and the extra field of a file in a zip archive
_CENTRAL_HEADER = 46


def save_streamed(
    path: Path,
    content: Mapping[str, Any],
    key: str,
    weights: Checkpoint,
    *,
    names: Mapping[str, str],
) -> None:
    """Write what ``torch.save({key: state, **content}, path)`` would, reading weights by chunks.

    Args:
        path: The file; overwritten.
        content: What stands beside the state dict; it must hold no tensor.
        key: Where the state dict goes.
        weights: Where the tensors are read.
        names: The name in ``weights`` by the name in the state dict, in its order. Names that are
            given the same one are tied: one tensor under both.

    Raises:
        InputError: If the disk has no room.
    """
    require_room(path, (weights.infos[source] for source in set(names.values())))
    # Untouched memory takes no room: only shapes and types of these are written.
    placeholders = {
        source: torch.empty(weights.infos[source].shape, dtype=weights.infos[source].dtype)
        for source in names.values()
    }
    state = {name: placeholders[source] for name, source in names.items()}
    with torch.serialization.skip_data():
        torch.save({key: state, **content}, path)
    # The state dict is pickled first, so torch numbers its tensors from 0 on.
    places = _places(path)
    sums: dict[str, int] = {}
    with path.open("r+b", buffering=0) as file:
        for i, source in enumerate(placeholders):
            record = f"data/{i}"
            info = weights.infos[source]
            position, size = places[record]
            if size != info.nbytes:
                raise RuntimeError(f"{path}: {record} has {size} bytes, {source} {info.nbytes}")
            checksum = 0
            for start in range(0, info.numel, _CHUNK):
                values = weights.read(source, start, min(start + _CHUNK, info.numel))
                # reshape: a view as bytes keeps at least one axis
                data = values.contiguous().reshape(-1).view(torch.uint8).numpy().data
                checksum = zlib.crc32(data, checksum)
                _pwrite(file.fileno(), data, position)
                position += data.nbytes
            sums[record] = checksum
        _write_checksums(path, file.fileno(), sums)


def require_room(path: Path, infos: Iterable[TensorInfo]) -> None:
    """Check that a disk has room for tensors: torch's own error would not say what is wrong.

    Raises:
        InputError: With what is wanted and what there is.
    """
    wanted, free = sum(info.nbytes for info in infos), shutil.disk_usage(path.parent).free
    if wanted > free:
        raise InputError(
            f"{path}: must have {wanted:,} bytes free on its disk; got {free:,}. "
            "Free some space, or name an output on another disk."
        )


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Return first byte and size of every record of an archive of torch, by its name within."""
    places = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            start = info.header_offset + _LOCAL_HEADER + name + extra
            places[info.filename.split("/", 1)[1]] = (start, info.file_size)
    return places


def _write_checksums(path: Path, descriptor: int, sums: Mapping[str, int]) -> None:
    """Put the CRC-32 of what has been filled in where the archive keeps them.

    torch does not look at them, but every other reader of zip archives does. They stand in the
    directory at the end, in front of the record or, where bit 3 of the flags says so, behind it.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        position = archive.start_dir
    for info in entries:
        record = info.filename.split("/", 1)[1]
        header = os.pread(descriptor, _CENTRAL_HEADER, position)
        if record in sums and info.file_size:
            checksum = struct.pack("<I", sums[record])
            os.pwrite(descriptor, checksum, position + 16)
            if not info.flag_bits & 8:
                os.pwrite(descriptor, checksum, info.header_offset + 14)
            else:
                local = os.pread(descriptor, _LOCAL_HEADER, info.header_offset)
                end = info.header_offset + _LOCAL_HEADER + info.compress_size
                end += sum(struct.unpack("<HH", local[26:30]))
                signed = os.pread(descriptor, 4, end) == b"PK\x07\x08"
                os.pwrite(descriptor, checksum, end + 4 * signed)
        position += _CENTRAL_HEADER + sum(struct.unpack("<HHH", header[28:34]))


def _pwrite(descriptor: int, data: memoryview, position: int) -> None:
    while data.nbytes:
        count = os.pwrite(descriptor, data, position)
        data = data[count:]
        position += count
