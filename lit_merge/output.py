"""Writing that is whole or absent: aside first, then fsync, then one rename.

A run that is killed leaves either the old state or the new one under the name that the user gave,
and at worst a hidden ``.<name>.partial-<pid>-<random>`` beside it, which no later run reads or
renames. Nothing that exists is overwritten unless ``replace=True`` says so, also when another
process creates it while we write: the last step is an operation that fails on an existing target.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeGuard

from lit_merge.errors import InputError, NoRoomError

# The last two: a file system of small files, and a disk that fails. Reading has errors of its own.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextmanager
def new_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` when the block ends without an exception.

    Args:
        path: Where the folder shall be; a symbolic link is followed, missing parents are created.
        replace: Whether an existing non-empty folder may be replaced. It is moved aside, the new
            one renamed in, and only then is the old one deleted.

    Yields:
        A hidden sibling of ``path``, on the same file system.

    Raises:
        InputError: Before yielding, when ``path`` is a file, is not empty (without ``replace``),
            must never be replaced, or cannot be created; at the end, when another process wrote
            ``path`` in the meantime or the disk is full. The partial folder is then removed.
    """
    require_free(path, replace=replace)
    target = resolved(path)
    old = identity(target)
    created = _make_parents(target.parent, path)
    partial = target.with_name(_aside(target.name, "partial"))
    try:
        partial.mkdir()
        yield partial
        finish_folder(partial, target, path, replace=replace, old=old)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(created)
        if is_full(error):
            raise full_disk(path, error) from error
        raise


def finish_folder(
    partial: Path, target: Path, path: str | Path, *, replace: bool, old: tuple[int, int] | None
) -> None:
    """Make a folder that is written aside the one that was asked for.

    Args:
        partial: What was written, beside the target.
        target: The resolved path.
        path: What the user named.
        replace: Whether the target may be replaced.
        old: What :func:`identity` said of the target when the writing began.

    Raises:
        InputError: Another process has changed the target in the meantime.
    """
    sync_folder(partial)
    if replace:
        _swap_in(partial, target, old, path)
    else:
        _rename_in(partial, target, path)
    _sync(target.parent)


