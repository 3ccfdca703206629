"""Named tensors that are read lazily: the interface, and the two forms that need no file.

A :class:`Checkpoint` knows the shape and type of every tensor from headers alone, and reads any
flat range of elements of any of them. What a file format must add is :meth:`Checkpoint.read_into`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.location import Location

if TYPE_CHECKING:
    from typing_extensions import Self

# What wrappers put into the names: torch.compile, activation checkpointing, FSDP1, Lightning's
# strategies.
_WRAPPERS = frozenset(
    ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
)


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the elements, in bytes."""
        return self.numel * self.dtype.itemsize


class Checkpoint(ABC):
    """Tensors by name, read one at a time or in flat chunks, on the CPU.

    Reading is safe from several threads at once. Iteration, ``in`` and ``len`` are over the names.

    Attributes:
        path: The file, or the folder of its shards.
        source: "lightning", "safetensors", "huggingface", "torch", "adapter" or "memory".
        metadata: What the file says about itself. ``metadata["weights"]`` is "averaged" or "raw"
            for a Lightning checkpoint that holds both.
        infos: Shape and type by name, in the order of the file.
    """

    path: Location
    source: str
    metadata: Mapping[str, str]
    infos: Mapping[str, TensorInfo]

    @abstractmethod
    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out`` with the flat elements from ``start`` on.

        Args:
            name: The tensor.
            start: Index of the first element, row-major.
            out: Contiguous, 1-D, on the CPU, of the tensor's own type: a buffer to be used again.

        Raises:
            InputError: If the file cannot be read (any more).
        """

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Return the flat elements ``start:stop``, 1-D, in the tensor's own type.

        Args:
            name: The tensor.
            start: The first element.
            stop: The one after the last.
            buffer: A tensor of this type and number of elements that may be filled. What is in
                memory already is returned as a view of it instead.
        """
        info = self.infos[name]
        check_range(info, name, start, stop)
        out = torch.empty(stop - start, dtype=info.dtype) if buffer is None else buffer
        self.read_into(name, start, out)
        return out

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor; not to be written to, it may share memory with the source."""
        info = self.infos[name]
        return self.read(name, 0, info.numel).reshape(info.shape)

    def file_of(self, name: str) -> Location:
        """Return the file that holds a tensor, for messages."""
        return self.path

    def digest(self) -> str | None:
        """Return what tells these tensors from others where that is not their values, or None.

        Values that are computed as they are read differ in their last bits from machine to machine.
        """
        return None

    def close(self) -> None:  # noqa: B027 - in memory there is nothing to close
        """Release the files; nothing can be read afterwards."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def __len__(self) -> int:
        return len(self.infos)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class StateDict(Checkpoint):
    """Tensors in memory (or mapped into it) behind the interface of a checkpoint.

    Raises:
        InputError: If there is no tensor, or an entry is no ordinary dense tensor.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        *,
        path: str | Path = "<memory>",
        source: str = "memory",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        require_tensors(state, path)
        self.path = Path(path)
        self.source = source
        self.metadata = dict(metadata or {})
        self._state = {name: value.detach() for name, value in state.items()}
        self.infos = {
            name: TensorInfo(tuple(value.shape), value.dtype) for name, value in state.items()
        }

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Copy from memory; see :meth:`Checkpoint.read_into`."""
        out.copy_(self.read(name, start, start + out.numel()))

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Return a view where the tensor is contiguous; see :meth:`Checkpoint.read`."""
        check_range(self.infos[name], name, start, stop)
        value = self._state[name]
        if not value.is_contiguous():
            # Made contiguous once: chunk after chunk, a copy each time would be quadratic.
            value = self._state[name] = value.contiguous()
        return value.view(-1)[start:stop].cpu()

    def tensor(self, name: str) -> Tensor:
        """Return the tensor itself, on the CPU; see :meth:`Checkpoint.tensor`."""
        return self._state[name].cpu()

    def close(self) -> None:
        """Drop the tensors."""
        self._state = {}


class RenamedCheckpoint(Checkpoint):
    """A view of another checkpoint under other names; closing it closes the other.

    Args:
        checkpoint: What is read.
        names: The new name by the name in ``checkpoint``; names that are absent here stay.

    Raises:
        InputError: If two tensors would get one name.
    """

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        self._checkpoint = checkpoint
        self._stored: dict[str, str] = {}
        for stored in checkpoint:
            name = names.get(stored, stored)
            if name in self._stored:
                raise InputError(
                    f"{checkpoint.file_of(stored)}: must hold one tensor of a name; got {stored!r} "
                    f"and {self._stored[name]!r}, both of which mean {name!r}. Remove one of them."
                )
            self._stored[name] = stored
        self.path = checkpoint.path
        self.source = checkpoint.source
        self.metadata = checkpoint.metadata
        self.infos = {name: checkpoint.infos[stored] for name, stored in self._stored.items()}

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """See :meth:`Checkpoint.read_into`."""
        self._checkpoint.read_into(self._stored[name], start, out)

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """See :meth:`Checkpoint.read`."""
        return self._checkpoint.read(self._stored[name], start, stop, buffer)

    def tensor(self, name: str) -> Tensor:
        """See :meth:`Checkpoint.tensor`."""
        return self._checkpoint.tensor(self._stored[name])

    def file_of(self, name: str) -> Location:
        """See :meth:`Checkpoint.file_of`."""
        return self._checkpoint.file_of(self._stored[name])

    def digest(self) -> str | None:
        """See :meth:`Checkpoint.digest`."""
        return self._checkpoint.digest()

    def close(self) -> None:
        """Close the checkpoint that is viewed."""
        self._checkpoint.close()


def open_state_dict(state: Mapping[str, Tensor], *, path: str = "<memory>") -> Checkpoint:
    """Return the interface of a checkpoint over tensors in memory, which are not copied.

    Args:
        state: Tensors by name, as from ``module.state_dict()``.
        path: What messages call it.

    Raises:
        InputError: If there is no tensor, or an entry is no ordinary dense tensor.
    """
    return StateDict(state, path=path)


def unwrapped(name: str) -> str:
    """Return a name without what wrappers of modules have put into it, such as ``_orig_mod.``.

    >>> unwrapped("model._orig_mod.fc.weight")
    'model.fc.weight'
    """
    *modules, tensor = name.split(".")
    return ".".join([*(m for m in modules if m not in _WRAPPERS), tensor])


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return what :func:`unwrapped` makes of each name."""
    return {name: unwrapped(name) for name in names}


