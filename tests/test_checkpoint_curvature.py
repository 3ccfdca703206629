from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lit_merge.callbacks import InputGrams, KroneckerFactors
from lit_merge.checkpoint import load_into, open_checkpoint, save_tensors
from lit_merge.checkpoint_curvature import curvature_of_checkpoint
from lit_merge.curvature import CurvatureWarning, diagonal_hessian
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, open_expert, write_expert
from tests.tiny_fits import (
    NUM_EXAMPLES,
    QUIET,
    TinyClassifier,
    examples,
    loader,
    tiny_classifier,
    tiny_trainer,
)

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


class WithData(TinyClassifier):
    def train_dataloader(self) -> Any:
        return loader()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of a fit without any callback of ours."""
    folder = tmp_path_factory.mktemp("run")
    saving = ModelCheckpoint(dirpath=folder, filename="tiny")
    tiny_trainer(folder, saving).fit(tiny_classifier(), loader())
    return folder / "tiny.ckpt"


def measure(folder: Path, checkpoint: Path, module: Any = None, **settings: Any) -> Path:
    trainer = settings.pop("trainer", {})
    settings = {"output": folder / "expert", **settings}
    return curvature_of_checkpoint(
        tiny_trainer(folder, **trainer), module or WithData(), checkpoint=checkpoint, **settings
    )


def hessian_in(folder: Path) -> dict[str, Tensor]:
    expert = open_expert(folder)
    assert expert.hessian is not None
    return {name: expert.hessian.tensor(name).clone() for name in expert.hessian}


def reference(checkpoint: Path, **settings: Any) -> dict[str, Tensor]:
    """Return the plain function's result on the checkpoint's weights."""
    module = tiny_classifier()
    with open_checkpoint(checkpoint) as weights:
        load_into(module, weights)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    return diagonal_hessian(module, [examples()[:]], loss, **settings)


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("labels", ["sampled", "observed"])
def test_a_checkpoint_of_any_fit_becomes_an_expert(tmp_path, run, labels: Any) -> None:
    """One process, where Lightning predicts in inference mode and two would not show it."""
    folder = measure(tmp_path, run, labels=labels, seed=4, task="clouds", batch_size=9)
    assert_same(hessian_in(folder), reference(run, labels=labels, seed=4))
    expert = open_expert(folder)
    saved = torch.load(run, weights_only=True)["state_dict"]
    assert all(torch.equal(expert.weights.tensor(name), value) for name, value in saved.items())
    info = expert.info
    assert (info.task, info.estimator, info.labels) == ("clouds", "exact", labels)
    assert info.num_examples == NUM_EXAMPLES
    assert info.details["checkpoint"] == str(run)
    assert expert.activations is None


def test_parameters_and_examples_can_be_chosen(tmp_path, run) -> None:
    with pytest.warns(CurvatureWarning, match=r"poor estimate.*Take .*: max_examples=27"):
        folder = measure(tmp_path, run, parameters=["*.head.*"], max_examples=10)
    assert sorted(hessian_in(folder)) == ["model.head.bias", "model.head.weight"]
    info = open_expert(folder).info
    assert (info.num_examples, info.details["curvature"]["num_seen"]) == (NUM_EXAMPLES, 10)


def test_activation_statistics_come_along(tmp_path, run) -> None:
    folder = measure(tmp_path, run, sites=["linear"], max_activation_examples=20)
    activations = open_expert(folder).activations
    assert activations is not None
    assert activations.tensor("model.body.count").item() == 20
    assert "model.head.count" not in activations


def test_data_come_from_a_data_module_set_up_as_for_a_fit(tmp_path, run) -> None:
    class Data(pl.LightningDataModule):
        called: list[str]

        def __init__(self) -> None:
            super().__init__()
            self.called = []

        def prepare_data(self) -> None:
            self.called.append("prepare_data")

        def setup(self, stage: str) -> None:
            self.called.append(stage)
            assert self.trainer is not None

        def train_dataloader(self) -> Any:
            data = examples()
            return DataLoader([{"x": x, "y": y} for x, y in data], batch_size=8)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch["x"], batch["y"]

        def teardown(self, stage: str) -> None:
            self.called.append("teardown")

    data = Data()
    folder = curvature_of_checkpoint(
        tiny_trainer(tmp_path),
        tiny_classifier(),
        data,
        checkpoint=run,
        output=tmp_path / "expert",
        labels="observed",
    )
    assert data.called == ["prepare_data", "fit", "teardown"]
    assert_same(hessian_in(folder), reference(run, labels="observed"))


def test_hooks_of_the_module_are_called_where_the_data_module_has_none(tmp_path, run) -> None:
    class Hooked(WithData):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 0, batch[1]

    folder = measure(tmp_path, run, Hooked(), labels="observed")
    assert not hessian_in(folder)["model.body.weight"].any()


def test_a_model_that_is_built_late_is_built(tmp_path, run) -> None:
    class Late(WithData):
        def __init__(self) -> None:
            super().__init__()
            self.built, self.model = self.model, None

        def configure_model(self) -> None:
            self.model = self.built
            del self.built

    folder = measure(tmp_path, run, Late(), labels="observed")
    assert_same(hessian_in(folder), reference(run, labels="observed"))


def test_half_precision_without_scaler_is_not_used(tmp_path, run) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    folder = measure(tmp_path, run, labels="observed", trainer={"plugins": [plugin]})
    assert_same(hessian_in(folder), reference(run, labels="observed"))


def test_mixed_precision_is_that_of_the_trainer(tmp_path, run) -> None:
    folder = measure(tmp_path, run, labels="observed", trainer={"precision": "bf16-mixed"})
    found, exact = hessian_in(folder), reference(run, labels="observed")
    assert_same(found, exact, tolerance=0.1)
    assert not torch.equal(found["model.body.weight"], exact["model.body.weight"])


def test_the_weights_of_an_averaging_checkpoint_can_be_chosen(tmp_path) -> None:
    saving = ModelCheckpoint(dirpath=tmp_path, filename="ema")
    tiny_trainer(tmp_path, EMAWeightAveraging(decay=0.9), saving).fit(tiny_classifier(), loader())
    saved = torch.load(tmp_path / "ema.ckpt", weights_only=True)
    for weights, key in (("averaged", "state_dict"), ("raw", "current_model_state")):
        folder = measure(
            tmp_path, tmp_path / "ema.ckpt", output=tmp_path / weights, weights=weights
        )
        found = open_expert(folder).weights
        assert torch.equal(found.tensor("model.body.weight"), saved[key]["model.body.weight"])


def test_curvature_is_added_to_an_expert_folder_of_the_same_weights(tmp_path, run) -> None:
    state = torch.load(run, weights_only=True)["state_dict"]
    bare = {name.removeprefix("model."): value for name, value in state.items()}
    folder = write_expert(tmp_path / "expert", weights=bare, info=ExpertInfo(task="clouds"))
    measure(tmp_path, folder, labels="observed", output=folder)
    expert = open_expert(folder)
    assert expert.info.task == "clouds"
    assert expert.info.head_parameters == ("head.weight", "head.bias")
    assert sorted(expert.weights) == sorted(bare)
    expected = reference(run, labels="observed")
    found = hessian_in(folder)
    assert_same({f"model.{name}": value for name, value in found.items()}, expected)
    with pytest.raises(InputError, match=r"hessian\.safetensors: must not exist yet"):
        measure(tmp_path, folder, output=folder)
    measure(tmp_path, folder, output=folder, replace=True, labels="sampled")
    assert open_expert(folder).info.labels == "sampled"


def test_a_folder_of_other_weights_is_refused_before_the_pass(tmp_path, run) -> None:
    other = write_expert(
        tmp_path / "other", weights=tiny_classifier(seed=3).state_dict(), info=ExpertInfo()
    )
    before = (other / "expert.json").read_bytes()

    class Never(WithData):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("the pass has begun")

    with pytest.raises(InputError, match=r"other: must be empty or absent"):
        measure(tmp_path, run, Never(), output=other)
    assert (other / "expert.json").read_bytes() == before
    measure(tmp_path, run, output=other, replace=True)
    assert hessian_in(other)


def test_the_checkpoint_is_not_replaced_together_with_its_folder(tmp_path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    save_tensors(folder / "a.safetensors", tiny_classifier().state_dict())
    with pytest.raises(InputError, match=r"output: must not be replaced while"):
        measure(tmp_path, folder / "a.safetensors", output=folder, replace=True)
    assert (folder / "a.safetensors").exists()


def test_weights_of_another_module_are_refused(tmp_path, run) -> None:
    class Wider(WithData):
        def __init__(self) -> None:
            super().__init__()
            self.model.head = nn.Linear(6, 5)

    with pytest.raises(InputError, match=r"tiny\.ckpt: tensor 'model\.head\.weight'"):
        measure(tmp_path, run, Wider())


def test_a_missing_checkpoint_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=r"missing\.ckpt: must exist"):
        measure(tmp_path, tmp_path / "missing.ckpt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "last"}, r"weights: must be one of averaged, raw"),
        ({"labels": "guessed"}, r"labels: must be one of sampled, observed"),
        ({"max_examples": 0}, r"max_examples: must be a positive integer"),
        ({"max_activation_examples": 0}, r"max_activation_examples: must be a positive"),
        ({"batch_size": -1}, r"batch_size: must be a positive integer"),
        ({"parameters": ["nothing"]}, r"parameters: must match trained parameters"),
        ({"sites": "nothing"}, r"where: must match modules"),
        ({"estimator": "fisher"}, r"estimator: must be one of exact, hutchinson, none"),
        ({"estimator": "none"}, r'got "none" without gram, kronecker and sites'),
        ({"gram": True, "parameters": ["*.bias"]}, r"parameters: must name the weight of at"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, run, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(tmp_path, run, **settings)
    assert not (tmp_path / "expert").exists()


def test_a_module_without_training_data_is_refused(tmp_path, run) -> None:
    with pytest.raises(InputError, match=r"TinyClassifier: must define train_dataloader"):
        measure(tmp_path, run, tiny_classifier())


def test_sharded_parameters_are_refused(tmp_path, run) -> None:
    module = WithData()
    module.model.body.weight._is_flat_param = True
    with pytest.raises(InputError, match=r"strategy: must leave parameters whole"):
        measure(tmp_path, run, module)


def test_matrices_of_the_layers_are_those_of_the_callbacks(tmp_path: Path) -> None:
    saving = ModelCheckpoint(dirpath=tmp_path, filename="tiny")
    callbacks = (InputGrams(seed=3), KroneckerFactors(seed=3), saving)
    tiny_trainer(tmp_path, *callbacks).fit(tiny_classifier(), loader())
    folder = measure(
        tmp_path,
        tmp_path / "tiny.ckpt",
        output=tmp_path / "later",
        gram=True,
        kronecker=True,
        seed=3,
    )
    there, later = open_expert(tmp_path / "expert"), open_expert(folder)
    assert hessian_in(folder)
    for kind in ("gram", "kronecker"):
        expected, found = getattr(there, kind), getattr(later, kind)
        assert set(found) == set(expected)
        for name in found:
            assert_same({name: found.tensor(name)}, {name: expected.tensor(name)})
        assert later.info.details[kind]["num_examples"] == NUM_EXAMPLES
    assert later.info.details["kronecker"]["labels"] == "sampled"


def test_matrices_complete_a_folder_that_has_its_diagonal(tmp_path: Path, run: Path) -> None:
    folder = measure(tmp_path, run, labels="observed")
    before = (folder / "hessian.safetensors").read_bytes()
    measure(tmp_path, folder, output=folder, estimator="none", gram=True)
    measure(tmp_path, folder, output=folder, estimator="none", kronecker=True)
    expert = open_expert(folder)
    assert expert.gram is not None
    assert expert.kronecker is not None
    assert (folder / "hessian.safetensors").read_bytes() == before
    assert (expert.info.estimator, expert.info.labels) == ("exact", "observed")
    assert {"curvature", "gram", "kronecker"} <= set(expert.info.details)
    with pytest.raises(InputError, match=r"gram\.safetensors: must not exist yet"):
        measure(tmp_path, folder, output=folder, estimator="none", gram=True)
    measure(tmp_path, folder, output=folder, estimator="none", gram=True, replace=True)


def test_progress_is_shown_in_examples(tmp_path, run, capsys, monkeypatch) -> None:
    monkeypatch.setattr("lit_merge.passes.progress.LINE_EVERY", 0.0)
    measure(tmp_path, run, trainer={"enable_progress_bar": True})
    assert "61 of 61 examples" in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.parametrize("size", [NUM_EXAMPLES, 1])
def test_two_processes_measure_what_one_measures(tmp_path, run, size: int) -> None:
    class Some(TinyClassifier):
        def train_dataloader(self) -> Any:
            return loader(size)

    one = measure(tmp_path, run, Some(), output=tmp_path / "one", sites="auto")
    processes = {"devices": 2, "strategy": "ddp_fork"}
    two = measure(tmp_path, run, Some(), output=tmp_path / "two", sites="auto", trainer=processes)
    assert_same(hessian_in(two), hessian_in(one), tolerance=1e-6)
    counts = [open_expert(folder).activations.tensor("model.body.count") for folder in (one, two)]
    assert counts == [size, size]
