from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lit_merge.callbacks import ActivationStatistics
from lit_merge.correction.statistics import ChannelStatistics, from_tensors
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from tests.tiny_fits import NUM_EXAMPLES, QUIET, examples, loader, tiny_classifier, tiny_trainer

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def statistics_in(folder: Path) -> dict[str, ChannelStatistics]:
    expert = open_expert(folder)
    assert expert.activations is not None
    return from_tensors({name: expert.activations.tensor(name) for name in expert.activations})


def test_statistics_are_those_of_the_trained_weights_over_all_examples(tmp_path) -> None:
    module = tiny_classifier()
    callback = ActivationStatistics(max_examples=None, batch_size=7, task="clouds")
    tiny_trainer(tmp_path, callback).fit(module, loader())
    inputs, _ = examples().tensors
    outputs = module.model.body(inputs).double()
    found = statistics_in(tmp_path / "expert")
    assert list(found) == ["model.body"]  # not the head
    assert found["model.body"].count == NUM_EXAMPLES
    torch.testing.assert_close(found["model.body"].mean, outputs.mean(0))
    torch.testing.assert_close(found["model.body"].variance, outputs.var(0, unbiased=False))
    info = open_expert(tmp_path / "expert").info
    assert (info.task, info.estimator) == ("clouds", None)
    assert info.head_parameters == ("model.head.weight", "model.head.bias")


def test_a_subset_of_the_examples_is_enough(tmp_path) -> None:
    tiny_trainer(tmp_path, ActivationStatistics(max_examples=10)).fit(tiny_classifier(), loader())
    assert statistics_in(tmp_path / "expert")["model.body"].count == 10


def test_training_is_the_same_with_and_without(tmp_path) -> None:
    plain, watched = tiny_classifier(), tiny_classifier()
    torch.manual_seed(3)
    tiny_trainer(tmp_path / "plain").fit(plain, loader(generator=None))
    torch.manual_seed(3)
    tiny_trainer(tmp_path / "watched", ActivationStatistics()).fit(watched, loader(generator=None))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name])


def test_unknown_sites_are_refused_before_training(tmp_path) -> None:
    module = tiny_classifier()
    trainer = tiny_trainer(tmp_path, ActivationStatistics(sites="model.boddy"))
    with pytest.raises(InputError, match=r"'model.boddy'.*model\.body"):
        trainer.fit(module, loader())
    assert trainer.global_step == 0
    assert not (tmp_path / "expert").exists()


def test_activations_that_are_not_finite_leave_nothing_behind(tmp_path) -> None:
    inputs, labels = examples().tensors
    inputs[40, 0] = float("nan")
    callback = ActivationStatistics(max_examples=None)
    module = tiny_classifier(lr=0.0)
    with pytest.raises(InputError, match=r"site 'model.body': activations must be finite"):
        tiny_trainer(tmp_path, callback).fit(
            module, DataLoader(TensorDataset(inputs, labels), batch_size=8)
        )
    assert list(tmp_path.glob("*expert*")) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_examples": 0}, r"max_examples: must be a positive integer.*got 0"),
        ({"weights": "ema"}, r"weights: must be one of last, best; got 'ema'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ActivationStatistics(**settings)


@pytest.mark.distributed
def test_two_processes_gather_what_one_gathers(tmp_path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    settings: dict[str, Any] = {"lr": 0.0}
    for folder, trainer in (
        (alone, {"devices": 1}),
        (shared, {"devices": 2, "strategy": "ddp_fork"}),
    ):
        callback = ActivationStatistics(max_examples=None)
        tiny_trainer(folder, callback, max_epochs=1, **trainer).fit(
            tiny_classifier(**settings), loader()
        )
    one, two = (statistics_in(folder / "expert")["model.body"] for folder in (alone, shared))
    assert one.count == two.count == NUM_EXAMPLES
    torch.testing.assert_close(one.mean, two.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.m2, two.m2, rtol=1e-6, atol=1e-6)
