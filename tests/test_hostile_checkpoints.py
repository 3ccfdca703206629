"""Folders and files as nobody writes them by honest means: each is refused, at once, by its name.

Nothing here may wait (a FIFO), read without end (a device), read outside the folder, or run code.
A test that waited would be ended by the alarm.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from safetensors.torch import save_file

from lit_merge.checkpoint import open_checkpoint
from lit_merge.errors import InputError
from lit_merge.expert import open_expert

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
STATE = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}


@pytest.fixture(autouse=True)
def _alarm() -> Iterator[None]:
    def ring(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError("waited for more than ten seconds")

    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def shards(folder: Path, files: dict[str, object] | str | None = None) -> Path:
    """Write tensor a into the first shard, b into the second, and an index that says so or else."""
    folder.mkdir(exist_ok=True)
    save_file({"a": STATE["a"]}, str(folder / FIRST))
    save_file({"b": STATE["b"]}, str(folder / SECOND))
    text = files if isinstance(files, str) else json.dumps({"weight_map": files or MAP})
    (folder / INDEX).write_text(text)
    return folder


MAP: dict[str, object] = {"a": FIRST, "b": SECOND}


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


def empty(path: Path) -> None:
    path.touch()


NO_FILES: list[Callable[[Path], None]] = [fifo, device, folder, loop, nowhere, empty]


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", INDEX, "any.ckpt"])
def test_what_is_no_file_is_refused_where_a_file_should_be(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / name)
    with pytest.raises(InputError, match=f"{tmp_path}.*: must "):
        open_checkpoint(tmp_path)
    if make is not folder:
        with pytest.raises(InputError, match=f"{name}: must "):
            open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("make", NO_FILES)
def test_what_is_no_file_is_refused_as_a_shard(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    shards(tmp_path)
    (tmp_path / SECOND).unlink()
    make(tmp_path / SECOND)
    with pytest.raises(InputError, match=f"{SECOND}: must "):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize("name", ["expert.json", "hessian.safetensors"])
def test_what_is_no_file_is_refused_in_an_expert_folder(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    save_file(STATE, str(tmp_path / "model.safetensors"))
    make(tmp_path / name)
    if make in (loop, nowhere):  # a link that leads nowhere is as good as no file
        assert set(open_expert(tmp_path).weights) == set(STATE)
        return
    with pytest.raises(InputError, match=f"{name}: must "):
        open_expert(tmp_path)


def test_a_loop_of_folders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    for path in (tmp_path / "one", tmp_path / "one" / "model.safetensors"):
        with pytest.raises(InputError, match=r"must exist; got no such file"):
            open_checkpoint(path)


def test_a_folder_that_is_linked_into_itself_is_read_once(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "again").symlink_to(".")
    with open_checkpoint(tmp_path / "again" / "again") as opened:
        assert torch.equal(opened.tensor("b"), STATE["b"])


@pytest.mark.parametrize(
    "file",
    [
        *("../outside.safetensors", "/etc/passwd", "C:\\x", "C:x", "\\\\host\\x", "a/../../x"),
        *("x/..", "..", ".", "", "\0", "a\0", "~/../x/../../y", "\\x", "a\\..\\..\\x"),
    ],
)
def test_an_index_names_only_files_of_its_folder(tmp_path: Path, file: str) -> None:
    save_file(STATE, str(tmp_path / "outside.safetensors"))
    shards(tmp_path / "in", {"a": FIRST, "b": file})
    with pytest.raises(InputError, match=r"index\.json: tensor 'b' must be in a file of the same"):
        open_checkpoint(tmp_path / "in")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": FIRST, "b": "none.safetensors"}, r"none\.safetensors: must exist, as model"),
        ({"a": FIRST, "b": FIRST}, f"{FIRST}: must hold tensor 'b', as {INDEX} says"),
        ({"a": SECOND, "b": FIRST}, f"{SECOND}: must hold only what .* got tensor 'b'"),
        ({"a": FIRST}, None),
        ({"a": FIRST, "b": SECOND, "c": SECOND}, f"{SECOND}: must hold tensor 'c'"),
        ({"a": FIRST, "b": ["x"]}, "tensor 'b' must be in a file of the same folder"),
        ({"a": FIRST, "b": "x" * 300}, "must be readable; got File name too long"),
        (
            f'{{"weight_map": {{"a": "{FIRST}", "b": "{SECOND}", "b": "{FIRST}"}}}}',
            "the name 'b' stands there twice",
        ),
        ('{"weight_map": {"a": "\\ud800"}}', "must be an index of shards in JSON"),
        ("\0", "must be an index of shards in JSON"),
        ('{"weight_map": {"a": ' + "9" * 5000 + "}}", "must be an index of shards in JSON"),
        ('{"weight_map": ' + "[" * 50_000, "must be an index of shards in JSON"),
    ],
)
def test_an_index_says_what_its_shards_hold(
    tmp_path: Path, files: dict[str, object] | str, message: str | None
) -> None:
    shards(tmp_path, files)
    if message is None:  # the second shard is not named: nobody reads it
        with open_checkpoint(tmp_path) as opened:
            assert set(opened) == {"a"}
        return
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards(tmp_path)
    save_file(STATE, str(tmp_path / SECOND))
    with pytest.raises(InputError, match=f"{SECOND}: must hold only what .* got tensor 'a'"):
        open_checkpoint(tmp_path)


def test_one_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    shards(tmp_path)
    save_file(STATE, str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match="must hold one set of weights; got model"):
        open_checkpoint(tmp_path)


def test_shards_are_opened_by_what_they_are_not_by_what_the_index_calls_them(
    tmp_path: Path,
) -> None:
    class Program:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return Path.touch, (tmp_path / "executed",)  # type: ignore[return-value]

    shards(tmp_path, {"a": FIRST, "b": "second.bin"})
    (tmp_path / "second.bin").write_bytes(pickle.dumps({"b": Program()}))
    with pytest.raises(InputError, match=r"second\.bin: must "):
        open_checkpoint(tmp_path)
    (tmp_path / SECOND).write_bytes(pickle.dumps({"b": Program()}))
    shards_of = {"weight_map": MAP}
    (tmp_path / INDEX).write_text(json.dumps(shards_of))
    with pytest.raises(InputError, match=f"{SECOND}: must be a whole safetensors file"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_what_may_not_be_read_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    shards(tmp_path)
    (tmp_path / SECOND).chmod(0)
    with pytest.raises(InputError, match=f"{SECOND}: must be a file that can be read"):
        open_checkpoint(tmp_path)
    (tmp_path / SECOND).chmod(0o600)
    tmp_path.chmod(0)
    try:
        with pytest.raises(InputError, match="must be readable; got Permission denied"):
            open_checkpoint(tmp_path)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "é" * 200])
def test_a_path_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"must exist; got no|must be readable; got File name"):
        open_checkpoint(tmp_path / name)


def test_a_disk_that_fails_while_it_is_read_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    shards(tmp_path)
    with open_checkpoint(tmp_path) as opened:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(InputError, match=f"{SECOND}: .* got Input/output error"):
            opened.tensor("b")
        monkeypatch.undo()
        assert torch.equal(opened.tensor("b"), STATE["b"])
    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(InputError, match=f"{FIRST}: .* got Input/output error"):
        open_checkpoint(tmp_path)


def test_a_read_that_comes_in_pieces_is_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.arange(50.0)}, str(tmp_path / "model.safetensors"))
    real, sizes = os.preadv, []

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(len(buffers[0]))
        return real(descriptor, [buffers[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", short)
    with open_checkpoint(tmp_path) as opened:
        assert torch.equal(opened.tensor("a"), torch.arange(50.0))
    assert sizes == list(range(200, 0, -7))


def test_a_signal_while_reading_changes_nothing(tmp_path: Path) -> None:
    values = torch.arange(1_000_000.0)
    save_file({"a": values}, str(tmp_path / "model.safetensors"))
    rung = []
    old = signal.signal(signal.SIGVTALRM, lambda *_: rung.append(1))
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.001, 0.001)
    try:
        with open_checkpoint(tmp_path) as opened:
            for _ in range(1000):
                assert torch.equal(opened.tensor("a"), values)
                if len(rung) > 5:
                    break
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)
    assert rung
