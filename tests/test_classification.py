"""The ready classification modules: any network, timm and transformers."""

from __future__ import annotations

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lit_merge.checkpoint import save_tensors
from lit_merge.errors import InputError
from lit_merge.tasks import (
    IGNORED,
    ClassificationModule,
    DatasetTask,
    TaskDataModule,
    TimmClassifier,
    TransformersClassifier,
)
from lit_merge.tasks.classification import read_logits
from tests.tiny_fits import QUIET, examples, tiny_trainer
from tests.tiny_models import padded_texts, tiny_bert

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

VIT = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 8, "num_heads": 2}


def network(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, classes))


def data(**options: int) -> TaskDataModule:
    task = DatasetTask(examples(), examples(13, seed=1), examples(29, seed=2), num_classes=3)
    return TaskDataModule(task, **options)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    tiny_bert().save_pretrained(folder)
    return str(folder)


def test_a_fit_learns(tmp_path):
    module = ClassificationModule(network(), 3, lr=0.05)
    trainer = tiny_trainer(tmp_path, max_epochs=5, enable_checkpointing=False)
    before = trainer.test(module, datamodule=data(), verbose=False)[0]
    trainer.fit(module, datamodule=data())
    after = trainer.test(module, datamodule=data(), verbose=False)[0]
    assert after["test/nll"] < 0.8 * before["test/nll"]
    assert after["test/accuracy"] > before["test/accuracy"]


def test_the_metrics_are_those_of_all_examples(tmp_path):
    module = ClassificationModule(network(), 3)
    trainer = tiny_trainer(tmp_path, enable_checkpointing=False)
    (found,) = trainer.test(module, datamodule=data(batch_size=8), verbose=False)
    inputs, labels = examples(29, seed=2).tensors
    with torch.no_grad():
        logits = module(inputs)
    accuracy = (logits.argmax(-1) == labels).float().mean()
    assert found["test/accuracy"] == pytest.approx(float(accuracy))
    nll = nn.functional.cross_entropy(logits, labels)
    assert found["test/nll"] == pytest.approx(float(nll), rel=1e-5)


@pytest.mark.distributed
def test_two_processes_measure_what_one_does(tmp_path):
    found = []
    for ranks in (1, 2):
        strategy = "ddp_fork" if ranks == 2 else "auto"
        trainer = tiny_trainer(
            tmp_path, devices=ranks, strategy=strategy, enable_checkpointing=False
        )
        trainer.test(
            ClassificationModule(network(), 3), datamodule=data(batch_size=8), verbose=False
        )
        found.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert found[0]["test/accuracy"] == found[1]["test/accuracy"]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_loss_is_the_mean_over_examples_with_a_label(tmp_path):
    module = ClassificationModule(network(), 3)
    inputs, labels = examples(4).tensors
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    whole = module.training_step((inputs[:3], labels[:3]), 0)
    masked = module.training_step((inputs, labels.where(torch.arange(4) < 3, IGNORED)), 0)
    torch.testing.assert_close(whole, masked)


def test_only_matrices_are_decayed():
    module = ClassificationModule(network(), 3, weight_decay=0.3)
    optimizer = module.configure_optimizers()["optimizer"]  # type: ignore[index, call-overload]
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert {name: decay[id(p)] for name, p in module.model.named_parameters()} == {
        "0.weight": 0.3,
        "0.bias": 0.0,
        "2.weight": 0.0,
        "2.bias": 0.0,
        "3.weight": 0.3,
        "3.bias": 0.0,
    }


def test_checkpoints_load_with_tensors_only_and_resume_in_mid_epoch(tmp_path):
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=3)
    module = ClassificationModule(network(), 3, lr=0.05, label_smoothing=0.1)
    tiny_trainer(tmp_path, keep, max_epochs=1).fit(module, datamodule=data(batch_size=16))
    path = sorted(tmp_path.glob("*.ckpt"))[-1]
    loaded = ClassificationModule.load_from_checkpoint(path, model=network(), weights_only=True)
    assert loaded.label_smoothing == 0.1
    inputs = torch.randn(2, 4)
    assert loaded(inputs).shape == (2, 3)
    assert "model" not in loaded.hparams


def test_a_timm_model_is_made_trained_and_loaded_again(tmp_path):
    module = TimmClassifier("vit_tiny_patch16_224", 3, model_kwargs=VIT)
    keep = ModelCheckpoint(tmp_path)
    trainer = tiny_trainer(tmp_path, keep, max_epochs=1)
    points = [(torch.randn(3, 16, 16), i % 3) for i in range(4)]
    trainer.fit(module, datamodule=TaskDataModule(DatasetTask(points, num_classes=3)))
    loaded = TimmClassifier.load_from_checkpoint(keep.best_model_path, weights_only=True)
    inputs = torch.randn(2, 3, 16, 16)
    module.eval()
    torch.testing.assert_close(loaded.eval()(inputs), module(inputs))


