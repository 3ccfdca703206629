"""The learning rate over a fit."""

from __future__ import annotations

import math

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.tasks import ClassificationModule, DatasetTask, TaskDataModule
from lit_merge.tasks.schedule import cosine_factor
from tests.tiny_fits import QUIET, examples, tiny_trainer

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def test_the_cosine_goes_from_one_to_zero():
    factors = [cosine_factor(step, 10) for step in range(11)]
    assert factors == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 10)) for s in range(11)])


def test_the_warm_up_rises_in_equal_steps_to_one():
    factors = [cosine_factor(step, 10, warmup=0.4) for step in range(5)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert cosine_factor(10, 10, warmup=0.4) == pytest.approx(0.0)


def test_steps_after_the_last_stay_at_zero():
    assert cosine_factor(99, 10) == pytest.approx(0.0)


def test_a_fit_without_an_end_is_refused(tmp_path):
    module = ClassificationModule(torch.nn.Linear(4, 3), 3)
    trainer = tiny_trainer(tmp_path, max_epochs=-1, max_steps=-1, enable_checkpointing=False)
    data = TaskDataModule(DatasetTask(examples(8), num_classes=3))
    with pytest.raises(InputError, match="max_epochs: must be set, or max_steps"):
        trainer.fit(module, train_dataloaders=data.train_dataloader())
