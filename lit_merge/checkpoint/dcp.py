"""Reading the folders of ``torch.distributed.checkpoint`` (DCP): FSDP2, Lightning, any sharding.

Opening reads ``.metadata`` only, needs no process group and runs nothing that the files hold. A
range of elements is put together from the pieces that it meets. A piece is what ``torch.save``
wrote, a zip archive with the elements stored as they are: where these are contiguous, which they
nearly always are, exactly the bytes wanted are read from their place.
"""

from __future__ import annotations

import io
import math
import os
import threading
import warnings
import weakref
import zipfile
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.checkpoint.dcp_metadata import Entry, Piece, read_metadata
from lit_merge.checkpoint.regular_file import open_regular_file, unreadable
from lit_merge.checkpoint.tensor_source import Checkpoint, check_range
from lit_merge.errors import InputError

METADATA = ".metadata"
LIGHTNING = "meta.pt"
"""Where Lightning's strategies keep what is no tensor of the model or an optimizer."""

_FIX = "Copy or save the checkpoint again."
# The keys under which a model lies: Lightning's FSDP and ModelParallel strategies, and others.
_MODEL_KEYS = ("state_dict", "model", "model_state_dict", "module")
_LOCAL_HEADER = 30  # bytes, before the name and the extra field of a file in a zip archive


