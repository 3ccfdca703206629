"""A merge that is killed leaves its output absent or whole; run again, it ends as if undisturbed.

The merges run in forks of one process that has imported everything, so that fifty of them cost
seconds. They are killed after a random time, or by themselves before their n-th operation on files.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.merge_files import TASKS, save_base, save_experts

FORKS = """
import json, os, signal, sys, time
import lit_merge, torch
from lit_merge.methods import GradientMatching
from lit_merge.streaming import pieces

torch.set_num_threads(1)
pieces.PART = 30  # elements: several parts, of a tensor or two
base, experts, output, report = json.loads(sys.argv[1])
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "open"}


def count_operations(fatal):
    done = {"operations": 0, "writes": 0, "syncs": 0}

    def count():
        done["operations"] += 1
        if done["operations"] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(real, name):
        def call(*args):
            count()
            done[name] += 1
            return real(*args)
        return call

    os.pwrite, os.fsync = counted(os.pwrite, "writes"), counted(os.fsync, "syncs")
    sys.addaudithook(lambda event, args: count() if event in CHANGES else None)
    return done


def merge(fatal):
    done = count_operations(fatal)
    lit_merge.merge(
        base, experts, method=GradientMatching(), output=output, threads=1, progress=False
    )
    with open(report, "w") as file:
        json.dump(done, file)


print("{}", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    start = time.monotonic()
    child = os.fork()
    if not child:
        try:
            merge(order.get("operation"))
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if "delay" in order:
        time.sleep(order["delay"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    answer = {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - start}
    if answer["code"] == 0:
        answer |= json.load(open(report))
    print(json.dumps(answer), flush=True)
"""


VOLATILE = {"created", "seconds"}  # entries of merge.json


class Merges:
    """The merges of one base and its experts into one output, each in a fork."""

    def __init__(self, folder: Path) -> None:
        self.base = save_base(folder / "inputs")
        self.experts = save_experts(folder / "inputs")
        self.output = folder / "outputs" / "merged"
        self.output.parent.mkdir()
        experts = {task: str(path) for task, path in self.experts.items()}
        names = [str(self.base), experts, str(self.output), str(folder / "report")]
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKS, json.dumps(names)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        self._answer()
        self.whole = self.run()
        self.expected = self.contents()
        self.remove()

    def run(self, **order: float) -> dict[str, Any]:
        """Merge; ``delay`` and ``operation`` say when it is killed."""
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def contents(self) -> dict[str, bytes]:
        """Return the bytes of the files of the output, less what says when it was made."""
        found = {
            str(file.relative_to(self.output)): file.read_bytes()
            for file in sorted(self.output.rglob("*"))
            if file.is_file()
        }
        record = json.loads(found.pop("merge.json"))
        found["merge.json"] = json.dumps(
            {key: value for key, value in record.items() if key not in VOLATILE}
        ).encode()
        return found

    def remove(self) -> None:
        """Take away the output, which must be all that there is."""
        assert [path.name for path in self.output.parent.iterdir()] == ["merged"]
        shutil.rmtree(self.output)

    def kill_and_run_again(self, **order: float) -> dict[str, Any]:
        """Kill a merge, look at what it leaves, and run it again; return what that took."""
        killed = self.run(**order)
        assert killed["code"] in (0, -9)
        if self.output.exists():
            assert self.contents() == self.expected
            assert [p.name for p in self.output.parent.iterdir()] == ["merged"]
            again = killed
        else:
            assert killed["code"] == -9
            again = self.run()
            assert again["code"] == 0
            assert self.contents() == self.expected
        self.remove()
        return again

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(timeout=60) == 0
        self._process.stdout.close()


def without_record(contents: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files that do not say what else lay beside the output."""
    return {file: content for file, content in contents.items() if file != "merge.json"}


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Merges]:
    merges = Merges(tmp_path_factory.mktemp("killed"))
    yield merges
    merges.close()


def test_an_undisturbed_merge_writes_an_expert_in_several_parts(merges: Merges) -> None:
    assert merges.whole["code"] == 0
    assert set(merges.expected) > {"model.safetensors", "hessian.safetensors", "merge.json"}
    assert {f"heads/{task}.safetensors" for task in TASKS} < set(merges.expected)
    assert merges.whole["operations"] > 50


@pytest.mark.parametrize(
    "rounds", [pytest.param(5, id="5"), pytest.param(50, id="50", marks=pytest.mark.slow)]
)
def test_a_merge_killed_at_any_moment_leaves_nothing_or_all(merges: Merges, rounds: int) -> None:
    chance = random.Random(rounds)
    for _ in range(rounds):
        merges.kill_and_run_again(delay=chance.uniform(0.0, 1.1 * merges.whole["seconds"]))


@pytest.mark.parametrize(
    "stride", [pytest.param(9, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)
def test_a_merge_killed_before_any_operation_goes_on_where_it_was(
    merges: Merges, stride: int
) -> None:
    writes = []
    for operation in range(1, merges.whole["operations"] + 1, stride):
        again = merges.kill_and_run_again(operation=operation)
        if again["code"] == 0:  # else it was killed after the output had its name
            writes.append(again["writes"])
    assert max(writes) <= merges.whole["writes"]
    assert min(writes) < merges.whole["writes"] / 2  # what was done is not done again


def test_a_merge_killed_twice_is_finished_by_the_third(merges: Merges) -> None:
    late = merges.whole["operations"] * 2 // 3
    assert merges.run(operation=late // 2)["code"] == -9
    assert merges.run(operation=late // 2)["code"] == -9
    assert not merges.output.exists()
    assert merges.run()["code"] == 0
    assert merges.contents() == merges.expected
    merges.remove()


def test_an_input_that_was_changed_after_the_kill_is_merged_anew(merges: Merges) -> None:
    assert merges.run(operation=merges.whole["operations"] * 2 // 3)["code"] == -9
    (left,) = merges.output.parent.iterdir()
    original = merges.base.read_bytes()
    state = {name: value + 1 for name, value in load_file(merges.base).items()}
    save_file(state, merges.base)
    try:
        assert merges.run()["code"] == 0
        changed = merges.contents()
        assert changed["model.safetensors"] != merges.expected["model.safetensors"]
        shutil.rmtree(left)  # of another merge now: not for that one to remove
        merges.remove()
        assert merges.run()["code"] == 0  # undisturbed
        assert without_record(merges.contents()) == without_record(changed)
        merges.remove()
    finally:
        merges.base.write_bytes(original)
