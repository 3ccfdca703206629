from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from lit_merge.checkpoint.regular_file import open_regular_file, require_regular_file
from lit_merge.errors import InputError


def test_a_file_is_opened_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        require_regular_file(tmp_path / name)
        descriptor = open_regular_file(tmp_path / name)
        assert os.read(descriptor, 10) == b"content"
        os.close(descriptor)


@pytest.mark.parametrize("check", [require_regular_file, open_regular_file])
def test_what_is_no_file_is_refused_by_its_kind(tmp_path: Path, check: object) -> None:
    assert callable(check)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(".", os.O_RDONLY)
        try:
            os.chdir(tmp_path)  # the name of a socket may have 107 bytes
            server.bind("socket")
        finally:
            os.chdir(here)
            os.close(here)
        kinds = {"fifo": "FIFO", "link": "FIFO", "folder": "folder", "socket": "socket"}
        for name, kind in kinds.items():
            with pytest.raises(InputError, match=f"{name}: must be an ordinary file; got a {kind}"):
                check(tmp_path / name)
    with pytest.raises(InputError, match="must be an ordinary file; got a device"):
        check(Path("/dev/zero"))


@pytest.mark.parametrize("check", [require_regular_file, open_regular_file])
def test_what_cannot_be_looked_up_is_refused_with_the_reason(tmp_path: Path, check: object) -> None:
    assert callable(check)
    (tmp_path / "loop").symlink_to("loop")
    reasons = {
        "none": "No such file",
        "loop": "symbolic links",
        "x" * 300: "File name too long",
        "a\0b": "null",
    }
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=f"must be a file that can be read; got .*{reason}"):
            check(tmp_path / name)


def test_a_fifo_that_takes_the_place_of_a_file_does_not_keep_us_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    real = os.open

    def exchanged(name: Path, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return real(name, flags)

    monkeypatch.setattr(os, "open", exchanged)
    open_files = Path("/proc/self/fd")
    before = len(list(open_files.iterdir())) if open_files.exists() else None
    with pytest.raises(InputError, match="must be an ordinary file; got a FIFO"):
        open_regular_file(path)
    if before is not None:
        assert len(list(open_files.iterdir())) == before
