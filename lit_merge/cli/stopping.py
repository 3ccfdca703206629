"""How a run of ``lit-merge`` ends early: its exit status, and SIGTERM as a chance to clean up.

====== ============================================================================================
status means
====== ============================================================================================
0      done
1      a bug in lit-merge or in a class of the user's, with its traceback
2      an input that cannot be used: file, option, configuration; nothing was written
3      no room: out of memory, or the disk is full; the same command may work elsewhere
130    interrupted (Ctrl-C)
143    terminated (SIGTERM), as by ``timeout``, a container or a scheduler
====== ============================================================================================
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INPUT_ERROR = 2
NO_ROOM = 3
INTERRUPTED = 130
TERMINATED = 143

_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)


class Terminated(KeyboardInterrupt):
    """SIGTERM has come. What cleans up after Ctrl-C cleans up after this."""


@contextmanager
def terminating_in_order() -> Iterator[None]:
    """While the block runs, let SIGTERM raise :class:`Terminated` where the main thread stands.

    Without it the process would end at once and leave beside its output what it had written so far.
    A handler that is there already stays, as do Slurm's jobs, which Lightning puts back in the
    queue.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        or "SLURM_JOB_ID" in os.environ
    ):
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def status_of_exit(stop: SystemExit) -> int:
    """Return the exit status for a SystemExit, which may hide what it was raised for.

    Lightning ends a Trainer that was interrupted with ``sys.exit(1)``, and one that has noted a
    SIGTERM with a SystemExit that has no status.
    """
    cause = stop.__context__
    if isinstance(cause, KeyboardInterrupt):
        return status_of_interrupt(cause)
    if type(stop).__name__ == "SIGTERMException":
        return TERMINATED
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def status_of_interrupt(error: KeyboardInterrupt) -> int:
    """Return the exit status for Ctrl-C or for SIGTERM."""
    return TERMINATED if isinstance(error, Terminated) else INTERRUPTED


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory was lacking: Python's, torch's, CUDA's.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("CUDA out of memory. …"))
    (True, True)
    >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    )


def _raise(signum: int, frame: FrameType | None) -> None:
    raise Terminated
