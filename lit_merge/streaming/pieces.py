"""In which pieces a merge goes through the tensors, and how they are dealt out.

A *piece* is a flat range of one tensor: a chunk, or all of it for methods that need whole tensors.
Pieces do not depend on each other. A *batch* is a run of pieces that one thread does in one go; a
*part* is a run of batches that one process does, and that is remembered when it is done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lit_merge.checkpoint import TensorInfo

CHUNK = 1 << 18
"""Elements of a piece. Smaller ones would fit into a core's cache, but the threads take turns at
the interpreter between two calls of torch, and would wait for each other more than they gain."""

BATCH = 1 << 20
"""Elements of a batch, about: enough that handing it to a thread costs nothing."""

PART = 1 << 27
"""Elements of a part, about: what is done again after a kill."""


@dataclass(frozen=True, slots=True)  # a large model has a million
class Piece:
    """A flat range of a tensor.

    Attributes:
        name: The tensor.
        start: Its first flat element.
        stop: The one after the last.
        task: The task whose own tensor it is; None for a tensor of the merged model.
        whole: Whether it has to be taken as a whole, by torch's own threads.
    """

    name: str
    start: int
    stop: int
    task: str | None = None
    whole: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True)
class Part:
    """A run of pieces that is done by one process.

    Attributes:
        first: Position of the first piece among all.
        pieces: The pieces.
    """

    first: int
    pieces: tuple[Piece, ...]

    @property
    def label(self) -> str:
        """What to call it in a file's name."""
        return f"{self.first}-{self.first + len(self.pieces)}"


def pieces_of(
    infos: Mapping[str, TensorInfo], *, whole: Collection[str] = (), task: str | None = None
) -> Iterator[Piece]:
    """Yield the pieces of tensors.

    Args:
        infos: The tensors.
        whole: Names of those that are not cut.
        task: See :class:`Piece`.

    >>> info = TensorInfo((CHUNK + 5,), __import__("torch").float32)
    >>> [(piece.start, piece.stop) for piece in pieces_of({"weight": info})]
    [(0, 262144), (262144, 262149)]
    """
    for name, info in infos.items():
        if name in whole:
            yield Piece(name, 0, info.numel, task, whole=True)
        else:
            for start, stop in chunks(info.numel):
                yield Piece(name, start, stop, task)


def chunks(numel: int) -> Iterator[tuple[int, int]]:
    """Yield the flat ranges in which a tensor is gone through."""
    for start in range(0, numel, CHUNK):
        yield start, min(start + CHUNK, numel)


def batches_of(pieces: Sequence[Piece]) -> list[tuple[Piece, ...]]:
    """Return pieces in runs of about :data:`BATCH` elements, in order."""
    return list(_runs(pieces, BATCH))


def parts_of(pieces: Sequence[Piece], processes: int) -> list[Part]:
    """Return pieces in runs of about :data:`PART` elements, for each process one if they suffice.

    Args:
        pieces: All of them.
        processes: How many processes share the work.
    """
    total = sum(piece.numel for piece in pieces)
    number = max(processes, -(-total // PART))
    parts = []
    first = 0
    for run in _runs(pieces, -(-total // number)):
        parts.append(Part(first, run))
        first += len(run)
    return parts or [Part(0, ())]  # a model without an element is written too


def share_of(parts: Sequence[Part], rank: int, processes: int) -> list[Part]:
    """Return the parts of one process: neighbours, as many elements for each process as it goes."""
    total = sum(piece.numel for part in parts for piece in part.pieces)
    mine, before = [], 0
    for part in parts:
        size = sum(piece.numel for piece in part.pieces)
        middle = before + size / 2
        if rank == min(int(middle * processes / max(total, 1)), processes - 1):
            mine.append(part)
        before += size
    return mine


def _runs(pieces: Sequence[Piece], size: int) -> Iterator[tuple[Piece, ...]]:
    run: list[Piece] = []
    elements = 0
    for piece in pieces:
        run.append(piece)
        elements += piece.numel
        if elements >= size:
            yield tuple(run)
            run, elements = [], 0
    if run:
        yield tuple(run)
