from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassPrecision,
    MulticlassRecall,
)

from lit_merge.callbacks.training_loss import TrainingLoss, without_trace
from lit_merge.errors import InputError
from tests.tiny_fits import TinyClassifier, examples, tiny_classifier, tiny_trainer

BATCH = examples()[:8]


@pytest.fixture
def trainer(tmp_path) -> pl.Trainer:
    return tiny_trainer(tmp_path)


def attached(module: pl.LightningModule, trainer: pl.Trainer) -> pl.LightningModule:
    trainer.strategy.connect(module)
    module.trainer = trainer
    return module


def expected(module: TinyClassifier) -> Tensor:
    return cross_entropy(module(BATCH[0]), BATCH[1])


def test_the_loss_is_what_training_step_returns(trainer) -> None:
    module = attached(tiny_classifier(), trainer)
    assert torch.equal(TrainingLoss(trainer, module)(module, BATCH), expected(module))


def test_the_loss_may_come_in_a_dict_and_the_step_without_index(trainer) -> None:
    class Step(TinyClassifier):
        def training_step(self, batch: Any) -> Any:
            return {"loss": cross_entropy(self(batch[0]), batch[1]), "other": 3}

    module = attached(Step(), trainer)
    assert torch.equal(TrainingLoss(trainer, module)(module, BATCH), expected(module))


def test_curvature_loss_goes_before_training_step(trainer) -> None:
    class Manual(TinyClassifier):
        automatic_optimization = False

        def curvature_loss(self, batch: Any) -> Tensor:
            return 2 * cross_entropy(self(batch[0]), batch[1])

    module = attached(Manual(), trainer)
    assert torch.equal(TrainingLoss(trainer, module)(module, BATCH), 2 * expected(module))


def test_manual_optimization_needs_a_curvature_loss(trainer) -> None:
    module = tiny_classifier()
    module.automatic_optimization = False
    with pytest.raises(InputError, match=r"got manual optimization.*curvature_loss\(self, batch\)"):
        TrainingLoss(trainer, module)


def test_a_step_over_the_iterator_needs_a_curvature_loss(trainer) -> None:
    class Step(TinyClassifier):
        def training_step(self, dataloader_iter: Any) -> Any:
            return None

    with pytest.raises(InputError, match=r"got a step that takes dataloader_iter"):
        TrainingLoss(trainer, Step())


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, r"TinyStep.training_step: must return the mean loss.*got NoneType"),
        ({"x": 1}, r"under 'loss'; got NoneType"),
        (torch.ones(3), r"must return one number.*got shape \(3,\)"),
    ],
)
def test_a_step_without_a_mean_loss_is_refused(trainer, output: Any, message: str) -> None:
    class TinyStep(TinyClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return output

    module = attached(TinyStep(), trainer)
    with pytest.raises(InputError, match=message):
        TrainingLoss(trainer, module)(module, BATCH)


def test_logging_is_silent_and_comes_back(tmp_path) -> None:
    class Inner(pl.LightningModule):
        def forward(self, x: Tensor) -> Tensor:
            self.log_dict({"inner": x.mean()})
            return x

    class Loud(TinyClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.logger.experiment.add_image("first", 1)  # CSVLogger cannot
            self.logger.log_metrics({"a": 1.0}, step=0)
            self.log("rows", float(batch_idx))
            return super().training_step((self.inner(batch[0]), batch[1]), batch_idx)

    logger = CSVLogger(tmp_path)
    trainer = tiny_trainer(tmp_path, logger=logger)
    module = attached(Loud(), trainer)
    TrainingLoss(trainer, module)(module, BATCH)
    assert trainer.loggers == [logger]
    assert "log" not in vars(module)
    assert "log_dict" not in vars(module.inner)
    module.log = "user's own"
    TrainingLoss(trainer, module)(module, BATCH)
    assert module.log == "user's own"


def test_metrics_keep_their_states(trainer) -> None:
    class Measured(TinyClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.single = MulticlassAccuracy(3, dist_sync_on_step=True)
            self.listed = MulticlassAUROC(3, thresholds=None)
            self.several = MetricCollection(
                {"precision": MulticlassPrecision(3), "recall": MulticlassRecall(3)}
            )

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch[0])
            self.single(logits, batch[1])
            self.listed.update(logits, batch[1])
            self.several.update(logits, batch[1])
            return cross_entropy(logits, batch[1])

    module = attached(Measured(), trainer)
    loss = TrainingLoss(trainer, module)
    loss(module, BATCH)
    assert not module.single.update_called
    assert len(module.listed.metric_state["preds"]) == 0
    assert not module.several["recall"].update_called
    other = examples(20, seed=4)[:20]
    module.training_step(other, 0)
    before = [m.compute() for m in (module.single, module.listed, module.several)]
    loss(module, BATCH)
    assert module.single.dist_sync_on_step
    module.single._computed = module.listed._computed = None
    after = [m.compute() for m in (module.single, module.listed, module.several)]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    reference = Measured()
    reference.model = module.model
    reference.training_step(other, 0)
    reference.training_step(BATCH, 0)
    module.training_step(BATCH, 0)
    torch.testing.assert_close(module.several.compute(), reference.several.compute())


class Types(TinyClassifier):
    """Remembers the type in which its last layer computed."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.seen = logits.dtype
        return cross_entropy(logits, batch[1])


def test_bf16_runs_as_in_training_and_fp16_in_full_precision(tmp_path) -> None:
    for precision, dtype in (("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float32)):
        scaler = torch.amp.GradScaler("cpu") if precision == "16-mixed" else None
        plugin = MixedPrecision(precision, "cpu", scaler=scaler)
        trainer = tiny_trainer(tmp_path, plugins=[plugin])
        module = attached(Types(), trainer)
        with plugin.forward_context():  # as inside of a step
            TrainingLoss(trainer, module)(module, BATCH)
        assert module.seen == dtype


def test_measuring_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    torch.manual_seed(0)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    following = torch.get_rng_state()
    with without_trace(model, seed=1):
        model(torch.randn(5, 4))
        first = torch.rand(2)
    with without_trace(model, seed=1):
        model(torch.randn(5, 4))
        second = torch.rand(2)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), following)
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name])


def test_compiled_code_is_passed_over_while_measuring() -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    model = torch.compile(nn.Linear(2, 2), backend=backend)
    with without_trace(model, seed=0):
        model(torch.ones(1, 2))
    assert compiled == []
    model(torch.ones(1, 2))
    assert len(compiled) == 1
