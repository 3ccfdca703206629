from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor
from torch.utils.data import DataLoader

from lit_merge.callbacks import ActivationStatistics, DiagonalHessian
from lit_merge.checkpoint import fingerprint, load_into
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from tests.tiny_fits import (
    NUM_EXAMPLES,
    QUIET,
    TinyClassifier,
    assert_same,
    by_loop,
    examples,
    fit,
    hessian_in,
    loader,
    tiny_classifier,
    tiny_trainer,
)

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def test_both_callbacks_write_one_folder_in_either_order(tmp_path) -> None:
    for folder, kinds in (
        (tmp_path / "a", (DiagonalHessian, ActivationStatistics)),
        (tmp_path / "b", (ActivationStatistics, DiagonalHessian)),
    ):
        fit(folder, *(kind() for kind in kinds))
        expert = open_expert(folder)
        assert expert.hessian is not None
        assert expert.activations is not None
        info = expert.info
        assert (info.estimator, info.num_examples) == ("exact", NUM_EXAMPLES)
        assert {"curvature", "activations", "run", "module"} <= set(info.details)


def test_the_best_weights_are_measured_and_the_last_ones_left(tmp_path) -> None:
    class Worse(TinyClassifier):
        """Validation gets worse after the first epoch."""

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", float(self.current_epoch))

    checkpoints = ModelCheckpoint(dirpath=tmp_path, monitor="val")
    torch.manual_seed(0)
    module = Worse()
    callback = DiagonalHessian(weights="best", labels="observed")
    trainer = tiny_trainer(tmp_path, callback, checkpoints, max_epochs=3)
    trainer.fit(module, loader(), DataLoader(examples(4)))
    best = torch.load(checkpoints.best_model_path, weights_only=True)
    assert best["epoch"] == 0
    expert = open_expert(tmp_path / "expert")
    for name, value in best["state_dict"].items():
        assert torch.equal(expert.weights.tensor(name), value)
        assert not torch.equal(module.state_dict()[name], value)
    measured = tiny_classifier()
    load_into(measured, expert.weights)
    assert_same(hessian_in(tmp_path / "expert"), by_loop(measured))


def test_the_best_weights_need_a_monitor(tmp_path) -> None:
    with pytest.raises(InputError, match=r'weights: must be "last".*ModelCheckpoint\(monitor='):
        fit(tmp_path, DiagonalHessian(weights="best"))


def test_the_best_weights_must_have_been_saved(tmp_path) -> None:
    class Logged(TinyClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            result = super().training_step(batch, batch_idx)
            self.log("train", result)
            return result

    never = ModelCheckpoint(dirpath=tmp_path, monitor="train", every_n_epochs=10)
    with pytest.raises(InputError, match=r'where no checkpoint was written; got "best"'):
        fit(tmp_path, DiagonalHessian(weights="best"), never, module=Logged())
    assert not (tmp_path / "expert").exists()


def test_averaged_weights_are_measured_when_averaging_comes_first(tmp_path) -> None:
    averaging = EMAWeightAveraging(decay=0.9)
    plain = fit(tmp_path / "plain", ModelCheckpoint(dirpath=tmp_path / "plain"))
    module = fit(tmp_path / "ema", averaging, DiagonalHessian(labels="observed"))
    expert = open_expert(tmp_path / "ema")
    for name, value in module.state_dict().items():
        assert torch.equal(expert.weights.tensor(name), value)
        assert not torch.equal(plain.state_dict()[name], value)
    assert_same(hessian_in(tmp_path / "ema"), by_loop(module))


@pytest.mark.parametrize(
    "averaging", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.01)]
)
def test_averaging_that_comes_after_is_refused(tmp_path, averaging: pl.Callback) -> None:
    name = type(averaging).__name__
    with pytest.raises(InputError, match=f"Put DiagonalHessian after {name}"):
        fit(tmp_path, DiagonalHessian(), averaging)


def test_stochastic_weight_averaging_comes_first(tmp_path) -> None:
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    module = fit(tmp_path, averaging, DiagonalHessian(labels="observed"), max_epochs=3)
    assert_same(hessian_in(tmp_path), by_loop(module))


