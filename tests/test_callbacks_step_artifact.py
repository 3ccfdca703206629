from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_merge.callbacks import DiagonalHessian
from lit_merge.callbacks.step_artifact import load_sums, save_sums
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from tests.tiny_fits import (
    NUM_EXAMPLES,
    QUIET,
    StatefulBatches,
    TinyClassifier,
    assert_same,
    hessian_in,
    in_order,
    loader,
    squared,
    still,
    tiny_classifier,
    tiny_trainer,
)

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


@pytest.mark.parametrize("estimator", ["squared-batch-gradient", "adam"])
def test_a_fit_resumed_in_mid_epoch_ends_as_if_it_had_not_stopped(tmp_path, estimator) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings: dict[str, Any] = {"accumulate_grad_batches": 2}
    data = {"curvature_dataloader": in_order}

    def module(seed: int) -> TinyClassifier:
        created = tiny_classifier(seed)
        vars(created).update(data)
        return created

    def callbacks(folder: Path) -> list[Any]:
        saving = ModelCheckpoint(dirpath=folder, every_n_train_steps=3, save_top_k=-1)
        return [DiagonalHessian(estimator=estimator), saving]

    uninterrupted, resumed = module(0), module(0)
    tiny_trainer(whole, *callbacks(whole), **settings).fit(uninterrupted, StatefulBatches())
    tiny_trainer(parts, *callbacks(parts), **settings, max_steps=3).fit(resumed, StatefulBatches())
    resumed = module(7)
    tiny_trainer(parts, *callbacks(parts), **settings).fit(
        resumed, StatefulBatches(), ckpt_path=parts / "epoch=0-step=3.ckpt"
    )
    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
    assert_same(hessian_in(parts), hessian_in(whole), tolerance=1e-6)
    found, expected = (open_expert(f).info.details["curvature"] for f in (parts, whole))
    assert found == expected
    assert found["num_steps"] == [8]
    assert found["num_seen"] == 2 * NUM_EXAMPLES


def test_checkpoints_hold_counts_and_the_sums_are_in_a_file(tmp_path) -> None:
    callbacks = (squared(), ModelCheckpoint(dirpath=tmp_path, save_last=True))
    tiny_trainer(tmp_path, *callbacks).fit(tiny_classifier(), loader())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    (own,) = (value for key, value in state.items() if key.startswith("DiagonalHessian"))
    assert own["steps"]["file"] == "squared-batch-gradient-step=16.safetensors"
    assert (tmp_path / own["steps"]["file"]).is_file()
    assert not any(isinstance(value, Tensor) for value in own["steps"].values())


def test_sums_that_no_checkpoint_names_are_removed(tmp_path) -> None:
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=1)
    tiny_trainer(tmp_path, squared(), saving).fit(tiny_classifier(), loader())
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert "squared-batch-gradient-step=16.safetensors" in files
    assert len(files) <= 3  # known to be unused at the save after the next


def test_nothing_is_removed_while_a_checkpoint_cannot_be_read(tmp_path) -> None:
    (tmp_path / "half.ckpt").write_bytes(b"PK\x03\x04 half a checkpoint")
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=4, save_top_k=1)
    tiny_trainer(tmp_path, squared(), saving).fit(tiny_classifier(), loader())
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def resume_without_sums(folder: Path) -> None:
    saving = ModelCheckpoint(dirpath=folder, save_last=True)
    tiny_trainer(folder, squared(), saving).fit(still(), in_order())
    for path in folder.glob("squared-*.safetensors"):
        path.unlink()
    trainer = tiny_trainer(folder, squared(), max_epochs=3)
    trainer.fit(still(), in_order(), ckpt_path=folder / "last.ckpt")


def test_missing_sums_are_said_aloud_and_counting_begins_again(tmp_path) -> None:
    with pytest.warns(UserWarning, match=r"sums of the resumed fit are missing"):
        resume_without_sums(tmp_path)
    curvature = open_expert(tmp_path).info.details["curvature"]
    assert curvature["num_seen"] == NUM_EXAMPLES


def test_sums_are_found_beside_the_checkpoint_of_their_run_only(tmp_path) -> None:
    parameters = {"w": torch.zeros(2)}
    save_sums(tmp_path / "a.safetensors", {"0.w": torch.ones(2)}, run="one")
    (tmp_path / "other").mkdir()
    save_sums(tmp_path / "other" / "a.safetensors", {"0.w": torch.zeros(2)}, run="two")
    folders = [tmp_path, tmp_path / "other"]
    found = load_sums("a.safetensors", folders, run="two", parameters=parameters)
    assert found is not None
    assert found["0.w"].tolist() == [0, 0]
    assert load_sums("a.safetensors", folders, run="three", parameters=parameters) is None
    assert load_sums("b.safetensors", folders, run="one", parameters=parameters) is None


def test_sums_of_another_model_are_refused(tmp_path) -> None:
    save_sums(tmp_path / "a.safetensors", {"0.w": torch.ones(2)}, run="one")
    with pytest.raises(InputError, match=r"a\.safetensors: must hold sums of the module's"):
        load_sums("a.safetensors", [tmp_path], run="one", parameters={"w": torch.zeros(3)})
