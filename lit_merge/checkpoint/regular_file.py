"""Opening only what is an ordinary file: a FIFO would keep us waiting, a device never ends."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from lit_merge.errors import InputError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_regular_file(path: Path) -> None:
    """Check what is behind a path without opening it; links are followed.

    Raises:
        InputError: If it is no ordinary file, or cannot be looked up.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise unreadable(path, error) from error
    _require_regular(mode, path)


def open_regular_file(path: Path) -> int:
    """Return a descriptor for reading.

    Raises:
        InputError: If it is no ordinary file, or cannot be opened.
    """
    require_regular_file(path)
    try:
        # Exchanged for a FIFO in the meantime, it would otherwise still keep us waiting.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def unreadable(path: Path, error: OSError | ValueError) -> InputError:
    """Return the error of a file that the system does not let us read."""
    reason = error.strerror if isinstance(error, OSError) else error
    return InputError(f"{path}: must be a file that can be read; got {reason}. Check the path.")


def _require_regular(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise InputError(f"{path}: must be an ordinary file; got {kind}. Name a file.")