class DistributedCheckpoint(Checkpoint):
    """The model in a DCP folder; what an optimizer has stored beside it is left out.

    Taken is what was saved under "state_dict", "model", "model_state_dict" or "module", at any
    depth (the least deep of several); else what was saved under no key, as by
    ``dcp.save(model.state_dict())``; else what was saved under the only key that is no optimizer's.
    ``metadata["key"]`` says which.

    Raises:
        InputError: If the metadata is damaged or hostile, a file is missing or cut, or nothing says
            which of several groups of tensors is the model.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = self.path = folder
        self.source = "lightning" if (folder / LIGHTNING).is_file() else "torch"
        entries, key = _model(read_metadata(folder / METADATA), folder)
        self.metadata: Mapping[str, str] = {"key": key} if key else {}
        self._entries = entries
        self.infos = {name: entry.info for name, entry in entries.items()}
        self._files = _open_files(folder, entries.values())
        self._finalizer = weakref.finalize(self, _close, self._files)
        self._places: dict[Piece, int | None] = {}
        # The last piece whose elements do not lie in order, by thread: a chunk meets it again.
        self._loaded = threading.local()

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read from every piece that the range meets; see :meth:`Checkpoint.read_into`."""
        info = self.infos[name]
        stop = start + out.numel()
        check_range(info, name, start, stop)
        if out.dtype != info.dtype or not out.is_contiguous():
            raise TypeError(f"{name}: the buffer must be contiguous {info.dtype}; got {out.dtype}")
        if not self._finalizer.alive:
            raise ValueError(f"{self.path}: is closed")
        if out.numel() == 0:
            return
        for piece in self._entries[name].pieces:
            runs = _Runs(info.shape, piece)
            first, last = runs.meeting(start, stop)
            if first == last:
                continue
            begin, end = runs.within(first, start), runs.within(last - 1, stop)
            if last - first == 1:  # one stretch of the tensor: straight into the buffer
                at = runs.start(first) + begin - first * runs.length - start
                self._read_piece(name, piece, begin, out[at : at + end - begin])
                continue
            values = torch.empty(end - begin, dtype=info.dtype)
            self._read_piece(name, piece, begin, values)
            for run in range(first, last):
                low, high = runs.within(run, start), runs.within(run, stop)
                at = runs.start(run) + low - run * runs.length - start
                out[at : at + high - low] = values[low - begin : high - begin]

    def file_of(self, name: str) -> Path:
        """Return the first file that holds a part of a tensor."""
        pieces = self._entries[name].pieces
        return self._folder / pieces[0].file if pieces else self._folder

    def close(self) -> None:
        """Close every file."""
        self._finalizer()

    def _read_piece(self, name: str, piece: Piece, start: int, out: Tensor) -> None:
        """Fill ``out`` with the elements of a piece from ``start`` on, row-major in the piece."""
        if piece not in self._places:
            self._places[piece] = self._place(name, piece)
        place = self._places[piece]
        if place is None:
            values = self._whole(name, piece)
            out.copy_(values.view(-1)[start : start + out.numel()])
            return
        buffer = out.view(torch.uint8).numpy().data
        _pread(
            self._files[piece.file],
            buffer,
            place + start * out.dtype.itemsize,
            self._folder / piece.file,
        )

    def _place(self, name: str, piece: Piece) -> int | None:
        """Return the byte where the elements of a piece begin; None unless they are in order."""
        with _Slice(self._files[piece.file], piece, self._folder / piece.file) as file:
            with _elements_left_out():
                value = self._load(name, piece, file)
            if not value.is_contiguous() or value.is_conj() or value.is_neg():
                return None
            file.seek(0)
            try:
                with zipfile.ZipFile(file) as archive:
                    found = [i for i in archive.infolist() if i.filename.endswith("/data/0")]
            except zipfile.BadZipFile:
                return None  # written before torch 1.6's format, or with it switched off
            (data,) = found if len(found) == 1 else (None,)
            if data is None or data.compress_type != zipfile.ZIP_STORED:
                return None
            file.seek(data.header_offset)
            header = file.read(_LOCAL_HEADER)
            names = int.from_bytes(header[26:28], "little") + int.from_bytes(
                header[28:30], "little"
            )
            begin = data.header_offset + _LOCAL_HEADER + names
            offset = int(value.storage_offset()) * value.dtype.itemsize
            if offset + value.nbytes > data.file_size or begin + data.file_size > piece.length:
                raise self._damaged(name, piece, "too few elements")
            return piece.position + begin + offset

    def _whole(self, name: str, piece: Piece) -> Tensor:
        """Return a piece in memory, contiguous."""
        if getattr(self._loaded, "piece", None) != piece:
            with _Slice(self._files[piece.file], piece, self._folder / piece.file) as file:
                self._loaded.value = self._load(name, piece, file).contiguous()
            self._loaded.piece = piece
        value: Tensor = self._loaded.value
        return value

    def _load(self, name: str, piece: Piece, file: io.RawIOBase) -> Tensor:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the age of the file; it loads or it raises
                value = torch.load(io.BufferedReader(file), map_location="cpu", weights_only=True)
        except InputError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            raise self._damaged(
                name, piece, f"{type(error).__name__}: {str(error)[:200]}"
            ) from error
        dtype = self.infos[name].dtype
        if (
            not isinstance(value, Tensor)
            or value.layout != torch.strided
            or (value.dtype, tuple(value.shape)) != (dtype, piece.sizes)
        ):
            raise self._damaged(name, piece, f"a {_described(value)}")
        return value.detach()

    def _damaged(self, name: str, piece: Piece, got: str) -> InputError:
        return InputError(
            f"{self._folder / piece.file}: must hold, from byte {piece.position} on, a piece of "
            f"tensor {name!r} of shape {list(piece.sizes)}, {self.infos[name].dtype}; got {got}. "
            f"{_FIX}"
        )


class _Runs:
    """A block of a tensor as runs of elements that lie side by side in the whole tensor."""

    def __init__(self, shape: tuple[int, ...], piece: Piece) -> None:
        axis = len(shape)
        while axis > 0 and piece.sizes[axis - 1] == shape[axis - 1]:
            axis -= 1
        # Axes from `axis` on are whole; the one before is cut, and ends a run.
        axis = max(axis - 1, 0)
        self.length = math.prod(piece.sizes[axis:])
        self.count = math.prod(piece.sizes[:axis])
        self._sizes = piece.sizes[:axis]
        self._strides = [math.prod(shape[i + 1 :]) for i in range(axis)]
        self._first = sum(o * math.prod(shape[i + 1 :]) for i, o in enumerate(piece.offsets))

    def start(self, run: int) -> int:
        """Return the place in the whole tensor at which a run begins."""
        position = self._first
        for size, stride in zip(reversed(self._sizes), reversed(self._strides), strict=True):
            run, index = divmod(run, size)
            position += index * stride
        return position

    def meeting(self, start: int, stop: int) -> tuple[int, int]:
        """Return the first run that meets a range of the whole tensor, and the one after it."""
        first = bisect_right(range(self.count), start - self.length, key=self.start)
        last = bisect_right(range(self.count), stop - 1, key=self.start)
        return first, max(first, last)

    def within(self, run: int, position: int) -> int:
        """Return the place in the block of an element of the whole, or the run's nearest end."""
        return run * self.length + min(max(position - self.start(run), 0), self.length)


