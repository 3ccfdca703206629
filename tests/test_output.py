from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_merge.errors import InputError
from lit_merge.output import new_file, new_folder, require_free, require_free_file


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def write_folder(
    path: Path, text: str, *, replace: bool = False, then: Callable[[], object] | None = None
) -> None:
    """Write a folder with a file x, and do something else before it is done."""
    with new_folder(path, replace=replace) as folder:
        (folder / "x").write_text(text)
        if then is not None:
            then()


def write_file(path: Path, text: str, *, then: Callable[[], object] | None = None) -> None:
    with new_file(path) as file:
        file.write_text(text)
        if then is not None:
            then()


def raiser(error: BaseException | type[BaseException]) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_a_new_folder_holds_what_was_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "out") as folder:
        assert folder.parent == tmp_path / "a"
        assert folder.name.startswith(f".out.partial-{os.getpid()}-")
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert contents(tmp_path) == {"a/out/sub/x": "1"}


def test_a_new_folder_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_behind(tmp_path: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind):
        write_folder(tmp_path / "a" / "b" / "out", "1", then=raiser(kind))
    with pytest.raises(kind):
        write_file(tmp_path / "a" / "out.txt", "1", then=raiser(kind))
    assert list(tmp_path.iterdir()) == []


def test_an_exception_keeps_what_was_there(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", "old")
    with pytest.raises(RuntimeError):
        write_folder(tmp_path / "out", "new", replace=True, then=raiser(RuntimeError))
    assert contents(tmp_path) == {"out/x": "old"}


def test_a_folder_that_is_not_empty_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(InputError, match=r"must be empty or absent; got a folder with 'x' in it"):
        require_free(tmp_path)
    entered = False
    with pytest.raises(InputError, match="must be empty or absent"), new_folder(tmp_path):
        entered = True
    assert not entered
    assert contents(tmp_path) == {"x": "old"}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert contents(tmp_path) == {"out/x": "1"}


def test_replacing_a_folder_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with new_folder(tmp_path / "out", replace=True) as folder:
        (folder / "new").write_text("new")
        assert contents(tmp_path / "out") == {"old": "old"}
    assert contents(tmp_path) == {"out/new": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x").read_text() == "1"


def test_the_working_folder_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "x").write_text("old")
    monkeypatch.chdir(tmp_path / "work")
    for path in (".", tmp_path):
        with pytest.raises(InputError, match="must not be the working folder, the home folder"):
            require_free(path, replace=True)


def test_a_mount_point_is_refused_before_the_work_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path)
    with pytest.raises(InputError, match=r"got a mount point\. Name a folder inside it"):
        require_free(tmp_path)
    require_free(tmp_path / "merged")


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(InputError, match="must be a folder; got a file"):
        require_free(tmp_path / "x", replace=True)
    with pytest.raises(InputError, match=r"must lie in a folder; got the file .*x as its parent"):
        require_free(tmp_path / "x" / "out")


def test_a_folder_is_no_output_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a file; got a folder"):
        require_free_file(tmp_path, replace=True)


def test_a_parent_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root
    with pytest.raises(InputError, match=r"must lie in a folder that can be written; got .*permi"):
        require_free(tmp_path / "a" / "out")
    with pytest.raises(InputError, match="must lie in a folder that can be written"):
        require_free_file(tmp_path / "a" / "out")


def test_a_parent_that_cannot_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "mkdir", raiser(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(InputError, match="where a folder can be made; got Read-only file system"):
        write_folder(tmp_path / "a" / "out", "1")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_an_impossible_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="must be a path that can be looked up; got"):
        require_free(tmp_path / name)


