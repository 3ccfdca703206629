"""The folder of a merge that is not finished: to be gone on with, and shared by processes.

Beside the output stands a hidden ``.<name>.unfinished-<digest>`` while a merge runs; the digest is
of all that decides the result. The same merge, started again after it was killed, finds it and does
only what is missing. Each process holds a lock in it, which the system takes from a process that
dies: two runs of one merge never write at the same time. Processes say through files which parts
they have done; they need nothing else of each other.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_merge.errors import InputError
from lit_merge.output import (
    finish_folder,
    full_disk,
    identity,
    is_full,
    require_free,
    resolved,
)
from lit_merge.strict_json import parse_json

_STATE = ".state"
_POLL = 0.05  # seconds between two looks at what the other processes have done
_GRACE = 60.0  # seconds without a sign of life after which a process counts as dead


@dataclass(frozen=True)
class Process:
    """Which of the processes that share a merge this one is.

    Attributes:
        rank: Its number, from 0.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls) -> Process:
        """Return what a launcher (torchrun, srun) says in the environment."""
        for rank, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if rank in os.environ and count in os.environ:
                return cls(int(os.environ[rank]), int(os.environ[count]))
        return cls()


def digest_of(description: Mapping[str, Any]) -> str:
    """Return hexadecimal digits that tell one merge from another.

    Args:
        description: JSON of all that decides the result.
    """
    text = json.dumps(description, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class UnfinishedFolder:
    """A folder in which a merge is being written.

    Attributes:
        path: The folder.
        notes: What a user should know about what was found.
    """

    def __init__(self, path: Path, process: Process, notes: tuple[str, ...] = ()) -> None:
        self.path = path
        self.notes = notes
        self._process = process

    def done(self, label: str) -> dict[str, Any] | None:
        """Return what was recorded of a part that is done, or None."""
        try:
            content = parse_json((self._state / f"{label}.done").read_bytes())
        except (FileNotFoundError, ValueError):  # cut short by a power failure: not done
            return None
        return content if isinstance(content, dict) else None

    def mark_done(self, label: str, record: Mapping[str, Any]) -> None:
        """Record that a part is written, and what was seen in it."""
        partial = self._state / f"{label}.writing"
        partial.write_text(json.dumps(record))
        partial.replace(self._state / f"{label}.done")

    def wait_for(self, labels: list[str], shown: Callable[[int], None]) -> None:
        """Wait until parts are done, by whichever process.

        Args:
            labels: The parts.
            shown: Called with the number of parts that became done.

        Raises:
            InputError: A process that should do them has stopped.
        """
        alive = time.monotonic()
        missing = list(labels)
        while True:
            still = [label for label in missing if self.done(label) is None]
            shown(len(missing) - len(still))
            if not still:
                return
            now = time.monotonic()
            if len(still) < len(missing) or self._others_alive():
                alive = now
            if now - alive > _GRACE:
                raise InputError(
                    f"{self.path}: must be written by all {self._process.count} processes; got no "
                    f"sign of life from the others for {_GRACE:.0f} s. Look at their errors and "
                    f"start all of them again: what is done is kept."
                )
            missing = still
            time.sleep(_POLL)

    @property
    def _state(self) -> Path:
        return self.path / _STATE

    def _others_alive(self) -> bool:
        for rank in range(self._process.count):
            if rank == self._process.rank:
                continue
            with suppress(OSError), (self._state / f"rank-{rank}.lock").open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
        return False


@contextmanager
def unfinished_folder(
    output: str | Path, digest: str, *, replace: bool, process: Process
) -> Iterator[UnfinishedFolder]:
    """Yield the folder to write in; the first process makes it the output at the end.

    A kill leaves it as it is, for the next run of the same merge; so does an interrupt from the
    keyboard. After an error it is removed.

    Args:
        output: Where the finished folder shall be.
        digest: From :func:`digest_of`.
        replace: Whether an existing non-empty folder may be replaced.
        process: This process.

    Raises:
        InputError: The output is not free, another run of the same merge is writing it, or the disk
            is full.
    """
    require_free(output, replace=replace)
    target = resolved(output)
    old = identity(target)
    stem = f".{target.name[:100]}.unfinished-"
    path = target.with_name(stem + digest[:16])
    state = path / _STATE
    with _making(output):
        state.mkdir(parents=True, exist_ok=True)
        lock = _lock(state, process, output)
    notes = tuple(
        f"{left}: was left by another merge into this folder that did not end. Remove it, unless "
        f"you want to go on with that one"
        for left in sorted(target.parent.glob(f"{stem}*"))
        if left != path
    )
    try:
        yield UnfinishedFolder(path, process, notes)
        if process.rank == 0:
            shutil.rmtree(state)
            finish_folder(path, target, output, replace=replace, old=old)
    except KeyboardInterrupt:
        if not any(state.glob("*.done")):  # nothing to go on with
            shutil.rmtree(path, ignore_errors=True)
        raise
    except BaseException as error:
        if process.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
        elif isinstance(error, FileNotFoundError) and not path.exists():
            raise InputError(
                f"{output}: must be finished by the first process; got it stopped. Look at its "
                f"error."
            ) from error
        if is_full(error):
            raise full_disk(output, error) from error
        raise
    finally:
        os.close(lock)


@contextmanager
def _making(output: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise full_disk(output, error) from error
        raise InputError(
            f"{output}: must lie where a folder can be made; got {error.strerror}. Name another "
            f"output."
        ) from error


def _lock(state: Path, process: Process, output: str | Path) -> int:
    file = state / f"rank-{process.rank}.lock"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The run that held the lock may have renamed or removed the folder since we opened it.
        if not file.exists() or file.stat().st_ino != os.fstat(descriptor).st_ino:
            raise BlockingIOError
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(
            f"{output}: must be written by one run at a time; got another run of the same merge at "
            f"work. Wait for it, or name another output."
        ) from None
    return descriptor
