"""Saving and loading merged models, and predicting with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lit_merge.correction import RescaleShift
from lit_merge.errors import InputError
from lit_merge.merged.classifier import qualified_name
from lit_merge.module import MergeModule
from lit_merge.tasks import ClassificationModule
from tests.tiny_fits import QUIET, tiny_trainer
from tests.tiny_merge import CLASSES, base_net, merge_module, tiny_data, write_experts

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


class Fitted:
    """A fitted module whose experts are gone, and the trainer that fitted it."""

    def __init__(self, folder: Path) -> None:
        write_experts(folder)
        self.module = merge_module(folder)
        self.trainer: Trainer = tiny_trainer(folder, max_epochs=1, enable_checkpointing=False)
        self.trainer.fit(self.module, datamodule=tiny_data())
        self.checkpoint = folder / "x.ckpt"
        self.trainer.save_checkpoint(self.checkpoint)
        self.folder = self.module.save_corrected(folder / "corrected")
        for task in (*CLASSES, "base"):
            (folder / task / "model.safetensors").unlink()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return Fitted(tmp_path_factory.mktemp("fitted"))


def same(one: MergeModule, other: MergeModule) -> bool:
    inputs = torch.randn(5, 6)
    return all(
        torch.equal(one.predict_task(inputs, task), other.predict_task(inputs, task))
        for task in CLASSES
    )


def test_a_checkpoint_loads_without_experts_and_without_pickles(fitted):
    loaded = MergeModule.load_from_checkpoint(
        fitted.checkpoint, model=base_net(), weights_only=True
    )
    assert same(loaded, fitted.module)
    assert loaded.tasks == tuple(CLASSES)
    assert loaded.calibrated
    assert loaded.fit == fitted.module.fit


def test_a_checkpoint_holds_no_experts_no_logits_and_no_paths(fitted):
    content = torch.load(fitted.checkpoint, weights_only=True)
    state = content["state_dict"]
    assert all(name.startswith("merged.") or name == "calibrated" for name in state)
    weights = sum(v.numel() for n, v in state.items() if ".network." in n)
    heads = sum(12 * c + c for c in CLASSES.values())
    body = sum(p.numel() for p in base_net().body.parameters())
    assert weights == body + heads
    assert str(fitted.checkpoint.parent) not in str(
        {k: v for k, v in content.items() if k != "state_dict"}
    )


def test_a_checkpoint_can_be_tested_by_a_module_without_model(fitted, tmp_path):
    trainer = tiny_trainer(tmp_path, enable_checkpointing=False)
    module = MergeModule(base_net())
    found = trainer.test(
        module,
        datamodule=tiny_data(),
        ckpt_path=fitted.checkpoint,
        weights_only=True,
        verbose=False,
    )
    expected = trainer.test(fitted.module, datamodule=tiny_data(), verbose=False)
    assert found == expected


def test_a_corrected_folder_gives_the_same_model(fitted):
    assert same(MergeModule.from_folder(fitted.folder, base_net()), fitted.module)


def test_a_corrected_folder_is_not_calibrated_again(fitted, tmp_path):
    module = MergeModule(base_net(), merged=str(fitted.folder), teacher="labels")
    trainer = tiny_trainer(tmp_path, max_steps=0, max_epochs=-1, enable_checkpointing=False)
    trainer.fit(module, datamodule=tiny_data())
    assert same(module, fitted.module)


def test_the_record_says_how_it_was_made(fitted):
    record = fitted.module.record()
    assert record.merge["method"]["class_path"].endswith("TaskArithmetic")
    assert record.num_classes == tuple(CLASSES.values())
    assert record.settings["closed_form"] == "tact"
    assert record.correction == qualified_name(RescaleShift)


def test_probabilities_are_of_the_tasks_own_classes(fitted):
    inputs = torch.randn(4, 6)
    for task, classes in CLASSES.items():
        probabilities = fitted.module.predict_task(inputs, task)
        assert probabilities.shape == (4, classes)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(4))
        assert not probabilities.requires_grad


def test_a_trainer_predicts_mixed_batches(fitted, tmp_path):
    data = tiny_data()
    data.setup("test")
    trainer = tiny_trainer(tmp_path, enable_checkpointing=False)
    trainer.datamodule = data  # type: ignore[assignment]
    fitted.module.trainer = trainer
    fitted.module.meet_data()
    batch = next(iter(data.test_dataloader()[1]))
    probabilities = fitted.module.predict_step(batch, 0)
    torch.testing.assert_close(
        probabilities[:, : CLASSES["dtd"]], fitted.module.predict_task(batch.inputs, "dtd")
    )


def test_an_unknown_task_is_named(fitted):
    with pytest.raises(InputError, match="task: must be one of svhn, dtd; got 'cars'"):
        fitted.module.predict_task(torch.zeros(1, 6), "cars")


class Other(RescaleShift):
    """Another class of corrections."""


def test_corrections_of_another_class_are_refused(fitted):
    message = "was corrected by lit_merge.correction.rescale.RescaleShift; got correction=.*Other"
    with pytest.raises(InputError, match=f"corrected: {message}"):
        MergeModule.from_folder(fitted.folder, base_net(), correction=Other)
    with pytest.raises(InputError, match=f"checkpoint: {message}"):
        MergeModule.load_from_checkpoint(
            fitted.checkpoint, model=base_net(), weights_only=True, correction=Other
        )


def test_a_checkpoint_of_another_class_is_refused(fitted, tmp_path):
    trainer = tiny_trainer(tmp_path, enable_checkpointing=False)
    trainer.strategy.connect(ClassificationModule(base_net(), 4))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="checkpoint: must be one of a MergeModule"):
        MergeModule.load_from_checkpoint(tmp_path / "x.ckpt", model=base_net(), weights_only=True)


def test_a_checkpoint_of_other_tasks_is_refused(fitted, tmp_path):
    write_experts(tmp_path)
    module = merge_module(tmp_path, experts={"dtd": str(tmp_path / "dtd")})
    trainer = tiny_trainer(tmp_path, enable_checkpointing=False)
    with pytest.raises(
        InputError, match=r"checkpoint: must be of the tasks dtd and .* got svhn, dtd"
    ):
        trainer.test(module, datamodule=tiny_data(), ckpt_path=fitted.checkpoint, weights_only=True)


def test_another_network_than_the_corrected_one_is_refused(fitted):
    network = base_net()
    network.body[2] = torch.nn.Linear(12, 11)
    with pytest.raises(InputError, match=r"site 'body.2' must have 12 channels.* got 11"):
        MergeModule.from_folder(fitted.folder, network)
