"""Putting a finished folder behind a URL, in an order in which a reader never takes a part for all.

Storage behind a URL has no rename of a folder. So the shards go first, then what tells of them (the
index, the configuration), and ``merge.json``, which says that all is there, comes last.
"""

from __future__ import annotations

from pathlib import Path

from lit_merge.errors import InputError
from lit_merge.location import RemotePath, file_system, is_remote, locate

_LAST = ("merge.json",)
_DATA = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".distcp", ".npz")


def require_free_url(url: str | Path | RemotePath, *, replace: bool = False) -> RemotePath:
    """Check that :func:`upload_folder` may write there, without writing anything.

    Returns:
        The place.

    Raises:
        InputError: If it is no URL, a file, a folder that is not empty (without ``replace``), or
            one that cannot be read.
    """
    if not is_remote(url):
        raise InputError(f"{url}: must be a URL such as s3://bucket/merged; got a path. Name one.")
    target = locate(url)
    assert isinstance(target, RemotePath)
    if target.url.startswith(("http://", "https://")):
        raise InputError(
            f"{target}: must be storage that can be written; got a web server. Use s3://, gs:// or "
            "another."
        )
    if target.is_file():
        raise InputError(f"{target}: must be a folder; got a file. Name another output folder.")
    first = next(target.iterdir(), None) if target.is_dir() else None
    if first is not None and not replace:
        raise InputError(
            f"{target}: must be empty or absent; got a folder with {first.name!r} in it. "
            "Name another output folder, or ask to replace this one."
        )
    return target


def upload_folder(
    local: Path, url: str | Path | RemotePath, *, replace: bool = False
) -> RemotePath:
    """Copy a folder to a URL: the data first, ``merge.json`` last.

    What an earlier folder there held is removed before anything is written, its ``merge.json``
    first: an upload that breaks off leaves nothing that says it is whole.

    Args:
        local: The finished folder.
        url: Where it shall be.
        replace: Whether a folder that is not empty may be replaced.

    Returns:
        The place.

    Raises:
        InputError: As :func:`require_free_url`, and when the storage does not take a file.
    """
    target = require_free_url(url, replace=replace)
    files, root = file_system(target.url)
    try:
        if files.exists(root):
            for name in _LAST:
                if files.exists(f"{root}/{name}"):
                    files.rm_file(f"{root}/{name}")
            files.rm(root, recursive=True)
            files.invalidate_cache()
        names = sorted((p for p in local.rglob("*") if p.is_file()), key=_turn)
        for file in names:
            destination = f"{root}/{file.relative_to(local).as_posix()}"
            # Storage of objects has no folders; the others must be given theirs.
            files.makedirs(destination.rsplit("/", 1)[0], exist_ok=True)
            files.put_file(str(file), destination)
            if files.size(destination) != file.stat().st_size:
                raise InputError(
                    f"{target}: must take {file.name} whole; got {files.size(destination)} of "
                    f"{file.stat().st_size} bytes. Try again."
                )
    except InputError:
        raise
    except Exception as error:  # every kind of storage has errors of its own
        raise InputError(
            f"{target}: must take the files of {local}; got {type(error).__name__}: {error}. Check "
            "the URL, the network and your permissions; nothing there is whole now."
        ) from error
    return target


def _turn(file: Path) -> tuple[int, str]:
    """Return when a file's turn comes: data, then what tells of it, then what says it is whole."""
    return (2 if file.name in _LAST else int(file.suffix not in _DATA)), str(file)
