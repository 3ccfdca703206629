"""The unfinished folder of a merge, and several processes that write it together."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lit_merge.errors import InputError
from lit_merge.methods import (
    TIES,
    Average,
    TaskArithmetic,
)
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming import (
    merge,
    pieces,
    unfinished,
)
from lit_merge.streaming.unfinished import Process, unfinished_folder
from tests.merge_files import save_base, save_experts

TWO = (Process(0, 2), Process(1, 2))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of tensors."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")}


def test_a_folder_that_is_being_removed_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merging() -> None:
        with unfinished_folder(
            tmp_path / "out", "0" * 64, replace=False, process=Process()
        ) as folder:
            (folder.path / "model.safetensors").touch()
            folder.mark_done("0-1", {})
            raise ValueError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it is
        with pytest.raises(ValueError, match="a bug"):
            merging()
    with unfinished_folder(tmp_path / "out", "0" * 64, replace=False, process=Process()) as folder:
        assert folder.done("0-1") is None
        assert any("-removed-" in note for note in folder.notes)


def both_ranks(
    call: Callable[[Process], object], processes: tuple[Process, ...] = TWO
) -> list[object]:
    """Call a function as each process, in a thread each; an error is its result."""
    results: list[object] = [None] * len(processes)

    def run(rank: int) -> None:
        try:
            results[rank] = call(processes[rank])
        except InputError as error:
            results[rank] = error

    started = [threading.Thread(target=run, args=(rank,)) for rank in range(len(processes))]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(30)
        assert not thread.is_alive()
    return results


def test_the_first_process_waits_for_one_that_has_nothing_to_do(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def run(process: Process) -> bool:
        if process.rank == 1:
            threading.Event().wait(0.5)  # comes when the first has done all
            assert not out.exists()
        with unfinished_folder(out, "0" * 64, replace=False, process=process) as folder:
            if process.rank == 0:
                folder.mark_done("0-1", {})
                folder.wait_for(["0-1"], lambda _: None)
        return (out / ".state").exists() or not out.exists()

    assert both_ranks(run) == [False, False]  # both end with the whole output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_process_that_stops_is_not_waited_for_and_what_is_done_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    waits = threading.Event()

    def run(process: Process) -> None:
        with unfinished_folder(out, "0" * 64, replace=False, process=process) as folder:
            if process.rank == 1:
                folder.mark_done("1-2", {"seen": 1})
                waits.wait(10)
                threading.Event().wait(0.2)
                raise InputError("model.safetensors: must be finite")
            folder.mark_done("0-1", {})
            folder.wait_for(["0-1", "1-2", "2-3"], lambda _: waits.set())

    first, second = both_ranks(run)
    assert "must be finite" in str(second)
    assert "must be written by all 2 processes; got no sign of life from process 1" in str(first)
    assert not out.exists()

    def again(process: Process) -> object:
        with unfinished_folder(out, "0" * 64, replace=False, process=process) as folder:
            if process.rank == 0:
                folder.wait_for(["0-1", "1-2"], lambda _: None)
            return folder.done("1-2")

    assert both_ranks(again) == [{"seen": 1}] * 2
    assert out.is_dir()


def test_an_error_of_the_first_process_ends_the_others(tmp_path: Path) -> None:
    inside = threading.Event()

    def run(process: Process) -> None:
        with unfinished_folder(tmp_path / "out", "0" * 64, replace=False, process=process) as one:
            if process.rank == 0:
                inside.wait(10)
                raise InputError("base: broken")
            one.mark_done("0-1", {})
            inside.set()

    first, second = both_ranks(run)
    assert str(first) == "base: broken"
    assert "out: must be finished by the first process; got it stopped by an error" in str(second)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(unfinished, "_GRACE", 0.2)

    def alone() -> None:
        with unfinished_folder(
            tmp_path / "out", "0" * 64, replace=False, process=Process(rank, 2)
        ) as folder:
            if rank == 0:
                folder.wait_for([], lambda _: None)

    with pytest.raises(InputError, match=f"got no sign of life from process {1 - rank}. Look at"):
        alone()
    assert not (tmp_path / "out").exists()


def test_a_process_that_dies_at_its_end_is_not_waited_for(tmp_path: Path) -> None:
    held = threading.Event()
    path = tmp_path / f".out.unfinished-{'0' * 16}" / ".state"

    def run(process: Process) -> None:
        if process.rank == 0:
            path.mkdir(parents=True, exist_ok=True)
            with (path / "rank-0.lock").open("wb") as file:  # as if killed: the lock goes alone
                fcntl.flock(file, fcntl.LOCK_EX)
                held.wait(0.5)
            return
        held.wait(0.1)
        with unfinished_folder(tmp_path / "out", "0" * 64, replace=False, process=process):
            pass

    _, second = both_ranks(run)
    assert "no sign of life from process 0" in str(second)


def test_looking_after_another_process_does_not_keep_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / f".out.unfinished-{'0' * 16}" / ".state"
    state.mkdir(parents=True)
    looking = (state / "rank-0.lock").open("wb")
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.1, looking.close).start()
    with unfinished_folder(tmp_path / "out", "0" * 64, replace=False, process=Process()):
        pass
    assert (tmp_path / "out").is_dir()


def test_a_file_system_without_locks_will_do_for_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    assert merge(base, experts, Average(), tmp_path / "out").path.is_dir()
    with (
        pytest.raises(InputError, match=r"two: must lie where .* got No locks available"),
        unfinished_folder(tmp_path / "two", "0" * 64, replace=False, process=Process(0, 2)),
    ):
        raise AssertionError("two processes without locks")


@pytest.mark.parametrize("name", ["run[1]*", "m" * 255, "é" * 127, "模" * 85])
def test_outputs_of_any_name_can_be_written(tmp_path: Path, name: str) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    for digest in ("1", "2"):  # the first is left
        with (  # noqa: PT012 - interrupted inside
            pytest.raises(KeyboardInterrupt),
            unfinished_folder(
                tmp_path / name, digest * 64, replace=False, process=Process()
            ) as folder,
        ):
            folder.mark_done("0-1", {})
            raise KeyboardInterrupt
    result = merge(base, experts, Average(), tmp_path / name)
    assert (tmp_path / name / "model.safetensors").is_file()
    assert sum("left by another merge" in note for note in result.notes) == 2


RANKS = """
import json, os, signal, sys, time
import lit_merge, torch
from lit_merge.methods import TIES
from lit_merge.streaming import pieces, unfinished

