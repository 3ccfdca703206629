from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lit_merge
from lit_merge.callbacks import DiagonalHessian, TemporalMerging
from lit_merge.cli.fit import FitCLI
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from lit_merge.merged.folder import open_merged
from lit_merge.methods import Average, FisherAverage, GradientMatching, TaskArithmetic
from tests.sharded_fits import ShardedClassifier, in_torchrun, sharded_trainer
from tests.timelines import BODY, SHARED, Start, assert_equal, record, step, weights
from tests.tiny_fits import (
    QUIET,
    TinyClassifier,
    fit,
    in_order,
    loader,
    tiny_classifier,
    tiny_trainer,
)

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


class Normalised(TinyClassifier):
    """Has running statistics, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential()
        self.model.add_module("body", nn.Linear(4, 6))
        self.model.add_module("norm", nn.BatchNorm1d(6))
        self.model.add_module("head", nn.Linear(6, 3))


class Wider(TinyClassifier):
    """Another architecture."""

    def __init__(self) -> None:
        super().__init__()
        self.model.body = nn.Linear(4, 7)
        self.model.head = nn.Linear(7, 3)


class TwoClasses(TinyClassifier):
    """A task with another number of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.model.head = nn.Linear(6, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0], batch[1] % 2), batch_idx)


def test_the_deployed_model_is_the_running_average_of_base_and_experts(tmp_path) -> None:
    folder, decay = tmp_path / "timeline", 0.7
    starts = [
        step(folder, task, seed=seed, init="ema", deploy="ema", decay=decay, policy=SHARED)
        for seed, task in enumerate("abc")
    ]
    average = {name: value.double() for name, value in tiny_classifier(0).state_dict().items()}
    for number, task in enumerate("abc", 1):
        begun = {name: value.float() for name, value in average.items()}
        assert_equal(starts[number - 1], begun, rtol=1e-6, atol=1e-7)
        expert = weights(folder / f"{number:02}-{task}/expert")
        assert not torch.equal(expert[BODY[0]], begun[BODY[0]])
        average = {n: decay * v + (1 - decay) * expert[n].double() for n, v in average.items()}
        deployed = weights(folder / f"{number:02}-{task}/deployed")
        expected = {name: value.float() for name, value in average.items()}
        assert_equal(deployed, expected, rtol=1e-6, atol=1e-7)
        assert not (folder / f"{number:02}-{task}/average").exists()


def test_a_fresh_fit_starts_from_the_base_whatever_the_module_brings(tmp_path) -> None:
    folder = tmp_path / "timeline"
    for seed, task in enumerate("ab"):
        start = step(folder, task, seed=seed, init="fresh", deploy="last", policy=SHARED)
        assert_equal(start, tiny_classifier(0).state_dict(), rtol=0, atol=0)
    assert_equal(weights(folder / "base"), start, rtol=0, atol=0)


def test_plain_continual_fine_tuning_goes_on_from_the_last_expert(tmp_path) -> None:
    folder = tmp_path / "timeline"
    step(folder, "a", init="last", deploy="last", policy=SHARED)
    start = step(folder, "b", seed=1, init="last", deploy="last", policy=SHARED)
    assert_equal(start, weights(folder / "01-a/expert"), rtol=0, atol=0)
    deployed, expert = weights(folder / "02-b/deployed"), weights(folder / "02-b/expert")
    assert_equal(deployed, expert, rtol=0, atol=0)
    with open_merged(folder / "02-b/deployed") as parts:
        assert parts.tasks == ("a", "b")


def test_a_running_average_is_kept_for_the_next_fit_where_it_is_not_deployed(tmp_path) -> None:
    folder = tmp_path / "timeline"
    rules: dict[str, Any] = {
        "init": "ema",
        "deploy": "merge",
        "method": Average(),
        "policy": SHARED,
    }
    step(folder, "a", **rules)
    base, expert = weights(folder / "base"), weights(folder / "01-a/expert")
    expected = {name: (base[name] + expert[name]) / 2 for name in base}
    assert_equal(weights(folder / "01-a/average"), expected)
    assert_equal(weights(folder / "01-a/deployed"), expert)
    assert_equal(step(folder, "b", seed=1, **rules), expected)


@pytest.mark.parametrize("method", [GradientMatching(), FisherAverage()])
def test_the_deployed_model_and_a_later_expert_give_what_all_at_once_give(
    tmp_path, method: lit_merge.MergeMethod
) -> None:
    folder = tmp_path / "timeline"
    for seed, task in enumerate("abc"):
        hessian = DiagonalHessian(labels="observed")
        rules = {"init": "fresh", "deploy": "merge", "method": method, "policy": SHARED}
        step(folder, task, hessian, seed=seed, **rules)
    experts = {"before": folder / "02-b/deployed", "c": folder / "03-c/expert"}
    composed = lit_merge.merge(
        folder / "base", experts, method, tmp_path / "composed", policy=SHARED, progress=False
    )
    found = open_expert(folder / "03-c/deployed")
    assert_equal(
        weights(folder / "03-c/deployed"), weights(Path(composed.path)), rtol=1e-4, atol=1e-6
    )
    assert found.hessian is not None
    assert found.info.num_examples == 3 * 61
    assert found.info.details["merged"] == ["a", "b", "c"]


