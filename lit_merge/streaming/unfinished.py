"""The folder of a merge that is not finished: to be gone on with, and shared by processes.

Beside the output stands a hidden ``.<name>.unfinished-<digest>`` while a merge runs; the digest is
of all that decides the result. The same merge, started again after it was killed, finds it and does
only what is missing. Each process holds a lock in it until the output is there, which the system
takes from a process that dies: two runs of one merge never write at the same time, and no process
waits for one that is gone. Processes say through files which parts they have done; they need
nothing else of each other.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
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
    sync_folder,
)
from lit_merge.strict_json import parse_json

_STATE = ".state"
_ENDED = ".ended"  # what the state is called once all is written
_POLL = 0.05  # seconds between two looks at what the other processes have done
_GRACE = 60.0  # seconds without a sign of life after which a process is not waited for
_TRIES = 5  # a lock is held for a moment by a process that looks whether another is alive
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}  # of a file system without locks


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
        # Not SLURM_NTASKS: a batch script has it, too, and runs once.
        for rank, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
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


class _Stopped(InputError):
    """Another process has stopped: what is done is kept for the next run."""


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
        self._records: dict[str, dict[str, Any]] = {}

    def done(self, label: str) -> dict[str, Any] | None:
        """Return what was recorded of a part that is done, or None."""
        if label not in self._records:
            try:
                content = parse_json((self._state / f"{label}.done").read_bytes())
            except (FileNotFoundError, ValueError):  # cut short by a power failure: not done
                return None
            if not isinstance(content, dict):
                return None
            self._records[label] = content
        return self._records[label]

    def mark_done(self, label: str, record: Mapping[str, Any]) -> None:
        """Record that a part is written, and what was seen in it."""
        partial = self._state / f"{label}.writing"
        partial.write_text(json.dumps(record))
        partial.replace(self._state / f"{label}.done")
        self._records[label] = dict(record)

    def forget(self) -> None:
        """Let the next run do all parts again: for when what they wrote is about to be removed."""
        for file in self._state.glob("*.done"):
            file.unlink()

    def keep_only(self, names: Collection[str]) -> None:
        """Remove what a run that was killed at its end has left beside the parts.

        Args:
            names: Files and folders that hold the parts.
        """
        for path in self.path.iterdir():
            if path.name in names or path == self._state:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def wait_for(self, labels: list[str], shown: Callable[[int], None]) -> None:
        """Wait until parts are done, and all processes have come: none shall come too late.

        Args:
            labels: The parts.
            shown: Called with the number of parts that became done.

        Raises:
            InputError: A process has stopped, or does not come.
        """
        others = set(range(self._process.count)) - {self._process.rank}
        seen: set[int] = set()
        alive = time.monotonic()
        missing = list(labels)
        while True:
            here = {rank for rank in others if self._is_at_work(rank)}
            still = [label for label in missing if self.done(label) is None]
            shown(len(missing) - len(still))
            if not still and here == others:
                return
            if here == others or len(still) < len(missing):
                alive = time.monotonic()
            if seen - here or time.monotonic() - alive > _GRACE:
                raise self._stopped(min(seen - here or others - here))
            seen |= here
            missing = still
            time.sleep(_POLL)

    def wait_for_the_output(self, target: Path) -> None:
        """Wait until the first process has made the folder the output.

        Args:
            target: The output's path, resolved.

        Raises:
            InputError: It has stopped, or does not come.
            FileNotFoundError: It has removed the folder.
        """
        mine = identity(self.path)
        alive, seen = time.monotonic(), False
        while mine is not None and _is_there(self.path, mine):
            at_work = self._is_at_work(0)
            if at_work:
                alive, seen = time.monotonic(), True
            # Without a state the first process is just about to rename the folder.
            gone = seen and not at_work and self._state.exists()
            if gone or time.monotonic() - alive > _GRACE:
                raise self._stopped(0)
            time.sleep(_POLL)
        if mine is None or not _is_there(target, mine):
            raise FileNotFoundError(self.path)  # removed after an error

    @property
    def _state(self) -> Path:
        return self.path / _STATE

    def _is_at_work(self, rank: int) -> bool:
        with suppress(OSError), (self._state / f"rank-{rank}.lock").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _stopped(self, rank: int) -> InputError:
        return _Stopped(
            f"{self.path}: must be written by all {self._process.count} processes; got no sign of "
            f"life from process {rank}. Look at its error and start all of them again: what is "
            f"done is kept. To merge in one process under a launcher, unset RANK and WORLD_SIZE."
        )


@contextmanager
def unfinished_folder(
    output: str | Path, digest: str, *, replace: bool, process: Process
) -> Iterator[UnfinishedFolder]:
    """Yield the folder to write in; the first process makes it the output at the end.

    The others wait for that. A kill leaves the folder as it is, for the next run of the same merge;
    so do an interrupt from the keyboard and the end of another process. After an error of the first
    process it is removed.

    Args:
        output: Where the finished folder shall be.
        digest: From :func:`digest_of`.
        replace: Whether an existing non-empty folder may be replaced.
        process: This process.

    Raises:
        InputError: The output is not free, another run of the same merge is writing it, another
            process has stopped, or the disk is full.
    """
    require_free(output, replace=replace)
    target = resolved(output)
    old = identity(target)
    short = target.name.encode()[:180].decode(errors="ignore")  # a name may have 255 bytes
    stem = f".{short}.unfinished-"
    path = target.with_name(stem + digest[:16])
    state = path / _STATE
    with _making(output):
        state.mkdir(parents=True, exist_ok=True)
        lock = _lock(state, process, output)
    notes = tuple(
        f"{left}: was left by another merge into this folder that did not end. Remove it, unless "
        f"you want to go on with that one"
        for left in sorted(target.parent.glob(f"{glob.escape(stem)}*"))
        if left != path
    )
    folder = UnfinishedFolder(path, process, notes)
    try:
        yield folder
        if process.rank == 0:
            sync_folder(path)  # before the locks go: nothing that takes long comes after that
            # At once: the others take a state without the first one's lock for its death.
            shutil.rmtree(state.rename(path / _ENDED))
            finish_folder(path, target, output, replace=replace, old=old)
        else:
            folder.wait_for_the_output(target)
    except KeyboardInterrupt:
        if process.rank == 0 and not any(state.glob("*.done")):  # nothing to go on with
            _remove(path)
        raise
    except _Stopped:
        raise
    except BaseException as error:
        if process.rank == 0:
            _remove(path)
        elif isinstance(error, FileNotFoundError) and not path.exists():
            raise InputError(
                f"{output}: must be finished by the first process; got it stopped by an error. "
                f"Look at that error, and start all of them again."
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
    for _ in range(_TRIES):
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # that other run has ended, and the folder is gone
            break
        try:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The run that held the lock may have renamed or removed the folder since we
                # opened it.
                if identity(file) == _identity_of(descriptor):
                    return descriptor
        except OSError as error:
            if error.errno in _NO_LOCKS and process.count == 1:
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(_POLL)
    raise InputError(
        f"{output}: must be written by one run at a time; got another run of the same merge at "
        f"work. Wait for it, or name another output."
    )


def _identity_of(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _is_there(path: Path, folder: tuple[int, int]) -> bool:
    with suppress(FileNotFoundError):
        return identity(path) == folder
    return False


def _remove(path: Path) -> None:
    """Remove a folder, under another name: half removed, it must not be gone on with."""
    aside = path.with_name(f"{path.name}-removed-{os.getpid()}")
    with suppress(OSError):
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