torch.set_num_threads(1)
pieces.CHUNK, pieces.BATCH, pieces.PART = 8, 20, 32
unfinished._GRACE = 1.0
base, experts, output = json.loads(sys.argv[1])


def merge(rank, count):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
    try:
        lit_merge.merge(base, experts, TIES(0.4), output, threads=1, progress=False)
    except lit_merge.InputError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(2)
    os._exit(0)


for line in sys.stdin:
    count, killed = json.loads(line)
    children = []
    for rank in range(count):
        children.append(os.fork())
        if not children[-1]:
            merge(rank, count)
    if killed is not None:
        time.sleep(killed[1])
        os.kill(children[killed[0]], signal.SIGKILL)
    ends = [os.waitpid(child, 0)[1] for child in children]
    print(json.dumps([os.waitstatus_to_exitcode(end) for end in ends]), flush=True)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("rounds", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_one_of_several_processes_killed_at_any_moment_leaves_nothing_or_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    with monkeypatch.context() as patch:
        for name, size in (("CHUNK", 8), ("BATCH", 20), ("PART", 32)):
            patch.setattr(pieces, name, size)
        whole = contents(merge(base, experts, TIES(0.4), tmp_path / "whole").path)
    out = tmp_path / "outputs" / "out"
    settings = [str(base), {task: str(path) for task, path in experts.items()}, str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", RANKS, json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def run(count: int, killed: tuple[int, float] | None = None) -> list[int]:
        print(json.dumps([count, killed]), file=process.stdin, flush=True)
        codes: list[int] = json.loads(process.stdout.readline())  # type: ignore[union-attr]
        return codes

    chance = random.Random(rounds)
    assert run(3) == [0, 0, 0]
    for _ in range(rounds):
        assert contents(out) == whole
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        shutil.rmtree(out)
        count = chance.choice((2, 3))
        codes = run(count, (chance.randrange(count), chance.uniform(0, 0.3)))
        assert set(codes) <= {0, 2, -9}
        if not out.exists():
            assert 0 not in codes
            again = chance.choice((1, 2, 3))
            assert run(again) == [0] * again
    assert contents(out) == whole
    with process:
        process.stdin.close()


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lit_merge"]


def launch(config: Path) -> subprocess.CompletedProcess[str]:
    """Merge in two processes of torchrun."""
    return subprocess.run(
        [*LAUNCH, "merge", "--config", str(config)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.distributed
def test_a_launcher_hears_of_one_failing_process_and_the_next_run_works(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    broken = experts["dtd"] / "model.safetensors"
    whole = broken.read_bytes()
    state = load_file(broken)
    state["norm.weight"][2] = float("nan")  # among the last that are merged: the second process's
    save_file(state, broken)
    for file in ("expert.json", "hessian.safetensors"):  # of other weights
        (experts["dtd"] / file).unlink()
    config = tmp_path / "merge.json"
    settings = {
        "base": str(base),
        "experts": {task: str(path) for task, path in experts.items()},
        "method": {"class_path": "TaskArithmetic", "init_args": {"scale": 0.4}},
        "policy": {"heads": "merge"},
        "output": str(tmp_path / "out"),
    }
    config.write_text(json.dumps(settings))
    failed = launch(config)
    assert failed.returncode != 0
    assert "tensor 'norm.weight' must be finite; got nan at [2]" in failed.stderr
    assert not (tmp_path / "out").exists()
    broken.write_bytes(whole)
    policy = ParametersPolicy(heads="merge")
    out = merge(base, experts, TaskArithmetic(0.4), tmp_path / "out", policy=policy)
    one = merge(base, experts, TaskArithmetic(0.4), tmp_path / "one", policy=policy)
    assert contents(out.path) == contents(one.path)
    for left in tmp_path.glob(".out.*"):  # of the other inputs, where the launcher was quicker
        assert any(str(left) in note for note in out.notes)