@pytest.mark.parametrize("after", [False, True])
def test_an_expert_has_its_curvature_and_base_in_either_order(tmp_path, after: bool) -> None:
    folder = tmp_path / "timeline"
    step(folder, "a")
    start = Start()
    callbacks = [TemporalMerging(str(folder), task="b"), DiagonalHessian(labels="observed")]
    fit(tmp_path, *(reversed(callbacks) if after else callbacks), start, module=tiny_classifier(1))
    expert = open_expert(folder / "02-b/expert")
    assert expert.hessian is not None
    assert expert.info.task == "b"
    assert expert.info.details["temporal"]["number"] == 2
    assert expert.info.base_fingerprint == lit_merge.checkpoint.fingerprint(start.weights)
    assert callbacks[1].output is None  # as it was
    assert not list(tmp_path.glob("expert"))


def test_tasks_keep_heads_of_their_own(tmp_path) -> None:
    folder = tmp_path / "timeline"
    step(folder, "three")
    torch.manual_seed(5)
    module = TwoClasses()
    head = module.model.head.weight.detach().clone()
    start = step(folder, "two", module=module)
    deployed = weights(folder / "01-three/deployed")
    assert all(torch.equal(start[name], deployed[name]) for name in BODY)
    assert torch.equal(start["model.head.weight"], head)
    with open_merged(folder / "02-two/deployed") as parts:
        shapes = {
            task: list(h.tensor("model.head.weight").shape) for task, h in parts.heads.items()
        }
    assert shapes == {"three": [3, 6], "two": [2, 6]}


def test_statistics_of_batch_norm_are_averaged_as_the_weights_are(tmp_path) -> None:
    folder = tmp_path / "timeline"
    name = "model.norm.running_mean"
    for seed, task in enumerate("ab"):
        torch.manual_seed(seed)
        step(folder, task, module=Normalised(), decay=0.8, max_epochs=1 + seed)
    average = weights(folder / "base")[name]
    for place in ("01-a", "02-b"):
        average = 0.8 * average + 0.2 * weights(folder / place / "expert")[name]
        torch.testing.assert_close(weights(folder / place / "deployed")[name], average)
    counter = "model.norm.num_batches_tracked"
    assert weights(folder / "02-b/deployed")[counter] == weights(folder / "base")[counter] == 0


def test_a_resumed_fit_goes_on_with_its_step(tmp_path) -> None:
    folder = tmp_path / "timeline"
    step(folder, "a")
    other = tmp_path / "checkpoints"

    def trainer(task: str, *others: pl.Callback, **settings: Any) -> pl.Trainer:
        saving = ModelCheckpoint(dirpath=other, every_n_epochs=1, save_top_k=-1)
        temporal = TemporalMerging(str(folder), task=task, replace=True)
        return tiny_trainer(other, temporal, saving, *others, **settings)

    trainer("b").fit(tiny_classifier(1), in_order())
    whole = weights(folder / "02-b/deployed")
    checkpoint = other / "epoch=0-step=8.ckpt"
    start = Start()
    trainer("b", start).fit(tiny_classifier(2), in_order(), ckpt_path=checkpoint)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert_equal(start.weights, saved, rtol=0, atol=0)
    assert [s["task"] for s in record(folder)["steps"]] == ["a", "b"]
    resumed = weights(folder / "02-b/deployed")
    assert all(torch.equal(resumed[name], whole[name]) for name in BODY)
    with pytest.raises(InputError, match=r"checkpoint of the step 03-c .*got one of 02-b"):
        trainer("c").fit(tiny_classifier(), in_order(), ckpt_path=checkpoint)


def test_a_step_that_is_done_again_takes_the_later_ones_with_it(tmp_path) -> None:
    folder = tmp_path / "timeline"
    for task in "abc":
        step(folder, task)
    with pytest.raises(InputError, match=r"task: must be none that .* has had; got 'b'.*replace"):
        step(folder, "b")
    start = step(folder, "b", replace=True)
    assert all(torch.equal(start[n], weights(folder / "01-a/deployed")[n]) for n in BODY)
    assert [s["task"] for s in record(folder)["steps"]] == ["a", "b"]
    assert not (folder / "03-c").exists()


def test_a_rehearsal_writes_nothing(tmp_path) -> None:
    folder = tmp_path / "timeline"
    callback = TemporalMerging(str(folder))
    fit(tmp_path, callback, fast_dev_run=True, enable_checkpointing=False)
    assert not folder.exists()


