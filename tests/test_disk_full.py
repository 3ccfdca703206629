"""A disk without room, in whichever call it shows: an error of ours, and nothing left behind."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lit_merge
from lit_merge.checkpoint.safetensors_writer import SafetensorsWriter, save_tensors
from lit_merge.checkpoint.tensor_source import TensorInfo
from lit_merge.errors import InputError
from lit_merge.methods import Average
from lit_merge.output import new_file, new_folder
from tests.merge_files import save_base, save_experts

SIZE = 3 * 2**18  # elements of float32: 3 MiB
INFOS = {"a": TensorInfo((SIZE,), torch.float32)}


def write(folder: Path, *, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Write a folder with one file of 3 MiB, in four pieces, and do something else in between."""
    with new_folder(folder / "out") as inner, SafetensorsWriter(inner / "x", INFOS) as writer:
        meanwhile()
        for start in range(0, SIZE, SIZE // 4):
            writer.write("a", start, torch.ones(SIZE // 4))


def failing_after(calls: int, code: int, real: Callable[..., int]) -> Callable[..., int]:
    """Return a function that does what another does, and fails from a call on."""
    done = 0

    def call(*args: object) -> int:
        nonlocal done
        done += 1
        if done > calls:
            raise OSError(code, os.strerror(code))
        return real(*args)

    return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize(
    ("name", "calls"),
    [("pwrite", 0), ("pwrite", 1), ("pwrite", 3), ("truncate", 0), ("fsync", 0), ("fsync", 1)],
)
def test_a_write_that_finds_no_room_is_an_input_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: int, code: int
) -> None:
    monkeypatch.setattr(os, name, failing_after(calls, code, getattr(os, name)))
    message = rf"out: must have room on its disk; got '{os.strerror(code)}'\. Free some space"
    with pytest.raises(InputError, match=message):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    write(tmp_path)
    assert torch.equal(load_file(str(tmp_path / "out" / "x"))["a"], torch.ones(SIZE))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_file_that_finds_no_room_is_an_input_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "fsync", failing_after(0, code, os.fsync))
    with (
        pytest.raises(InputError, match=r"x: must have room on its disk; got"),
        new_file(tmp_path / "x") as file,
    ):
        file.write_text("1")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_comes_in_pieces_is_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def short(descriptor: int, buffer: memoryview, position: int) -> int:
        return real(descriptor, buffer[:1001], position)

    monkeypatch.setattr(os, "pwrite", short)
    values = torch.arange(5000.0)
    infos = {"a": TensorInfo((5000,), torch.float32)}
    with SafetensorsWriter(tmp_path / "x", infos) as writer:
        writer.write("a", 0, values)
    assert torch.equal(load_file(str(tmp_path / "x"))["a"], values)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_merge_that_finds_no_room_is_an_input_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    base = save_base(tmp_path / "base")
    experts = save_experts(tmp_path)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(os, "pwrite", failing_after(calls, errno.ENOSPC, os.pwrite))
    with pytest.raises(InputError, match="out: must have room on its disk; got 'No space left"):
        lit_merge.merge(base, experts, method=Average(), output=tmp_path / "out", progress=False)
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a tmpfs cannot be mounted here: {error}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_tensors_that_find_no_room_are_an_input_error_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", failing_after(2, errno.ENOSPC, os.pwrite))
    state = {name: torch.ones(5) for name in "abc"}
    with (
        pytest.raises(InputError, match="out: must have room on its disk; got 'No space left"),
        new_folder(tmp_path / "out") as inner,
    ):
        save_tensors(inner / "x", state)
    assert list(tmp_path.iterdir()) == []


def test_a_full_file_system_is_noticed_before_it_is_written(small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(2 * 2**20))
    with pytest.raises(InputError, match=r"must have 3,1\d\d,\d\d\d bytes free on its disk; got "):
        write(small_disk)
    assert [p.name for p in small_disk.iterdir()] == ["other"]


def test_a_file_system_that_fills_up_meanwhile_is_an_input_error(small_disk: Path) -> None:
    def fill() -> None:
        (small_disk / "other").write_bytes(bytes(2 * 2**20))

    with pytest.raises(InputError, match="out: must have room on its disk; got 'No space left"):
        write(small_disk, meanwhile=fill)
    assert [p.name for p in small_disk.iterdir()] == ["other"]
    (small_disk / "other").unlink()
    write(small_disk)
    assert [p.name for p in small_disk.iterdir()] == ["out"]