def test_a_timm_model_starts_from_a_checkpoint_with_or_without_its_head(tmp_path):
    first = TimmClassifier("vit_tiny_patch16_224", 3, model_kwargs=VIT)
    save_tensors(tmp_path / "x.safetensors", first.state_dict())
    path = str(tmp_path / "x.safetensors")
    whole = TimmClassifier("vit_tiny_patch16_224", 3, checkpoint=path, model_kwargs=VIT)
    fresh = TimmClassifier(
        "vit_tiny_patch16_224", 5, checkpoint=path, head="fresh", model_kwargs=VIT
    )
    assert torch.equal(whole.model.head.weight, first.model.head.weight)
    assert torch.equal(fresh.model.pos_embed, first.model.pos_embed)
    assert fresh.model.head.weight.shape == (5, 8)
    assert {"checkpoint", "pretrained", "head"}.isdisjoint(whole.hparams)
    with pytest.raises(InputError, match=r'head.* must have the shape.*use head: "fresh"'):
        TimmClassifier("vit_tiny_patch16_224", 5, checkpoint=path, model_kwargs=VIT)


def test_an_unknown_timm_model_is_named_with_near_ones():
    with pytest.raises(InputError, match=r"model_name: must be a model of timm.*vit_tiny_patch16"):
        TimmClassifier("vit_tiny_patch16_225", 3)


def test_a_transformers_model_is_made_and_loaded_where_its_folder_is_gone(tmp_path, bert):
    module = TransformersClassifier(bert, 3)
    assert all(one.training for one in module.modules())
    module.eval()
    inputs = padded_texts((3, 7))
    torch.testing.assert_close(module(inputs), tiny_bert()(**inputs).logits)
    trainer = tiny_trainer(tmp_path, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)
    state["hyper_parameters"]["model"] = "/no/where"
    torch.save(state, tmp_path / "x.ckpt")
    loaded = TransformersClassifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    torch.testing.assert_close(loaded.eval()(inputs), module(inputs))


def test_a_transformers_model_with_other_classes_starts_from_an_expert(tmp_path, bert):
    expert = TransformersClassifier(bert, 3)
    save_tensors(tmp_path / "x.safetensors", expert.state_dict())
    module = TransformersClassifier(bert, 2, str(tmp_path / "x.safetensors"), head="fresh")
    assert torch.equal(module.model.bert.pooler.dense.weight, expert.model.bert.pooler.dense.weight)
    assert module(padded_texts((4,))).shape == (1, 2)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(InputError, match="model: must be the folder of a transformers model"):
        TransformersClassifier(str(tmp_path), 2)


def test_a_head_that_is_not_known_cannot_be_left_out(tmp_path):
    from lit_merge.tasks.classification import start_from

    layer = nn.Linear(2, 2)
    save_tensors(tmp_path / "x.safetensors", layer.state_dict())
    with pytest.raises(InputError, match='head: "fresh" needs a network whose head is known'):
        start_from(layer, str(tmp_path / "x.safetensors"), head="fresh")


def test_probabilities_are_predicted(tmp_path):
    module = ClassificationModule(network(), 3)
    inputs, labels = examples(5).tensors
    probabilities = module.predict_step((inputs, labels), 0)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(5))


def test_modules_are_configured_by_yaml(tmp_path):
    parser = ArgumentParser()
    parser.add_argument("--model", type=ClassificationModule)
    config = tmp_path / "model.yaml"
    config.write_text(
        """
model:
  class_path: TimmClassifier
  init_args:
    model_name: vit_tiny_patch16_224
    num_classes: 3
    lr: 0.01
    model_kwargs: {img_size: 16, patch_size: 8, depth: 1, embed_dim: 8, num_heads: 2}
"""
    )
    module = parser.instantiate_classes(parser.parse_path(config)).model
    assert isinstance(module, TimmClassifier)
    assert module.lr == 0.01


def test_an_output_that_is_no_logits_is_refused():
    with pytest.raises(InputError, match=r"output of Flatten must be logits .* got \(2,\)"):
        read_logits(nn.Flatten(0), torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes: must be at least 2; got 1"),
        ({"lr": 0.0}, "lr: must be positive and finite; got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay: must be at least 0; got -0.1"),
        ({"warmup": 1.0}, r"warmup: must be in \[0, 1\); got 1.0"),
        ({"label_smoothing": -1.0}, r"label_smoothing: must be in \[0, 1\); got -1.0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(InputError, match=message):
        ClassificationModule(network(), **{"num_classes": 3} | options)