def test_a_long_name_leaves_room_for_the_partial_one(tmp_path: Path) -> None:
    write_folder(tmp_path / ("é" * 120), "1")
    write_file(tmp_path / ("x" * 250), "1")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_an_input_error_and_leaves_nothing(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(InputError, match="must have room on its disk; got 'No space left on dev"):
        write_folder(tmp_path / "out", "1", then=raiser(full))
    quota = OSError(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(InputError, match="must have room on its disk; got 'Disk quota exceeded'"):
        write_file(tmp_path / "out.txt", "1", then=raiser(quota))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("replace", [False, True])
def test_of_two_writers_to_a_new_folder_only_one_wins(tmp_path: Path, replace: bool) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="got a change by another process"):
        write_folder(out, "first", replace=replace, then=lambda: write_folder(out, "second"))
    assert contents(tmp_path) == {"out/x": "second"}


def test_of_two_writers_that_replace_a_folder_only_one_wins(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(out, "old")

    def second() -> None:
        write_folder(out, "second", replace=True)

    with pytest.raises(InputError, match="got a change by another process"):
        write_folder(out, "first", replace=True, then=second)
    assert contents(tmp_path) == {"out/x": "second"}


def test_a_folder_that_vanished_while_it_was_replaced_is_noticed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(out, "old")
    with pytest.raises(InputError, match="got a change by another process"):
        write_folder(out, "new", replace=True, then=lambda: out.rename(tmp_path / "elsewhere"))
    assert contents(tmp_path) == {"elsewhere/x": "old"}


@pytest.mark.parametrize("links", [True, False])
def test_of_two_writers_to_a_new_file_only_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", raiser(OSError(errno.EPERM, "no hard links here")))
    out = tmp_path / "out.txt"
    with pytest.raises(InputError, match="got a change by another process"):
        write_file(out, "first", then=lambda: write_file(out, "second"))
    assert contents(tmp_path) == {"out.txt": "second"}


def test_a_new_file_keeps_its_suffix_and_replaces_only_when_told(tmp_path: Path) -> None:
    with new_file(tmp_path / "out.tar") as file:
        assert file.suffix == ".tar"
        file.write_text("1")
    with pytest.raises(InputError, match="must not exist yet; got a file of 1 bytes"):
        require_free_file(tmp_path / "out.tar")
    with new_file(tmp_path / "out.tar", replace=True) as file:
        file.write_text("2")
    assert contents(tmp_path) == {"out.tar": "2"}


WRITER = """
import sys
from pathlib import Path
from lit_merge.output import new_file, new_folder

path, round = Path(sys.argv[1]), 0
while True:
    round += 1
    with new_folder(path / "folder", replace=True) as folder:
        for part in range(5):
            (folder / str(part)).write_text(str(round))
    with new_file(path / "file", replace=True) as file:
        with file.open("w") as stream:
            for part in range(5):
                stream.write(f"{round} ")
    if round == 1:
        print("ready", flush=True)
"""


def test_a_writer_killed_half_way_leaves_the_target_whole_or_absent(tmp_path: Path) -> None:
    wholes = 0
    for attempt in range(6):
        target = tmp_path / str(attempt)
        target.mkdir()
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.0137 * attempt)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if (target / "folder").exists():
            wholes += 1
            parts = contents(target / "folder")
            assert sorted(parts) == list("01234")
            assert len(set(parts.values())) == 1
        if (target / "file").exists():
            words = (target / "file").read_text().split()
            assert len(words) == 5
            assert len(set(words)) == 1
        # What it left beside the target does not disturb the next run, and stays what it is.
        left = {p for p in target.iterdir() if p.name.startswith(".")}
        with new_folder(target / "folder", replace=True) as folder:
            (folder / "x").write_text("next")
        assert contents(target / "folder") == {"x": "next"}
        assert {p for p in target.iterdir() if p.name.startswith(".")} == left
    assert wholes


def test_a_run_stopped_in_the_middle_of_writing_leaves_the_target_absent(tmp_path: Path) -> None:
    script = """
    import sys, time
    from pathlib import Path
    from lit_merge.output import new_folder
    with new_folder(Path(sys.argv[1])) as folder:
        (folder / "model.safetensors").write_text("half")
        print("ready", flush=True)
        time.sleep(60)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    assert child.stdout is not None
    child.stdout.readline()
    child.kill()
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert contents(tmp_path / "out") == {"x": "1"}
    assert left.exists()