def test_early_stopping_ends_in_an_expert_folder(tmp_path) -> None:
    class Flat(TinyClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("flat", 1.0)
            return super().training_step(batch, batch_idx)

    stopping = EarlyStopping("flat", patience=1, check_on_train_epoch_end=True)
    module = Flat()
    fit(tmp_path, DiagonalHessian(labels="observed"), stopping, module=module, max_epochs=50)
    assert module.trainer.current_epoch == 2
    assert_same(hessian_in(tmp_path), by_loop(module))


class Interrupting(TinyClassifier):
    """Is interrupted by the user in its fourth step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            raise KeyboardInterrupt


def test_an_interrupted_fit_writes_nothing_and_says_what_to_do(tmp_path, caplog) -> None:
    with caplog.at_level("INFO"), pytest.raises(SystemExit):
        fit(tmp_path, DiagonalHessian(), module=Interrupting())
    assert '"lit-merge curvature" measures any checkpoint' in caplog.text
    assert list(tmp_path.glob("**/*expert*")) == []


def test_a_rehearsal_looks_but_writes_nothing(tmp_path) -> None:
    fit(tmp_path, DiagonalHessian(), fast_dev_run=True, enable_checkpointing=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_free_is_refused_before_training(tmp_path) -> None:
    fit(tmp_path, DiagonalHessian())
    module = tiny_classifier()
    with pytest.raises(InputError, match=r"expert: must be empty or absent"):
        fit(tmp_path, DiagonalHessian(), module=module)
    assert module.trainer.global_step == 0
    fit(tmp_path, DiagonalHessian(replace=True, task="again"))
    assert open_expert(tmp_path).info.task == "again"


def test_a_remote_folder_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=r"output: must be a local folder; got s3://"):
        fit(tmp_path, DiagonalHessian(output="s3://bucket/expert"))


def test_two_of_a_kind_need_two_folders(tmp_path) -> None:
    adam = DiagonalHessian(estimator="adam")
    with pytest.raises(InputError, match=r"another folder for each DiagonalHessian"):
        fit(tmp_path, DiagonalHessian(), adam)
    adam = DiagonalHessian(estimator="adam", output=str(tmp_path / "adam"))
    fit(tmp_path, DiagonalHessian(), adam)
    assert open_expert(tmp_path / "adam").info.estimator == "adam"


def test_callbacks_of_one_folder_agree_on_the_weights(tmp_path) -> None:
    checkpoints = ModelCheckpoint(dirpath=tmp_path, monitor="loss")
    with pytest.raises(InputError, match=r"weights: must be the same for all callbacks"):
        fit(tmp_path, DiagonalHessian(weights="best"), ActivationStatistics(), checkpoints)


def test_a_resumed_fit_keeps_its_base_and_may_replace_its_own_folder(tmp_path) -> None:
    base = fingerprint(tiny_classifier().state_dict())
    module = tiny_classifier()
    checkpoints = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(tmp_path, DiagonalHessian(), ActivationStatistics(), checkpoints, module=module)
    trainer = tiny_trainer(
        tmp_path,
        DiagonalHessian(labels="observed"),
        ActivationStatistics(),
        ModelCheckpoint(dirpath=tmp_path),
        max_epochs=3,
    )
    resumed = tiny_classifier(seed=9)
    trainer.fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    expert = open_expert(tmp_path / "expert")
    assert expert.info.base_fingerprint == base
    assert expert.activations is not None
    assert_same(hessian_in(tmp_path / "expert"), by_loop(resumed))


def test_a_resumed_fit_without_the_callbacks_state_does_not_know_its_base(tmp_path) -> None:
    fit(tmp_path, ModelCheckpoint(dirpath=tmp_path, save_last=True))
    trainer = tiny_trainer(tmp_path, DiagonalHessian(), max_epochs=3)
    with pytest.warns(UserWarning, match=r"written without this callback"):
        trainer.fit(tiny_classifier(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert open_expert(tmp_path).info.base_fingerprint is None


def test_checkpoints_stay_small_and_load_without_pickle(tmp_path) -> None:
    sizes = []
    for number, callbacks in enumerate([(), (DiagonalHessian(), ActivationStatistics())]):
        folder = tmp_path / str(number)
        fit(folder, *callbacks, ModelCheckpoint(dirpath=folder, save_last=True))
        sizes.append((folder / "last.ckpt").stat().st_size)
        torch.load(folder / "last.ckpt", weights_only=True)
    assert sizes[1] - sizes[0] < 2000


def test_without_checkpoints_the_folder_is_in_the_trainers_root(tmp_path) -> None:
    fit(tmp_path, DiagonalHessian(), enable_checkpointing=False)
    assert (tmp_path / "expert" / "expert.json").is_file()


def test_sharded_parameters_are_refused_by_name(tmp_path) -> None:
    module = tiny_classifier()
    module.model.body.weight._is_flat_param = True
    with pytest.raises(InputError, match=r"1 sharded ones, 'model\.body\.weight' the first"):
        fit(tmp_path, DiagonalHessian(), module=module)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DiagonalHessian", {"estimator": "adam", "parameters": ["a.*"], "output": "x"}),
        ("DiagonalHessian", {"labels": "observed", "max_examples": 5, "weights": "best"}),
        ("ActivationStatistics", {"sites": ["linear", "a.*"], "max_examples": None}),
        ("ActivationStatistics", {"sites": "norm", "replace": True}),
    ],
)
def test_the_callbacks_can_stand_in_yaml(name: str, settings: dict[str, Any]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.Callback, "callback")
    entry = {"class_path": f"lit_merge.callbacks.{name}", "init_args": settings}
    made = parser.instantiate_classes(parser.parse_object({"callback": entry})).callback
    assert type(made).__name__ == name
    for key, value in settings.items():
        assert getattr(made, key) == value
