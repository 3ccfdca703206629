"""Passes over checkpoints that are killed and gone on with, and what they say of their quality."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.stats import spearmanr
from torch import Tensor, nn

import lit_merge
from lit_merge.callbacks import DiagonalHessian
from lit_merge.checkpoint_curvature import curvature_of_checkpoint
from lit_merge.curvature import CurvatureWarning, diagonal_hessian
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from lit_merge.passes.data_pass import data_pass
from tests.tiny_fits import (
    NUM_EXAMPLES,
    QUIET,
    TinyClassifier,
    cross_entropy_of,
    fit,
    hessian_in,
    loader,
    tiny_classifier,
    tiny_trainer,
)

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

SETTINGS: dict[str, Any] = {"labels": "observed", "batch_size": 4}


class WithData(TinyClassifier):
    def train_dataloader(self) -> Any:
        return loader()


class Stopped(WithData):
    """Its process ends, as if the power went, in one of its batches."""

    at = 9

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.trainer.training and torch.is_grad_enabled():
            self.sizes.append(len(batch[0]))
            if self.sizes.count(4) == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    saving = ModelCheckpoint(dirpath=folder, filename="tiny")
    tiny_trainer(folder, saving).fit(tiny_classifier(), loader())
    return folder / "tiny.ckpt"


def measure(folder: Path, checkpoint: Path, module: Any = None, **settings: Any) -> Path:
    trainer = settings.pop("trainer", {})
    settings = {"output": folder / "expert", **SETTINGS, **settings}
    return curvature_of_checkpoint(
        tiny_trainer(folder, **trainer), module or WithData(), checkpoint=checkpoint, **settings
    )


@pytest.fixture(scope="module")
def unfinished(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kill a process in its ninth batch of four, and return the folder of its unfinished pass."""
    folder = tmp_path_factory.mktemp("killed")
    program = (
        "import sys; from tests.test_curvature_passes import Stopped, measure; "
        "from pathlib import Path; from lit_merge.passes import unfinished; "
        "unfinished._COST = 0; "  # after every batch, however long writing takes
        "measure(Path(sys.argv[1]), Path(sys.argv[2]), Stopped(), save_every=0.0)"
    )
    root = Path(lit_merge.__file__).parents[1]
    process = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(run)], cwd=root, check=False
    )
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "expert").exists()
    return folder / "expert.partial"


@pytest.fixture
def partial(unfinished: Path, tmp_path: Path) -> Path:
    """Return a copy of the unfinished pass, beside where ``measure`` writes."""
    return Path(shutil.copytree(unfinished, tmp_path / "expert.partial"))


def test_a_killed_pass_goes_on_where_it_was(tmp_path, run, partial, caplog) -> None:
    whole = measure(tmp_path, run, output=tmp_path / "whole")
    assert [path.name for path in partial.iterdir()] == ["rank-0.safetensors"]
    module = Stopped()
    module.at = 10**9
    with caplog.at_level(logging.INFO):
        resumed = measure(tmp_path, run, module, save_every=0.0)
    assert "Goes on after 32 examples" in caplog.text
    assert module.sizes.count(4) == 15 - 8  # after those of the probe, which has two
    found, expected = hessian_in(resumed), hessian_in(whole)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    details = [open_expert(folder).info.details["curvature"] for folder in (resumed, whole)]
    assert details[0] == details[1]
    assert not partial.exists()


def test_a_pass_with_other_settings_is_refused_and_its_sums_are_kept(
    tmp_path, run, partial
) -> None:
    before = (partial / "rank-0.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"expert\.partial/rank-0.*another seed: 0 there, 3 here"):
        measure(tmp_path, run, seed=3)
    assert (partial / "rank-0.safetensors").read_bytes() == before
    with pytest.raises(InputError, match=r"another batch_size: 4 there, 5 here"):
        measure(tmp_path, run, batch_size=5)
    measure(tmp_path, run, seed=3, replace=True)
    assert not partial.exists()
    assert open_expert(tmp_path / "expert").info.details["curvature"]["seed"] == 3


def test_a_pass_over_other_weights_or_data_is_refused(tmp_path, run, partial) -> None:
    class Other(WithData):
        def train_dataloader(self) -> Any:
            data = loader()
            data.dataset.tensors[0][:] += 1
            return data

    with pytest.raises(InputError, match=r"another first_examples"):
        measure(tmp_path, run, Other())
    saved = torch.load(run, weights_only=True)
    saved["state_dict"]["model.body.bias"][0] += 1
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"another weights"):
        measure(tmp_path, tmp_path / "other.ckpt")