def require_tensors(state: Mapping[str, object], path: str | Path) -> None:
    """Check that a state dict holds ordinary dense tensors with data, and at least one.

    Raises:
        InputError: Naming the file and the first entry that is something else.
    """
    if not state:
        raise InputError(
            f"{path}: must hold tensors; got an empty state dict. Save the model again."
        )
    for name, value in state.items():
        if not isinstance(name, str):
            raise InputError(
                f"{path}: must hold tensors by name; got the key {name!r}. "
                "Save the model's state_dict()."
            )
        got = _unusual(value)
        if got is not None:
            raise InputError(
                f"{path}: entry {name!r} must be a dense tensor; got {got}. "
                "Save a full state dict of plain tensors, without this entry."
            )


def _unusual(value: object) -> str | None:
    """Return what keeps an entry from being read in flat chunks, or None."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if type(value) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return f"a {type(value).__name__} (sharded or quantized)"
    if value.layout != torch.strided or value.is_quantized:
        return f"a tensor of layout {value.layout}, {value.dtype}"
    if value.is_meta:
        return "a tensor on the meta device, without data"
    return None


def check_range(info: TensorInfo, name: str, start: int, stop: int) -> None:
    """Raise IndexError unless ``0 <= start <= stop <= numel``: a caller's bug, never a file's."""
    if not 0 <= start <= stop <= info.numel:
        raise IndexError(f"{name}: no elements {start}:{stop} in {info.numel}")
