"""What goes wrong with a merge that is shared, interrupted, resumed or fed with oddities."""

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
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_merge.checkpoint import open_checkpoint
from lit_merge.errors import InputError
from lit_merge.methods import (
    EMR,
    TIES,
    TSVM,
    Average,
    FisherAverage,
    GradientMatching,
    KroneckerMatching,
    MergeMethod,
    ModelStock,
    ParameterSlice,
    RegMean,
    TALLMasks,
    TaskArithmetic,
)
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming import (
    Override,
    merge,
    merge_all,
    merge_state_dicts,
    pieces,
    plan_all,
    threads,
    unfinished,
)
from lit_merge.streaming.findings import Findings
from lit_merge.streaming.threads import in_order
from lit_merge.streaming.unfinished import Process, UnfinishedFolder, unfinished_folder
from tests.merge_files import METHODS, save_base, save_experts, weights

TWO = (Process(0, 2), Process(1, 2))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the tiny models into many pieces, batches and parts."""
    monkeypatch.setattr(pieces, "CHUNK", 8)
    monkeypatch.setattr(pieces, "BATCH", 20)
    monkeypatch.setattr(pieces, "PART", 32)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of tensors."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")}


def interrupt_after(
    monkeypatch: pytest.MonkeyPatch, parts: int, call: Callable[[], object]
) -> None:
    """Interrupt a merge from the keyboard when some of its parts are done."""
    mark_done = UnfinishedFolder.mark_done
    left = parts

    def marked(self: UnfinishedFolder, label: str, record: Any) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        mark_done(self, label, record)

    with monkeypatch.context() as patch:
        patch.setattr(UnfinishedFolder, "mark_done", marked)
        with pytest.raises(KeyboardInterrupt):
            call()


@pytest.mark.usefixtures("small_pieces")
def test_other_task_names_are_another_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    renamed = dict(zip(("one", "two"), experts.values(), strict=True))
    fresh = merge(base, renamed, TaskArithmetic(0.4), tmp_path / "fresh")
    for parts in (2, 4):
        out = tmp_path / f"out{parts}"
        interrupt_after(
            monkeypatch,
            parts,
            lambda: merge(base, experts, TaskArithmetic(0.4), out),  # noqa: B023
        )
        result = merge(base, renamed, TaskArithmetic(0.4), out)
        assert contents(result.path) == contents(fresh.path)


@pytest.mark.usefixtures("small_pieces")
def test_parts_that_another_output_cuts_otherwise_are_not_taken_for_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    alone: dict[str | Path, MergeMethod] = {tmp_path / "out": TaskArithmetic(0.4)}
    whole: dict[str | Path, MergeMethod] = {tmp_path / "whole": TSVM()}
    for outputs in (alone, alone | whole, alone):
        interrupt_after(monkeypatch, 1, lambda: merge_all(base, experts, outputs))  # noqa: B023
    assert len(list(tmp_path.glob(".out.unfinished-*"))) == 2


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("form", ["lightning", "distributed"])
@pytest.mark.parametrize("at", ["before", "after"])
def test_a_kill_while_the_weights_are_brought_into_form_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any, at: str
) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    unlink = Path.unlink

    def killed(self: Path, missing_ok: bool = False) -> None:
        if self.name.startswith("model-0") and self.suffix == ".safetensors":
            if at == "after":
                unlink(self)
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    def run(name: str) -> Path:
        out = tmp_path / name
        merge(base, experts, GradientMatching(), out, format=form, shard_bytes=200)
        return out

    fresh = run("fresh")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # nothing is cleaned up by a kill
        patch.setattr(unfinished, "_remove", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            run("out")
    (left,) = tmp_path.glob(".out.*")
    (left / ".model.partial-1-ab.ckpt").touch()
    out = run("out")
    assert sorted(f.name for f in out.rglob("*")) == sorted(f.name for f in fresh.rglob("*"))
    with open_checkpoint(out) as one, open_checkpoint(fresh) as other:
        assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in other)
    assert list(tmp_path.glob(".out.*")) == []


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


def test_outputs_must_lie_apart(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    out = tmp_path / "out"
    for other in (str(out), tmp_path / "x" / ".." / "out", out / "inner"):
        outputs: dict[str | Path, MergeMethod] = {out: Average(), other: TaskArithmetic()}
        with pytest.raises(InputError, match=r"^outputs: must be folders apart .*Name other"):
            merge_all(base, experts, outputs)
        with pytest.raises(InputError, match=r"^outputs: must be folders apart"):
            plan_all(base, experts, outputs)
    assert not out.exists()


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


def test_two_methods_with_masks_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    monkeypatch.setattr(EMR, "survey", lambda *_: pytest.fail("surveyed"))
    with pytest.raises(InputError, match=r"^overrides: must leave one method .*EMR and TALLMasks"):
        merge(
            base, experts, EMR(), tmp_path / "out",
            overrides={"linear.*": Override(method=TALLMasks())},
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_the_traces_do_not_depend_on_how_the_slices_were_grouped() -> None:
    generator = torch.Generator().manual_seed(0)
    sums = (torch.rand(999, generator=generator, dtype=torch.float64) ** 9 * 1e9).tolist()
    whole = Findings(traces={"a": sums})
    for size in (7, 100, 333):
        total = Findings()
        for start in range(0, len(sums), size):
            part = Findings(traces={"a": sums[start : start + size]})
            total.add(Findings.from_json(json.loads(json.dumps(part.as_json()))))
        assert total.trace_of(["a"]) == whole.trace_of(["a"])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("count", [1, 3])
def test_the_first_error_in_order_is_shown_and_nothing_is_left_running(count: int) -> None:
    gate = threading.Event()

    def work(batch: int) -> int:
        if batch == 2:
            gate.wait(0.3)
            raise ValueError("the first in order")
        if batch == 3:
            gate.set()
            raise ValueError("the first in time")
        return batch

    before = threading.active_count()
    results = in_order(work, range(100), count)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="the first in order"):
        next(results)
    assert threading.active_count() == before
    assert torch.get_num_threads() == 2
    stream = in_order(lambda batch: batch, range(100), count)
    assert next(stream) == 0
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert torch.get_num_threads() == 2


def test_threads_are_as_many_as_there_are_cores_for_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert threads.num_cores() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert threads.num_cores() == 1


@pytest.mark.parametrize(
    "method",
    [TSVM(), ModelStock(), TIES(0.5), EMR(), GradientMatching(), FisherAverage()],
    ids=repr,
)
def test_tensors_without_elements_are_merged_with_the_others(method: MergeMethod) -> None:
    states = [
        {"none.weight": torch.empty(0, 3), "w": torch.randn(3, 2), "t": torch.tensor(float(i))}
        for i in range(3)
    ]
    hessians = [{name: value.square() + 1 for name, value in s.items()} for s in states[1:]]
    merged = merge_state_dicts(states[0], states[1:], method, hessians=hessians)
    assert {name: tuple(value.shape) for name, value in merged.items()} == {
        "none.weight": (0, 3),
        "w": (3, 2),
        "t": (),
    }


def test_a_plan_can_be_made_of_methods_that_look_first(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    chosen = [*METHODS, EMR(), TALLMasks(), ModelStock(), TSVM()]
    outputs: dict[str | Path, MergeMethod] = {
        tmp_path / f"out{i}": method for i, method in enumerate(chosen)
    }
    reports = plan_all(base, experts, outputs)
    assert len(reports) == len(chosen)


def test_outputs_may_treat_a_tensor_differently(tmp_path: Path) -> None:
    base = save_base(tmp_path)
    same = {"norm.bias": weights(0)["norm.bias"]}
    experts = save_experts(tmp_path, changes=same, frozen_parameters=())
    for path in experts.values():  # curvature that lacks a tensor no expert has changed
        state = load_file(path / "hessian.safetensors")
        state.pop("norm.bias")
        save_file(state, path / "hessian.safetensors")
    methods = [TaskArithmetic(0.3), GradientMatching(), TSVM()]
    alone = [
        contents(merge(base, experts, method, tmp_path / f"alone{i}").path)
        for i, method in enumerate(methods)
    ]
    for order in ((0, 1, 2), (2, 1, 0)):
        results = merge_all(base, experts, {tmp_path / f"{order}{i}": methods[i] for i in order})
        assert [contents(result.path) for result in results] == [alone[i] for i in order]


def test_frozen_tensors_of_float8_are_compared(tmp_path: Path) -> None:
    eight = {"emb.weight": weights(0)["emb.weight"].to(torch.float8_e4m3fn)}
    save_file(weights(0) | eight, tmp_path / "base.safetensors")
    experts = save_experts(tmp_path, changes=eight, frozen_parameters=("emb.weight",))
    result = merge(tmp_path / "base.safetensors", experts, Average(), tmp_path / "out")
    made = load_file(result.path / "model.safetensors")["emb.weight"]
    assert torch.equal(made.float(), eight["emb.weight"].float())
    other = {"emb.weight": (eight["emb.weight"].float() * 2).to(torch.float8_e4m3fn)}
    experts = save_experts(tmp_path / "b", changes=other, frozen_parameters=("emb.weight",))
    with pytest.raises(InputError, match=r"which expert\.json says was frozen, must equal"):
        merge(tmp_path / "base.safetensors", experts, Average(), tmp_path / "no")


def test_float8_experts_are_merged_and_written_in_float8(tmp_path: Path) -> None:
    states = [
        {"w": (torch.randn(40, 3, generator=torch.Generator().manual_seed(i))).to(
            torch.float8_e4m3fn
        )}
        for i in range(3)
    ]  # fmt: skip
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for state, file in zip(states, files, strict=True):
        save_file(state, file)
    result = merge(files[0], {"a": files[1], "b": files[2]}, Average(), tmp_path / "out")
    made = load_file(result.path / "model.safetensors")["w"]
    exact = (states[1]["w"].float() + states[2]["w"].float()) / 2
    assert torch.equal(made.float(), exact.to(torch.float8_e4m3fn).float())


def test_the_trace_of_a_hessian_beyond_float32_is_finite() -> None:
    large = torch.tensor([3e38, 2e38])
    seen = Findings()
    seen.see(ParameterSlice("w", ("a",), (large,), hessians=(large,)))
    again = Findings.from_json(json.loads(json.dumps(seen.as_json())))
    assert again.trace_of(["a"]) == {"a": sum(large.tolist())}


@pytest.mark.parametrize("kind", ["gram", "kronecker"])
def test_factors_that_one_expert_lacks_are_an_error(tmp_path: Path, kind: str) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    for task, path in experts.items():
        names = ["linear.weight"] + ["head.weight"] * (task == "svhn") + ["emb.weight"]
        shapes = {name: weights(0)[name].shape for name in names}
        entries = (
            {name: torch.eye(n) for name, (_, n) in shapes.items()}
            if kind == "gram"
            else {f"{k}.input": torch.eye(n) for k, (_, n) in shapes.items()}
            | {f"{k}.output": torch.eye(m) for k, (m, _) in shapes.items()}
        )
        save_file(entries, path / f"{kind}.safetensors")
    method = RegMean() if kind == "gram" else KroneckerMatching()
    merge(base, experts, method, tmp_path / "out")  # heads are not merged
    policy = ParametersPolicy(heads="merge")
    message = rf"dtd/{kind}\.safetensors: must have an entry for tensor 'head\.weight'.*overrides"
    with pytest.raises(InputError, match=message):
        merge(base, experts, method, tmp_path / "no", policy=policy)
    average = {"head.weight": Override(method=Average())}
    merge(base, experts, method, tmp_path / "yes", policy=policy, overrides=average)


def test_a_full_disk_leaves_none_of_several_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    pwrite, left = os.pwrite, 20

    def full(*args: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", full)
    outputs: dict[str | Path, MergeMethod] = {tmp_path / "a": Average(), tmp_path / "b": TIES()}
    with pytest.raises(InputError, match=r"must have room on its disk; got 'No space left"):
        merge_all(base, experts, outputs)
    assert not list(tmp_path.glob("[ab]"))
    assert not list(tmp_path.glob(".[ab].*"))


def test_models_of_empty_tensors_are_written(tmp_path: Path) -> None:
    for file in "bxy":
        save_file({"w": torch.empty(0, 3)}, tmp_path / f"{file}.safetensors")
    base, *experts = (tmp_path / f"{file}.safetensors" for file in "bxy")
    result = merge(base, experts, TaskArithmetic(), tmp_path / "out")
    assert load_file(result.path / "model.safetensors")["w"].shape == (0, 3)


def test_there_must_be_an_output(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    for call in (merge_all, plan_all):
        with pytest.raises(InputError, match=r"^outputs: must be one folder or more; got none"):
            call(base, experts, {})


def test_a_long_merge_holds_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        """Return the most bytes that Python and torch's buffers held at once, less the headers."""
        for seed, file in enumerate("bxy"):
            generator = torch.Generator().manual_seed(seed)
            state = {"w": torch.randn(count, 1 << 16, generator=generator)}
            save_file(state, tmp_path / f"{file}{count}.safetensors")
        base, *experts = (tmp_path / f"{file}{count}.safetensors" for file in "bxy")
        tracemalloc.start()
        merge(base, experts, TIES(0.3), tmp_path / f"out{count}", threads=1)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1)  # imports
    short, long = peak(8), peak(200)
    assert (long - short) / 192 < 1000  # bytes a piece


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
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children]), flush=True)
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