def test_a_short_pass_writes_nothing_aside(tmp_path, run, monkeypatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("was written")

    monkeypatch.setattr("lit_merge.passes.unfinished.UnfinishedPass.save", never)
    measure(tmp_path, run)
    assert not (tmp_path / "expert.partial").exists()


def test_nothing_is_kept_on_request(tmp_path, run, partial) -> None:
    measure(tmp_path, run, seed=8, save_every=None)  # does not even look at what is there
    assert partial.exists()
    with pytest.raises(InputError, match=r"save_every: must be a number of seconds"):
        measure(tmp_path, run, save_every=-1.0)


@pytest.mark.distributed
def test_ranks_go_on_each_with_its_own(tmp_path, run) -> None:
    """Only rank 1 is killed, and the other one with it: each then goes on with what it has."""
    processes = {"devices": 2, "strategy": "ddp_fork"}
    whole = measure(tmp_path, run, output=tmp_path / "whole")

    class Breaks(WithData):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_rank == 1 and self.wrote(1):
                while not self.wrote(0):
                    time.sleep(0.01)
                raise RuntimeError("power cut")
            return super().training_step(batch, batch_idx)

        def wrote(self, rank: int) -> bool:
            return (tmp_path / "expert.partial" / f"rank-{rank}.safetensors").exists()

    with pytest.raises(Exception, match=r"power cut|rank 1"):
        measure(tmp_path, run, Breaks(), save_every=0.0, trainer=processes, batch_size=2)
    files = sorted(path.name for path in (tmp_path / "expert.partial").iterdir())
    assert files == ["rank-0.safetensors", "rank-1.safetensors"]
    resumed = measure(tmp_path, run, save_every=0.0, trainer=processes, batch_size=2)
    for name, value in hessian_in(whole).items():
        torch.testing.assert_close(hessian_in(resumed)[name], value, rtol=1e-5, atol=1e-9)
    assert not (tmp_path / "expert.partial").exists()


def quality_by_numpy(module: nn.Module, batch_size: int, **order: Any) -> tuple[float, float]:
    """Return relative error and rank correlation of whole halves, by a loop over the batches."""
    halves: list[list[Tensor]] = [[], []]
    counts = [0, 0]
    for number, (_, batch) in enumerate(data_pass(loader(), batch_size=batch_size, **order)):
        squares = diagonal_hessian(module, [batch], cross_entropy_of, labels="observed")
        halves[number % 2].append(torch.cat([value.flatten() for value in squares.values()]))
        counts[number % 2] += len(batch[0])
    a, b = (
        np.sum([square.double().numpy() for square in half], axis=0) / count
        for half, count in zip(halves, counts, strict=True)
    )
    total = sum(counts)
    mean = (counts[0] * a + counts[1] * b) / total
    distance = np.sqrt(counts[0] * counts[1]) / total * np.linalg.norm(a - b)
    return float(distance / np.linalg.norm(mean)), float(spearmanr(a, b).statistic)


def quality_in(folder: Path) -> dict[str, Any]:
    quality = open_expert(folder).info.details["curvature"]["quality"]
    assert json.loads(json.dumps(quality)) == quality
    return dict(quality)


def test_the_callback_writes_how_far_the_halves_are_apart(tmp_path) -> None:
    module = fit(tmp_path, DiagonalHessian(labels="observed"))
    error, correlation = quality_by_numpy(module, 8)
    quality = quality_in(tmp_path)
    assert quality["relative_error"] == pytest.approx(error, rel=1e-4)
    assert quality["rank_correlation"] == pytest.approx(correlation, rel=1e-4)
    assert quality["num_examples"] == [32, 29]
    assert set(quality["worst"]) == {name for name, _ in module.named_parameters()}


@pytest.mark.distributed
def test_two_processes_find_the_quality_that_one_finds(tmp_path, run) -> None:
    """Two ranks with batches of four have the halves of one with batches of eight."""
    one = measure(tmp_path, run, output=tmp_path / "one", batch_size=8)
    processes = {"devices": 2, "strategy": "ddp_fork"}
    two = measure(tmp_path, run, output=tmp_path / "two", batch_size=4, trainer=processes)
    a, b = quality_in(one), quality_in(two)
    assert a["num_examples"] == b["num_examples"]
    assert sum(a["num_examples"]) == NUM_EXAMPLES
    assert b["relative_error"] == pytest.approx(a["relative_error"], rel=1e-5)
    assert b["rank_correlation"] == pytest.approx(a["rank_correlation"], rel=1e-5)
    assert list(a["worst"]) == list(b["worst"])


def test_a_poor_estimate_is_warned_of_with_advice(tmp_path, run) -> None:
    with pytest.warns(CurvatureWarning, match=r"poor estimate: relative error .* Take more exam"):
        measure(tmp_path, run, max_examples=6)


def test_one_example_has_no_halves(tmp_path, run) -> None:
    measure(tmp_path, run, max_examples=1)
    assert "quality" not in open_expert(tmp_path / "expert").info.details["curvature"]
