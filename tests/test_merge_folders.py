"""Merging into folders: shards, several outputs, processes, kills, and merges that are experts."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lit_merge.checkpoint import SafetensorsFile, open_checkpoint
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from lit_merge.methods import (
    TIES,
    Average,
    FisherAverage,
    GradientMatching,
    MergeMethod,
    TaskArithmetic,
)
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming import Override, folders, merge, merge_all, pieces, plan_all, stream
from lit_merge.streaming.overrides import methods_of
from lit_merge.streaming.pieces import Piece, parts_of, share_of
from lit_merge.streaming.unfinished import Process, UnfinishedFolder, unfinished_folder
from tests.merge_files import (
    MERGED,
    METHODS,
    SHAPES,
    TASKS,
    save_base,
    save_expert,
    save_experts,
    weights,
)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the tiny models into many pieces, batches and parts."""
    monkeypatch.setattr(pieces, "CHUNK", 8)
    monkeypatch.setattr(pieces, "BATCH", 20)
    monkeypatch.setattr(pieces, "PART", 32)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of tensors."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")}


def hidden(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*"))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_threads_write_the_bytes_of_one(tmp_path: Path, method: MergeMethod) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    one = merge(base, experts, method, tmp_path / "one", threads=1)
    many = merge(base, experts, method, tmp_path / "many", threads=4)
    assert contents(many.path) == contents(one.path)
    assert many.traces == one.traces


def run_ranks(config: Path, count: int) -> None:
    """Run ``lit-merge merge`` in several processes at once, as a launcher does."""
    command = [sys.executable, "-m", "lit_merge", "merge", "--config", str(config)]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(count)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    for process in started:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output


@pytest.mark.distributed
def test_two_processes_write_the_bytes_of_one(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    settings = {
        "base": str(base),
        "experts": {task: str(path) for task, path in experts.items()},
        "method": {"class_path": "GradientMatching"},
        "shard_bytes": 200,
        "output": str(tmp_path / "two"),
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    run_ranks(tmp_path / "merge.yaml", 2)
    one = merge(base, experts, GradientMatching(), tmp_path / "one", shard_bytes=200)
    assert contents(tmp_path / "two") == contents(one.path)
    record = json.loads((tmp_path / "two" / "merge.json").read_text())
    assert record["traces"] == dict(one.traces)
    assert hidden(tmp_path) == []


def test_parts_are_dealt_out_by_size_without_gaps() -> None:
    cut = [Piece(str(i), 0, size) for i, size in enumerate((5, 90, 1, 1, 1, 60, 3, 7, 40))]
    for count in (1, 2, 3, 4):
        parts = parts_of(cut, count)
        shares = [share_of(parts, rank, count) for rank in range(count)]
        assert [p for share in shares for part in share for p in part.pieces] == cut
        sizes = [sum(p.numel for part in share for p in part.pieces) for share in shares]
        assert max(sizes) <= 208 / count + 90


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("method", [GradientMatching(), TIES(0.4)], ids=repr)
def test_a_merge_that_was_interrupted_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: MergeMethod
) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    whole = merge(base, experts, method, tmp_path / "whole")
    mark_done, run = UnfinishedFolder.mark_done, stream.MergeStream.run
    marked: list[str] = []

    def interrupted(self: UnfinishedFolder, label: str, record: dict[str, object]) -> None:
        if len(marked) == 2:
            raise KeyboardInterrupt
        marked.append(label)
        mark_done(self, label, record)

    monkeypatch.setattr(UnfinishedFolder, "mark_done", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(base, experts, method, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert len(hidden(tmp_path)) == 1
    monkeypatch.setattr(UnfinishedFolder, "mark_done", mark_done)
    done: list[str] = []

    def watched(
        self: stream.MergeStream, part: pieces.Part, *args: object, **more: object
    ) -> object:
        done.append(part.label)
        return run(self, part, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(stream.MergeStream, "run", watched)
    merged = merge(base, experts, method, tmp_path / "merged")
    assert done
    assert not set(done) & set(marked)
    assert contents(merged.path) == contents(whole.path)
    assert merged.traces == whole.traces
    assert hidden(tmp_path) == []


@pytest.mark.usefixtures("small_pieces")
def test_what_was_left_of_other_inputs_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    monkeypatch.setattr(folders, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        merge(base, experts, TaskArithmetic(0.4), tmp_path / "merged")
    monkeypatch.undo()
    save_expert(tmp_path / "other", "svhn", 7)
    (tmp_path / "other" / "svhn" / "model.safetensors").replace(
        experts["svhn"] / "model.safetensors"
    )
    for stale in ("hessian.safetensors", "expert.json"):
        (experts["svhn"] / stale).unlink()
    result = merge(base, experts, TaskArithmetic(0.4), tmp_path / "merged")
    fresh = merge(base, experts, TaskArithmetic(0.4), tmp_path / "fresh")
    assert contents(result.path) == contents(fresh.path)
    assert any("left by another merge" in note for note in result.notes)


def test_two_runs_of_one_merge_do_not_write_at_once(tmp_path: Path) -> None:
    with unfinished_folder(tmp_path / "out", "0" * 64, replace=False, process=Process()) as one:
        (one.path / "model.safetensors").write_text("first")
        with (
            pytest.raises(InputError, match=r"out: must be written by one run at a time"),
            unfinished_folder(tmp_path / "out", "0" * 64, replace=False, process=Process()),
        ):
            raise AssertionError("both write")
        assert (one.path / "model.safetensors").exists()
    assert (tmp_path / "out" / "model.safetensors").read_text() == "first"


def test_two_merges_into_one_folder_do_not_overwrite_each_other(tmp_path: Path) -> None:
    with (  # noqa: PT012 - the inner one has ended when the outer one ends
        pytest.raises(InputError, match=r"out: must stay as it was .*; got a change"),
        unfinished_folder(tmp_path / "out", "1" * 64, replace=False, process=Process()) as slow,
    ):
        (slow.path / "a").write_text("slow")
        with unfinished_folder(
            tmp_path / "out", "2" * 64, replace=False, process=Process()
        ) as quick:
            (quick.path / "a").write_text("quick")
    assert (tmp_path / "out" / "a").read_text() == "quick"
    assert hidden(tmp_path) == []


def test_large_models_are_written_in_shards_with_an_index(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    whole = merge(base, experts, GradientMatching(), tmp_path / "whole")
    cut = merge(base, experts, GradientMatching(), tmp_path / "cut", shard_bytes=150)
    files = sorted(file.name for file in cut.path.glob("model-*"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((cut.path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    with open_checkpoint(cut.path) as sharded, open_checkpoint(whole.path) as single:
        assert set(sharded) == set(single)
        assert all(torch.equal(sharded.tensor(name), single.tensor(name)) for name in single)
        assert index["metadata"]["total_size"] == sum(i.nbytes for i in single.infos.values())
    new = save_expert(tmp_path, "new", 9)
    again = merge(base, {"cut": cut.path, "new": new}, GradientMatching(), tmp_path / "again")
    assert (again.path / "hessian.safetensors").exists()


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    experts = {task: save_expert(tmp_path, task, i) for i, task in enumerate("abc", start=1)}
    return save_base(tmp_path), experts


@pytest.mark.parametrize("scale", [1.0, {"a": 0.7, "b": 0.4, "c": 1.3}])
def test_gradient_matching_composes(
    tmp_path: Path, three: tuple[Path, dict[str, Path]], scale: float | dict[str, float]
) -> None:
    base, experts = three
    scales = scale if isinstance(scale, dict) else dict.fromkeys("abc", scale)
    two = {task: experts[task] for task in "ab"}
    once = merge(base, experts, GradientMatching(scale), tmp_path / "abc")
    merge(base, two, GradientMatching({t: scales[t] for t in "ab"}), tmp_path / "ab")
    twice = merge(
        base,
        {"ab": tmp_path / "ab", "c": experts["c"]},
        GradientMatching({"ab": 1.0, "c": scales["c"]}),
        tmp_path / "ab-c",
    )
    for file in ("model.safetensors", "hessian.safetensors"):
        left, right = load_file(once.path / file), load_file(twice.path / file)
        for name, value in left.items():
            torch.testing.assert_close(right[name], value, rtol=2e-5, atol=2e-6)
    assert {f.stem for f in (twice.path / "heads").iterdir()} == {"a", "b", "c"}
    assert open_expert(twice.path).info.num_examples == 150


def test_a_task_is_taken_out_of_a_merge_again(
    tmp_path: Path, three: tuple[Path, dict[str, Path]]
) -> None:
    base, experts = three
    merge(base, experts, GradientMatching(), tmp_path / "abc")
    (tmp_path / "abc" / "heads" / "c.safetensors").unlink()
    less = merge(
        base,
        {"abc": tmp_path / "abc", "c": experts["c"]},
        GradientMatching({"abc": 1.0, "c": -1.0}),
        tmp_path / "less",
    )
    two = merge(base, {task: experts[task] for task in "ab"}, GradientMatching(), tmp_path / "ab")
    for file in ("model.safetensors", "hessian.safetensors"):
        left, right = load_file(two.path / file), load_file(less.path / file)
        for name in MERGED:
            torch.testing.assert_close(right[name], left[name], rtol=1e-4, atol=1e-4)


def test_heads_that_would_be_lost_are_an_error(
    tmp_path: Path, three: tuple[Path, dict[str, Path]]
) -> None:
    base, experts = three
    merge(base, experts, GradientMatching(), tmp_path / "abc")
    with pytest.raises(InputError, match=r"heads/c\.safetensors: must be the only head .* 'c'"):
        merge(
            base,
            {"abc": tmp_path / "abc", "c": experts["c"]},
            GradientMatching(),
            tmp_path / "twice",
        )
    assert hidden(tmp_path) == []


def test_the_hessian_can_be_left_out(tmp_path: Path, three: tuple[Path, dict[str, Path]]) -> None:
    base, experts = three
    merge(base, experts, GradientMatching(), tmp_path / "out", hessian=False)
    assert not (tmp_path / "out" / "hessian.safetensors").exists()
    assert not (tmp_path / "out" / "expert.json").exists()


def test_a_result_without_curvature_is_no_expert(
    tmp_path: Path, three: tuple[Path, dict[str, Path]]
) -> None:
    base, experts = three
    merge(base, experts, TaskArithmetic(0.3), tmp_path / "out")
    assert not (tmp_path / "out" / "hessian.safetensors").exists()


def test_several_outputs_read_the_inputs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, three: tuple[Path, dict[str, Path]]
) -> None:
    base, experts = three
    methods = [TaskArithmetic(0.2), TaskArithmetic(0.5), GradientMatching(), Average()]
    alone = [
        contents(merge(base, experts, method, tmp_path / f"alone{i}").path)
        for i, method in enumerate(methods)
    ]
    reads: list[tuple[str, int]] = []
    read_into = SafetensorsFile.read_into

    def counted(self: SafetensorsFile, name: str, start: int, out: torch.Tensor) -> None:
        reads.append((name, out.nbytes))
        read_into(self, name, start, out)

    monkeypatch.setattr(SafetensorsFile, "read_into", counted)
    merge(base, experts, GradientMatching(), tmp_path / "one")
    once = sum(size for name, size in reads if name == "linear.weight")
    reads.clear()
    results = merge_all(
        base, experts, {tmp_path / f"out{i}": method for i, method in enumerate(methods)}
    )
    assert [contents(result.path) for result in results] == alone
    # The fingerprint of each result reads it back; the inputs are read once.
    written = (len(methods) - 1) * SHAPES["linear.weight"][0] * SHAPES["linear.weight"][1] * 4
    assert sum(size for name, size in reads if name == "linear.weight") == once + written


def test_patterns_choose_other_methods_scales_and_actions(
    tmp_path: Path, three: tuple[Path, dict[str, Path]]
) -> None:
    base, experts = three
    overrides = {
        "linear.*": Override(method=FisherAverage()),
        "norm.weight": Override(scale=0.5),
        "norm.bias": Override(action="keep"),
    }
    mixed = merge(base, experts, TaskArithmetic(0.2), tmp_path / "mixed", overrides=overrides)
    made = load_file(mixed.path / "model.safetensors")
    for method, names in (
        (TaskArithmetic(0.2), ["emb.weight"]),
        (TaskArithmetic(0.5), ["norm.weight"]),
        (FisherAverage(), ["linear.weight", "linear.bias"]),
    ):
        pure = merge(base, experts, method, tmp_path / repr(method))
        expected = load_file(pure.path / "model.safetensors")
        assert all(torch.equal(made[name], expected[name]) for name in names)
    assert torch.equal(made["norm.bias"], load_file(base)["norm.bias"])
    record = json.loads((mixed.path / "merge.json").read_text())
    assert record["overrides"]["norm.weight"]["scale"] == 0.5
    # Curvature is known of the Fisher-averaged tensors only.
    if (mixed.path / "hessian.safetensors").exists():
        assert set(load_file(mixed.path / "hessian.safetensors")) == {
            "linear.weight",
            "linear.bias",
        }


def test_overrides_must_say_one_thing_that_can_be_done() -> None:
    with pytest.raises(InputError, match=r"^overrides: must say one of .*; got none"):
        Override()
    with pytest.raises(InputError, match=r"got scale and action"):
        Override(scale=1.0, action="keep")
    names = ["encoder.0.weight", "encoder.1.weight"]
    with pytest.raises(InputError, match=r"overrides\['decoder\.\*'\]: must fit a tensor"):
        methods_of(names, TaskArithmetic(), {"decoder.*": Override(scale=0.1)})
    with pytest.raises(InputError, match=r"must name a setting of Average \(none\); got 'scale'"):
        methods_of(names, Average(), {"encoder.*": Override(scale=0.1)})


def test_an_action_in_two_places_is_refused(
    tmp_path: Path, three: tuple[Path, dict[str, Path]]
) -> None:
    base, experts = three
    with pytest.raises(InputError, match=r"overrides\['norm\.bias'\]: must not be a rule"):
        merge(
            base,
            experts,
            TaskArithmetic(),
            tmp_path / "out",
            policy=ParametersPolicy(rules={"norm.bias": "average"}),
            overrides={"norm.bias": Override(action="keep")},
        )


def test_float64_on_request_is_the_correctly_rounded_result(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    exact = merge(base, experts, TaskArithmetic(0.3), tmp_path / "out", accumulate="float64")
    made = load_file(exact.path / "model.safetensors")["linear.weight"]
    start = load_file(base)["linear.weight"].double()
    vectors = [
        load_file(experts[task] / "model.safetensors")["linear.weight"].double() - start
        for task in TASKS
    ]
    assert torch.equal(made, (start + 0.3 * (vectors[0] + vectors[1])).float())


def test_a_plan_says_what_would_happen_and_writes_nothing(
    tmp_path: Path, three: tuple[Path, dict[str, Path]]
) -> None:
    base, experts = three
    before = sorted(tmp_path.rglob("*"))
    (plan,) = plan_all(
        base,
        experts,
        {tmp_path / "out": GradientMatching()},
        overrides={"linear.*": Override(method=TaskArithmetic(0.1))},
    )
    assert sorted(tmp_path.rglob("*")) == before
    result = merge(
        base,
        experts,
        GradientMatching(),
        tmp_path / "out",
        overrides={"linear.*": Override(method=TaskArithmetic(0.1))},
    )
    assert plan.record == result.record
    assert plan.methods["linear.bias"] == "TaskArithmetic(scale=0.1)"
    made = {
        str(file.relative_to(result.path)): sum(v.nbytes for v in load_file(file).values())
        for file in result.path.rglob("*.safetensors")
    }
    assert plan.files == made
    assert plan.survey is True  # gradient matching may have to look for lost precision
    assert plan.seconds > 0


def test_a_plan_refuses_what_the_merge_would(
    tmp_path: Path, three: tuple[Path, dict[str, Path]]
) -> None:
    base, experts = three
    wide = save_expert(tmp_path, "wide", 5, changes={"norm.bias": torch.zeros(9)})
    with pytest.raises(InputError, match=r"'norm\.bias' must have the shape \[4\]"):
        plan_all(base, {**experts, "wide": wide}, {tmp_path / "out": Average()})


def test_devices_that_are_not_there_are_refused(
    tmp_path: Path, three: tuple[Path, dict[str, Path]]
) -> None:
    base, experts = three
    with pytest.raises(InputError, match=r'^device: must be one .*; got \'qpu\' .*Use "cpu"'):
        merge(base, experts, Average(), tmp_path / "out", device="qpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_gpu_gives_what_the_cpu_gives(tmp_path: Path, method: MergeMethod) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    slow = merge(base, experts, method, tmp_path / "cpu")
    quick = merge(base, experts, method, tmp_path / "cuda", device="cuda")
    left, right = (load_file(r.path / "model.safetensors") for r in (slow, quick))
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-6, atol=1e-6)


def test_the_process_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert Process.from_environment() == Process(0, 1)
    monkeypatch.setenv("SLURM_NTASKS", "5")  # as in a batch script, which runs once
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert Process.from_environment() == Process(0, 1)
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "5")
    assert Process.from_environment() == Process(2, 5)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Process.from_environment() == Process(1, 3)
    assert dataclasses.replace(Process(1, 3), rank=0) == Process(0, 3)


def test_an_automatic_scale_is_the_forecasts(
    tmp_path: Path, three: tuple[Path, dict[str, Path]]
) -> None:
    from lit_merge.forecast import forecast_merge

    base, experts = three
    best = forecast_merge(base, experts, TaskArithmetic(1.0), progress=False).best
    assert best is not None
    found = merge(base, experts, TaskArithmetic(1.0), tmp_path / "auto", scale="auto")
    given = merge(base, experts, TaskArithmetic(best.scale), tmp_path / "given")
    assert contents(found.path) == contents(given.path)
    assert any(f"the scale {best.scale:.4g} is where" in note for note in found.notes)
    record = json.loads((Path(found.path) / "merge.json").read_text())
    assert record["method"]["init_args"]["scale"] == best.scale


def test_a_scale_may_stand_beside_the_method(
    tmp_path: Path, three: tuple[Path, dict[str, Path]]
) -> None:
    base, experts = three
    one = merge(base, experts, TaskArithmetic(1.0), tmp_path / "one", scale=0.3)
    two = merge(base, experts, TaskArithmetic(0.3), tmp_path / "two")
    assert contents(one.path) == contents(two.path)
    with pytest.raises(InputError, match=r"^scale: must name a setting of Average"):
        merge(base, experts, Average(), tmp_path / "out", scale=0.3)


def test_tensors_that_only_the_base_or_an_expert_has_are_carried(tmp_path: Path) -> None:
    state = weights(0) | {"emb.position_ids": torch.arange(7), "lm_head.weight": torch.ones(2, 3)}
    save_file(state, tmp_path / "base.safetensors")
    experts = save_experts(tmp_path)
    extra = weights(3) | {"classifier.weight": torch.zeros(5, 6)}
    save_file(extra, tmp_path / "extra.safetensors")
    result = merge(
        tmp_path / "base.safetensors",
        {**experts, "extra": tmp_path / "extra.safetensors"},
        TaskArithmetic(0.3),
        tmp_path / "out",
    )
    made = load_file(Path(result.path) / "model.safetensors")
    assert torch.equal(made["emb.position_ids"], torch.arange(7))
    assert torch.equal(made["lm_head.weight"], torch.ones(2, 3))
    heads = load_file(Path(result.path) / "heads" / "extra.safetensors")
    assert torch.equal(heads["classifier.weight"], torch.zeros(5, 6))


def test_a_merge_says_where_the_guard_has_stood_in(
    tmp_path: Path, three: tuple[Path, dict[str, Path]]
) -> None:
    base, experts = three
    scale = {"a": 1.0, "b": 1.0, "c": -5.0}
    result = merge(base, experts, GradientMatching(scale, guard="clamp"), tmp_path / "out")
    assert any("negative scales leave no precision in" in note for note in result.notes)
    assert "no precision" in (Path(result.path) / "merge.json").read_text()