class _Slice(io.RawIOBase):
    """Part of an open file as a file, read by position: safe beside other threads."""

    def __init__(self, descriptor: int, piece: Piece, path: Path) -> None:
        self._descriptor, self._piece, self._path = descriptor, piece, path
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._piece.length}[whence]
        self._at = max(origin + offset, 0)
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        view = view[: max(self._piece.length - self._at, 0)]
        _pread(self._descriptor, view, self._piece.position + self._at, self._path)
        self._at += view.nbytes
        return view.nbytes


def _elements_left_out() -> AbstractContextManager[None]:
    """Return where ``torch.load`` reads shapes and strides only, if this torch can do that."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        return nullcontext()
    return torch.serialization.skip_data()


def _pread(descriptor: int, buffer: memoryview, position: int, path: Path) -> None:
    while buffer.nbytes:
        try:
            count = os.preadv(descriptor, [buffer], position)
        except OSError as error:
            raise unreadable(path, error) from error
        if count == 0:
            raise InputError(
                f"{path}: must be whole; got the end of the file at byte {position}, which has "
                f"been cut since it was opened. {_FIX}"
            )
        buffer = buffer[count:]
        position += count


def _open_files(folder: Path, entries: Iterable[Entry]) -> dict[str, int]:
    """Return a descriptor for each file, checked to be as long as its pieces need it."""
    files: dict[str, int] = {}
    try:
        for entry in entries:
            for piece in entry.pieces:
                path = folder / piece.file
                if piece.file not in files:
                    if not path.exists():
                        raise InputError(
                            f"{path}: must exist, as {METADATA} names it; got no such file. Copy "
                            "the parts that all ranks have written into one folder."
                        )
                    files[piece.file] = open_regular_file(path)
                size = os.fstat(files[piece.file]).st_size
                if piece.position + piece.length > size:
                    raise InputError(
                        f"{path}: must be a whole file, with tensor "
                        f"{'.'.join(entry.keys)!r} up to byte {piece.position + piece.length}; got "
                        f"{size} bytes. {_FIX}"
                    )
    except BaseException:
        _close(files)
        raise
    return files


def _close(files: dict[str, int]) -> None:
    for descriptor in files.values():
        os.close(descriptor)
    files.clear()


def _model(entries: Iterable[Entry], folder: Path) -> tuple[dict[str, Entry], str]:
    """Return the tensors of the model by name, and the key under which they lay."""
    groups: dict[tuple[str, ...], dict[str, Entry]] = {}
    for entry in entries:
        nest, name = _nest(entry.keys)
        groups.setdefault(nest, {})[name] = entry
    known = [nest for nest in groups if nest and nest[-1] in _MODEL_KEYS]
    depth = min(map(len, known), default=0)
    models = [nest for nest in known if len(nest) == depth]
    if not models:
        models = [()] if () in groups else [n for n in groups if not _is_optimizer(groups[n])]
    if not models:
        raise InputError(f"{folder}: must hold tensors; got none. Save the model again.")
    if len(models) > 1:
        raise InputError(
            f"{folder}: must hold one model; got tensors under "
            f"{', '.join(repr('.'.join(nest)) for nest in sorted(models)[:5])}. Save the one to "
            "merge under the key 'model', or in a folder of its own."
        )
    return groups[models[0]], ".".join(models[0])


def _nest(keys: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """Return the keys that lead to a state dict, and the name of the tensor in it."""
    for i, key in enumerate(keys[:-1]):
        if key in _MODEL_KEYS:
            return keys[: i + 1], ".".join(keys[i + 1 :])
    return keys[:1] if len(keys) > 1 else (), ".".join(keys[1:] or keys)


def _is_optimizer(names: Iterable[str]) -> bool:
    return all(name.startswith(("state.", "param_groups.")) for name in names)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{type(value).__name__} of shape {list(value.shape)}, {value.dtype}"
    return type(value).__name__