@contextmanager
def new_file(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield the name of a file to write, which becomes ``path`` when the block ends.

    The yielded name has the suffix of ``path``, for writers that go by it.

    Args:
        path: Where the file shall be; a symbolic link is followed, missing parents are created.
        replace: Whether an existing file may be replaced.

    Yields:
        The path of a file that does not exist yet, beside ``path``.

    Raises:
        InputError: Before yielding, when ``path`` is a folder, exists (without ``replace``), or
            cannot be created; at the end, when another process wrote ``path`` in the meantime or
            the disk is full. The partial file is then removed.
    """
    require_free_file(path, replace=replace)
    target = resolved(path)
    created = _make_parents(target.parent, path)
    partial = target.with_name(_aside(target.stem, "partial") + target.suffix)
    try:
        yield partial
        _sync(partial)
        if replace:
            partial.replace(target)
        else:
            _link_in(partial, target, path)
        _sync(target.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _remove_empty(created)
        if is_full(error):
            raise full_disk(path, error) from error
        raise


def require_free(path: str | Path, *, replace: bool = False) -> None:
    """Check that :func:`new_folder` may write ``path``, without touching anything.

    Raises:
        InputError: If ``path`` is a file, a non-empty folder that may not be replaced, or lies
            where no folder can be made.
    """
    target = resolved(path)
    if target.exists() and not target.is_dir():
        raise InputError(f"{path}: must be a folder; got a file. Name another output folder.")
    if target.is_mount():
        raise InputError(
            f"{path}: must be a folder that can be renamed; got a mount point. "
            f"Name a folder inside it: {Path(path) / 'merged'}."
        )
    if target.is_dir():
        first = next(target.iterdir(), None)
        if first is not None and not replace:
            raise InputError(
                f"{path}: must be empty or absent; got a folder with {first.name!r} in it. "
                "Name another output folder, or ask to replace this one."
            )
        if first is not None and any(p.is_relative_to(target) for p in (Path.cwd(), _home())):
            raise InputError(
                f"{path}: must not be the working folder, the home folder or one above them when "
                f"it is replaced; got {target}. Name another output folder."
            )
    _require_writable_parent(target, path)


def require_free_file(path: str | Path, *, replace: bool = False) -> None:
    """Check that :func:`new_file` may write ``path``, without touching anything.

    Raises:
        InputError: If ``path`` is a folder, a file that may not be replaced, or lies where no file
            can be made.
    """
    target = resolved(path)
    if target.is_dir():
        raise InputError(f"{path}: must be a file; got a folder. Name a file in it.")
    if target.exists() and not replace:
        raise InputError(
            f"{path}: must not exist yet; got a file of {target.stat().st_size} bytes. "
            "Name another file, or ask to replace this one."
        )
    _require_writable_parent(target, path)


def resolved(path: str | Path) -> Path:
    """Return where a path leads.

    Raises:
        InputError: It cannot be looked up.
    """
    try:
        target = Path(path).resolve()
        with suppress(FileNotFoundError, NotADirectoryError):
            target.lstat()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no access, a loop of links
        raise InputError(
            f"{path}: must be a path that can be looked up; got {error}. Name another output."
        ) from error
    return target


def _require_writable_parent(target: Path, path: str | Path) -> None:
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(
            f"{path}: must lie in a folder; got the file {parent} as its parent. Name another "
            "output."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(
            f"{path}: must lie in a folder that can be written; got {parent}, which cannot. "
            "Name another output, or give yourself write permission there."
        )


def _home() -> Path:
    return Path(os.path.expanduser("~")).resolve()  # noqa: PTH111 - Path.home() may raise


def _aside(name: str, what: str) -> str:
    short = name.encode()[:180].decode(errors="ignore")  # a name may have 255 bytes
    return f".{short}.{what}-{os.getpid()}-{secrets.token_hex(4)}"


def identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file or folder from any other that takes its place; None without one."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_dev, status.st_ino


def _make_parents(folder: Path, path: str | Path) -> tuple[Path, ...]:
    """Create ``folder`` and return what was created, the innermost first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(tuple(missing))
        raise InputError(
            f"{path}: must lie where a folder can be made; got {error.strerror}. Name another "
            "output."
        ) from error
    return tuple(missing)


def _remove_empty(folders: tuple[Path, ...]) -> None:
    with suppress(OSError):  # not empty, or gone: somebody else uses it
        for folder in folders:
            folder.rmdir()


def _rename_in(partial: Path, target: Path, path: str | Path) -> None:
    try:
        partial.rename(target)  # replaces an empty folder, fails on any other
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _taken(path) from error
        raise


def _swap_in(partial: Path, target: Path, old: tuple[int, int] | None, path: str | Path) -> None:
    if old is None:
        _rename_in(partial, target, path)
        return
    aside = target.with_name(_aside(target.name, "replaced"))
    try:
        target.rename(aside)
    except FileNotFoundError as error:
        raise _taken(path) from error
    try:
        # Looked at only after the move: what we hold aside can no longer be exchanged under us.
        if identity(aside) != old:
            raise _taken(path)
        _rename_in(partial, target, path)
    except BaseException:
        if not target.exists():
            aside.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _link_in(partial: Path, target: Path, path: str | Path) -> None:
    try:
        os.link(partial, target)  # unlike a rename, fails when the target exists
    except FileExistsError as error:
        raise _taken(path) from error
    except OSError:  # a file system without hard links
        if target.exists():
            raise _taken(path) from None
        partial.rename(target)
    else:
        partial.unlink()


def _taken(path: str | Path) -> InputError:
    return InputError(
        f"{path}: must stay as it was while it is being written; got a change by another process. "
        "Let only one run write there, or name another output."
    )


def is_full(error: BaseException) -> TypeGuard[OSError]:
    """Return whether an error says that a disk does not take what is written."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def full_disk(path: str | Path, error: OSError) -> NoRoomError:
    """Return the error for an output that found no room, with the system's reason."""
    return NoRoomError(
        f"{path}: must have room on its disk; got {error.strerror!r}. "
        "Free some space, or name an output on another disk."
    )


def sync_folder(folder: Path) -> None:
    """Wait until the disk has all that a folder holds."""
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
