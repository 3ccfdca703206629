from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_merge.checkpoint import save_tensors
from lit_merge.curvature.quality import Halves
from lit_merge.distributed import barrier
from lit_merge.errors import InputError
from lit_merge.passes import unfinished
from lit_merge.passes.unfinished import UnfinishedPass
from tests.processes import on_ranks

SETTINGS: dict[str, Any] = {"seed": 1, "labels": "sampled", "parameters": ("a", "b")}
SUMS = {"body._orig_mod.weight": torch.rand(2, 3), "module.bias": torch.rand(3)}


def a_pass(folder: Path, rank: int = 0, every: float = 60.0, **changes: Any) -> UnfinishedPass:
    replace = changes.pop("replace", False)
    settings = {**SETTINGS, **changes}
    return UnfinishedPass(
        folder / "expert.partial", rank=rank, settings=settings, every=every, replace=replace
    )


def halves(batches: int = 0) -> Halves:
    made = Halves({name: value.numel() for name, value in SUMS.items()}, seed=0)
    for k in range(1, batches + 1):
        made.add(4, lambda chosen: torch.full((9,), float(k), dtype=torch.float64))  # noqa: B023
    return made


def test_what_was_saved_is_gone_on_with(tmp_path) -> None:
    before = halves(batches=3)
    a_pass(tmp_path).save(SUMS, before)
    after = halves()
    resumed = a_pass(tmp_path)
    resumed.require_same()
    sums = resumed.load(after)
    assert sums is not None
    assert {name: value.tolist() for name, value in sums.items()} == {
        name: value.tolist() for name, value in SUMS.items()
    }
    assert (after.num_batches, after.num_examples) == (3, [8, 4])
    assert torch.equal(after.first, before.first)
    assert torch.equal(after.mark, before.mark)
    assert before.first.any()
    assert before.mark.any()


def test_nothing_saved_is_nothing_to_go_on_with(tmp_path) -> None:
    fresh = a_pass(tmp_path)
    fresh.require_same()
    assert fresh.load(halves()) is None
    fresh.remove()
    assert list(tmp_path.iterdir()) == []


def test_ranks_have_files_of_their_own(tmp_path) -> None:
    ranks = [a_pass(tmp_path, rank) for rank in range(2)]
    for each in ranks:
        each.save({"module.bias": torch.full((1,), float(each.rank))}, halves())
    found = [each.load(halves()) for each in ranks]
    assert [sums["module.bias"].item() for sums in found if sums] == [0.0, 1.0]
    left = ranks[0].folder / f".rank-0.partial-{os.getpid()}-abcd.safetensors"
    left.touch()  # of a run that was killed while it wrote
    ranks[0].remove()
    assert [path.name for path in ranks[0].folder.iterdir()] == ["rank-1.safetensors"]
    ranks[1].remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.distributed
def test_ranks_that_remove_together_do_not_get_in_each_other_s_way(tmp_path) -> None:
    """The folder must not vanish while another rank looks through it: seen once in a hundred."""

    def remove(rank: int) -> int:
        for _ in range(500):
            each = a_pass(tmp_path, rank)
            each.folder.mkdir(exist_ok=True)
            each.path.touch()
            barrier()
            each.remove()
            barrier()
        return len(list(tmp_path.glob("expert.partial")))

    assert on_ranks(remove, world_size=2, folder=tmp_path) == [0, 0]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 2}, "seed: 1 there, 2 here"),
        ({"labels": "observed"}, 'labels: "sampled" there, "observed" here'),
        ({"parameters": None}, r'parameters: \["a", "b"\] there, null here'),
        ({"new": 3}, "new: null there, 3 here"),
    ],
)
def test_another_pass_is_named_and_kept(tmp_path, change: Any, difference: str) -> None:
    saved = a_pass(tmp_path)
    saved.save(SUMS, halves())
    before = saved.path.read_bytes()
    message = rf"rank-0\.safetensors: must be of this very pass.*{difference}.*give replace"
    with pytest.raises(InputError, match=message):
        a_pass(tmp_path, **change).require_same()
    assert saved.path.read_bytes() == before
    a_pass(tmp_path, replace=True, **change).require_same()
    assert not saved.path.exists()


def test_a_pass_of_the_same_settings_is_gone_on_with_also_when_it_may_be_replaced(tmp_path) -> None:
    a_pass(tmp_path).save(SUMS, halves())
    again = a_pass(tmp_path, replace=True)
    again.require_same()
    assert again.load(halves()) is not None


def test_other_first_examples_are_another_pass(tmp_path) -> None:
    seen = {"batch": ["torch.float32", [8, 2], [1.0, 0.5, 0.5, 0.5]]}
    other = {"batch": ["torch.float32", [8, 2], [1.0, 0.9, 0.5, 0.5]]}
    a_pass(tmp_path, first_examples=seen).save(SUMS, halves())
    a_pass(tmp_path, first_examples=seen).require_same()
    a_pass(tmp_path, first_examples={}).require_same()  # they cannot be told apart
    with pytest.raises(InputError, match=r"another first_examples"):
        a_pass(tmp_path, first_examples=other).require_same()


def test_files_of_another_format_or_origin_are_named(tmp_path) -> None:
    saved = a_pass(tmp_path)
    saved.folder.mkdir()
    save_tensors(saved.path, SUMS)
    with pytest.raises(InputError, match=r"another format_version: None there, 1 here"):
        saved.require_same()
    saved.path.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"rank-0\.safetensors"):
        saved.require_same()


def test_every_rank_hears_of_another_pass(tmp_path) -> None:
    a_pass(tmp_path, rank=1, seed=5).save(SUMS, halves())

    def check(rank: int) -> str:
        with pytest.raises(InputError) as caught:
            a_pass(tmp_path, rank).require_same()
        return str(caught.value)

    for message in on_ranks(check, world_size=2, folder=tmp_path):
        assert "rank-1.safetensors: must be of this very pass" in message


@pytest.mark.parametrize(("took", "until"), [(0.1, 60.0), (10.0, 500.0)])
def test_writing_is_due_by_time_and_costs_two_percent_at_most(
    tmp_path, monkeypatch, took: float, until: float
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    each = a_pass(tmp_path, every=60.0)
    now = 159.0
    assert not each.is_due()
    now = 160.0
    assert each.is_due()

    def slowly(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        nonlocal now
        now += took
        path.touch()

    monkeypatch.setattr(unfinished, "_write", slowly)
    each.save(SUMS, halves())
    saved_at = now
    now = saved_at + until - 1
    assert not each.is_due()
    now = saved_at + until
    assert each.is_due()


def test_an_interrupted_writing_leaves_the_file_before(tmp_path, monkeypatch) -> None:
    each = a_pass(tmp_path)
    each.save(SUMS, halves(batches=1))

    def fail(*_: Any) -> None:
        raise OSError(5, "broken")

    monkeypatch.setattr(unfinished, "_write", fail)
    with pytest.raises(InputError, match="broken"):
        each.save(SUMS, halves(batches=2))
    found = halves()
    assert each.load(found) is not None
    assert found.num_batches == 1
    assert [path.name for path in each.folder.iterdir()] == ["rank-0.safetensors"]


def test_settings_are_json() -> None:
    with pytest.raises(TypeError):
        a_pass(Path("nowhere"), seed=torch.zeros(1))
    assert json.dumps(a_pass(Path("nowhere")).settings)