def test_a_task_without_a_name_has_its_number(tmp_path) -> None:
    callback = TemporalMerging(str(tmp_path / "timeline"))
    for _ in range(2):
        fit(tmp_path / "fit", callback)
    assert [s["task"] for s in record(tmp_path / "timeline")["steps"]] == ["01", "02"]


def test_another_architecture_is_refused_before_training(tmp_path) -> None:
    folder = tmp_path / "timeline"
    step(folder, "a")
    with pytest.raises(InputError, match=r"'model.body.weight' must have the shape \[6, 4\]"):
        step(folder, "b", module=Wider())
    with pytest.raises(InputError, match=r"got none named 'model.|got 'model.norm"):
        step(folder, "b", module=Normalised())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"init": "best"}, r"init: must be one of fresh, last, ema; got 'best'"),
        ({"deploy": "fresh"}, r"deploy: must be one of last, merge, ema; got 'fresh'"),
        ({"decay": 1.0}, r"decay: must be in \[0, 1\); got 1.0"),
        ({"method": Average()}, r'method: must be left out with deploy "ema"; got Average'),
        ({"task": "a/b"}, r"task: must be a name that a folder can have; got 'a/b'"),
        ({"weights": "worst"}, r"weights: must be one of last, best; got 'worst'"),
    ],
)
def test_settings_that_cannot_be_are_refused(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TemporalMerging("timeline", **rules)


def test_a_timeline_behind_a_url_is_refused() -> None:
    with pytest.raises(InputError, match=r"folder: must be a local folder; got s3://"):
        TemporalMerging("s3://bucket/timeline")


def test_callbacks_that_do_not_go_together_are_refused(tmp_path) -> None:
    folder = tmp_path / "timeline"
    with pytest.raises(InputError, match=r"must have a DiagonalHessian for GradientMatching"):
        step(folder, "a", deploy="merge")
    with pytest.raises(InputError, match=r"DiagonalHessian.output: must be left out beside"):
        step(folder, "a", DiagonalHessian(output=str(tmp_path / "own")))
    with pytest.raises(InputError, match=r"TaskArithmetic.scale"):
        step(folder, "a", deploy="merge", method=TaskArithmetic({"b": 1.0}))
    assert not folder.exists()


def test_the_command_line_knows_it_by_its_short_name(tmp_path) -> None:
    cli = FitCLI(
        [
            *("--model", "tests.tiny_fits.TinyClassifier", "--trainer.logger", "false"),
            *("--data", "TaskDataModule", "--data.task", "DigitsTask"),
            "--trainer.callbacks+=DiagonalHessian",
            "--trainer.callbacks+=TemporalMerging",
            *("--trainer.callbacks.folder", str(tmp_path), "--trainer.callbacks.init", "fresh"),
            *("--trainer.callbacks.deploy", "merge"),
            *("--trainer.callbacks.method", "GradientMatching"),
            *("--trainer.callbacks.policy.heads", "merge"),
        ]
    )
    (found,) = [c for c in cli.trainer.callbacks if isinstance(c, TemporalMerging)]  # type: ignore[attr-defined]
    assert found.timeline == tmp_path
    assert found.rules.method == GradientMatching()
    assert found.rules.policy == SHARED


class SameStart(pl.Callback):
    """Checks on every rank that training begins with the weights of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, value in weights(self.folder).items():
            if name in BODY:
                assert torch.equal(pl_module.state_dict()[name], value), trainer.global_rank


@pytest.mark.distributed
def test_two_processes_share_a_timeline(tmp_path) -> None:
    folder = tmp_path / "timeline"
    two: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork", "max_epochs": 1}
    rules: dict[str, Any] = {"init": "ema", "deploy": "merge"}
    fit(tmp_path, TemporalMerging(str(folder), task="a", **rules), DiagonalHessian(), **two)
    callbacks = (DiagonalHessian(), TemporalMerging(str(folder), task="b", **rules))
    fit(tmp_path, *callbacks, SameStart(folder / "01-a/average"), module=tiny_classifier(1), **two)
    assert [s["task"] for s in record(folder)["steps"]] == ["a", "b"]
    assert open_expert(folder / "02-b/deployed").hessian is not None


@pytest.mark.distributed
def test_sharded_parameters_start_from_the_timeline_too(tmp_path) -> None:
    folder = tmp_path / "timeline"
    step(folder, "a")

    def run(rank: int) -> str:
        torch.manual_seed(1)
        temporal = TemporalMerging(str(folder), task="b")
        trainer = sharded_trainer(tmp_path, "fsdp", temporal, max_epochs=1)
        trainer.fit(ShardedClassifier(lr=0.0), loader())
        return "done"

    assert in_torchrun(run, layout="fsdp", folder=tmp_path) == ["done", "done"]
    assert [s["task"] for s in record(folder)["steps"]] == ["a", "b"]
    begun = weights(folder / "01-a/deployed")
    for name, value in weights(folder / "02-b/expert").items():
        assert torch.equal(value, begun[name]) == (name in BODY)
