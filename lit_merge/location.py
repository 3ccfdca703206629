"""Where a user's file is: on this machine, or behind a URL that fsspec can read.

``s3://bucket/run``, ``gs://…``, ``hf://…``, ``https://…`` and ``memory://…`` are remote.
:class:`RemotePath` has what :class:`pathlib.Path` has, as far as opening checkpoints asks for it,
so that the same code walks both. Each kind of storage needs its own package (s3fs, gcsfs, …), which
is named when it is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, TypeAlias

from lit_merge.errors import InputError

# One slash is what is left of two after a URL has been a Path. A single letter is a drive.
_URL = re.compile(r"([a-z][a-z0-9+.:-]+):/{1,2}(?=[^/])")
_PACKAGES = {
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "gcs": "gcsfs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "s3a": "s3fs",
    "sftp": "paramiko",
    "ssh": "paramiko",
}


def is_remote(path: str | Path | RemotePath) -> bool:
    """Return whether a path is a URL for fsspec.

    >>> is_remote("s3://bucket/run"), is_remote("runs/svhn"), is_remote("file:///tmp/x")
    (True, False, False)
    """
    found = _URL.match(str(path))
    return isinstance(path, RemotePath) or (found is not None and found[1] not in ("file", "local"))


def locate(path: str | Path | RemotePath) -> Location:
    """Return a user's path as an object: a local one, or a :class:`RemotePath`.

    Raises:
        InputError: If nothing is installed that can read such a URL.
    """
    if isinstance(path, RemotePath):
        return path
    text = str(path)
    if is_remote(path):
        url = _URL.sub(r"\1://", text, count=1).rstrip("/")
        _file_system(url)
        return RemotePath(url)
    return Path(re.sub(r"^(file|local)://", "", text))


class RemoteStatus(NamedTuple):
    """What is known of a file: bytes, and nanoseconds since 1970 of its last change."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True)
class RemotePath:
    """A URL with the methods of a path.

    Attributes:
        url: With its protocol, without a slash at the end.
    """

    url: str

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rsplit("/", 1)[-1].split("?", 1)[0]

    @property
    def suffix(self) -> str:
        """The last part's suffix with its dot, or nothing."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """What lies above."""
        return RemotePath(self.url.rsplit("/", 1)[0])

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    def __lt__(self, other: RemotePath) -> bool:
        return self.url < other.url

    def __str__(self) -> str:
        return self.url

    @property
    def _is_web_folder(self) -> bool:
        # A web server does not say what is a folder.
        return self.url.startswith(("http://", "https://")) and not self.suffix

    def exists(self) -> bool:
        """Return whether there is a file or a folder; of a web server any folder is believed."""
        if self._is_web_folder:
            return True
        with self._reading() as (files, path):
            return bool(files.exists(path))

    def is_file(self) -> bool:
        """Return whether there is a file."""
        with self._reading() as (files, path):
            return bool(files.isfile(path))

    def is_dir(self) -> bool:
        """Return whether there is a folder; of a web server any name without suffix is believed."""
        if self._is_web_folder:
            return True
        with self._reading() as (files, path):
            return bool(files.isdir(path))

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield what lies in a folder."""
        with self._reading() as (files, path):
            names = [str(name).rstrip("/") for name in files.ls(path, detail=False)]
        for name in sorted({n.rsplit("/", 1)[-1] for n in names}):
            yield self / name

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield the files below a folder whose path fits a pattern, ``**`` for any folders.

        A web server lists nothing: there, only a file without ``*`` is found.
        """
        if self._is_web_folder:
            if "*" not in pattern and (self / pattern).is_file():
                yield self / pattern
            return
        with self._reading() as (files, path):
            root = files._strip_protocol(path)
            found = [str(name) for name in files.glob(f"{root}/{pattern}")]
        for name in sorted(found):
            yield self / name.removeprefix(root).lstrip("/")

    def size(self) -> int:
        """Return the number of bytes of a file."""
        with self._reading() as (files, path):
            size = files.size(path)
        if size is None:
            raise InputError(
                f"{self}: must be a file whose size the server tells; got none. Copy it to this "
                "machine first."
            )
        return int(size)

    def stat(self) -> RemoteStatus:
        """Return size and time of a file; what the storage does not tell is 0."""
        with self._reading() as (files, path):
            info = files.info(path)
        times = (info.get(key) for key in ("LastModified", "last_modified", "mtime", "created"))
        time = next((t for t in times if t is not None), 0.0)
        seconds = time.timestamp() if isinstance(time, datetime) else time
        nanoseconds = int(seconds * 1e9) if isinstance(seconds, (int, float)) else 0
        return RemoteStatus(int(info.get("size") or 0), nanoseconds)

    def read_bytes(self) -> bytes:
        """Return the contents of a file."""
        with self._reading() as (files, path):
            return bytes(files.cat_file(path))

    def read_range(self, start: int, stop: int) -> bytes:
        """Return the bytes ``start:stop`` of a file.

        Raises:
            InputError: If it cannot be read, or the server sends other bytes than were asked for.
        """
        with self._reading() as (files, path):
            found = bytes(files.cat_file(path, start=start, end=stop))
        if len(found) != stop - start:
            raise InputError(
                f"{self}: must give the {stop - start} bytes from byte {start} on; got "
                f"{len(found)}. The file was cut, or the server cannot send parts of a file: copy "
                "it to this machine first."
            )
        return found

    @contextmanager
    def _reading(self) -> Iterator[tuple[Any, str]]:
        try:
            yield _file_system(self.url)
        except InputError:
            raise
        except Exception as error:  # every kind of storage has errors of its own
            raise InputError(
                f"{self}: must be readable; got {type(error).__name__}: {error}. Check the URL, "
                "the network and your permissions."
            ) from error


Location: TypeAlias = Path | RemotePath


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and what it calls the path.

    Raises:
        InputError: If the protocol is unknown, or the package for it is not installed.
    """
    return _file_system(url)


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec  # seldom needed

    protocol = url.split("://", 1)[0]
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        package = _PACKAGES.get(protocol, f"the fsspec package for {protocol}")
        raise InputError(
            f"{url}: must have the package for {protocol}:// installed; got {error}. "
            f"Run: pip install {package}"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{url}: must be a path, or a URL that fsspec knows; got {protocol}://. Check the path."
        ) from error


def is_inside(file: str) -> bool:
    """Return whether a relative path names something that lies below its folder.

    Only the text is judged: the hub's cache consists of links to files elsewhere, which are fine.
    """
    parts = PurePosixPath(file).parts
    windows = PureWindowsPath(file)
    return (
        bool(parts)
        and ".." not in (*parts, *windows.parts)
        and not PurePosixPath(file).is_absolute()
        and not windows.drive
        and not windows.root
        and "\0" not in file
    )
