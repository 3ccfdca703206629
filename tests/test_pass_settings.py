"""The settings of a pass reach the estimator, through the callback and on a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lit_merge.callbacks import DiagonalHessian
from lit_merge.callbacks.pass_settings import PassSettings, default_labels
from lit_merge.checkpoint import load_into
from lit_merge.checkpoint_curvature import curvature_of_checkpoint
from lit_merge.curvature import diagonal_hessian
from lit_merge.curvature.hutchinson import HessianDiagonal
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from lit_merge.passes.data_pass import data_pass
from tests.tiny_fits import (
    QUIET,
    TinyClassifier,
    assert_same,
    cross_entropy_of,
    examples,
    fit,
    hessian_in,
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
    folder = tmp_path_factory.mktemp("run")
    saving = ModelCheckpoint(dirpath=folder, filename="tiny")
    tiny_trainer(folder, saving).fit(tiny_classifier(), loader())
    return folder / "tiny.ckpt"


def measure(folder: Path, checkpoint: Path, **settings: Any) -> Path:
    trainer = settings.pop("trainer", {})
    return curvature_of_checkpoint(
        tiny_trainer(folder, **trainer),
        WithData(),
        checkpoint=checkpoint,
        **{"output": folder / "expert", **settings},
    )


def trained(checkpoint: Path) -> nn.Module:
    module = tiny_classifier()
    load_into(module, torch.load(checkpoint, weights_only=True)["state_dict"])
    return module


@pytest.mark.parametrize("settings", [{"labels": "expected"}, {"samples": 3}, {"reduction": "sum"}])
def test_the_settings_are_those_of_the_plain_function(tmp_path, run, settings: Any) -> None:
    folder = measure(tmp_path, run, seed=2, **settings)
    plain = diagonal_hessian(trained(run), [examples()[:]], cross_entropy_of, seed=2, **settings)
    assert_same(hessian_in(folder), plain)
    info = open_expert(folder).info
    assert info.labels == settings.get("labels", "sampled")
    details = info.details["curvature"]
    assert details["samples"] == settings.get("samples", 1)
    assert details["reduction"] == settings.get("reduction", "loss")


def test_the_callback_takes_them_as_well(tmp_path) -> None:
    module = fit(tmp_path, DiagonalHessian(labels="expected"))
    plain = diagonal_hessian(module, [examples()[:]], cross_entropy_of, labels="expected")
    assert_same(hessian_in(tmp_path), plain)
    assert open_expert(tmp_path).info.labels == "expected"


def hessian_by_autograd(module: nn.Module) -> dict[str, Tensor]:
    """Return the diagonal of the Hessian of the summed loss, in float64, column by column."""
    double = module.double()
    parameters = dict(double.named_parameters())
    inputs, labels = examples().tensors

    def loss(values: tuple[Tensor, ...]) -> Tensor:
        state = dict(zip(parameters, values, strict=True))
        output = torch.func.functional_call(double, state, (inputs.double(),))
        return torch.nn.functional.cross_entropy(output, labels, reduction="sum")

    hessians = torch.func.hessian(loss)(tuple(p.detach() for p in parameters.values()))
    return {
        name: hessians[i][i].reshape(p.numel(), p.numel()).diagonal().reshape(p.shape)
        for i, (name, p) in enumerate(parameters.items())
    }


def test_hutchinson_estimates_the_diagonal_of_the_hessian(tmp_path, run) -> None:
    folder = measure(tmp_path, run, estimator="hutchinson", samples=400, batch_size=31)
    info = open_expert(folder).info
    assert (info.estimator, info.labels) == ("hutchinson", "observed")
    assert 0 <= info.details["curvature"]["negative_share"] < 0.05
    assert info.details["curvature"]["quality"]["relative_error"] < 0.5
    measured, dense = hessian_in(folder), hessian_by_autograd(trained(run))
    found = torch.cat([measured[name].flatten() for name in dense])
    true = torch.cat([value.flatten() for value in dense.values()])
    assert bool((found >= 0).all())
    # The spread of 2 · 400 vectors; a sum over other examples or a mean would be far off.
    assert float((found - true).norm() / true.norm()) < 0.1


@pytest.mark.distributed
def test_negative_entries_are_left_out_after_the_ranks_are_added_up(tmp_path, run) -> None:
    """A rank alone has other negative entries than both together."""
    processes = {"devices": 2, "strategy": "ddp_fork"}
    settings: dict[str, Any] = {"estimator": "hutchinson", "batch_size": 8, "trainer": processes}
    folder = measure(tmp_path, run, **settings)
    raw = HessianDiagonal(trained(run), cross_entropy_of, negative="keep")
    for rank in range(2):
        for indices, batch in data_pass(loader(), rank=rank, world_size=2, batch_size=8):
            raw.update(batch, indices=indices)
    expected = {name: value.clamp(min=0) for name, value in raw.sums().items()}
    assert_same(hessian_in(folder), expected, tolerance=1e-4)
    share = open_expert(folder).info.details["curvature"]["negative_share"]
    assert share == pytest.approx(raw.negative_share, rel=1e-3)
    assert share > 0


def test_hutchinson_is_tried_out_before_training(tmp_path) -> None:
    class Never(TinyClassifier):
        def curvature_loss(self, batch: Any) -> Tensor:
            return self(batch[0]).detach().mean()

    with pytest.raises(InputError, match=r"loss: must depend on the trainable parameters"):
        fit(tmp_path, DiagonalHessian(estimator="hutchinson"), module=Never())


def test_hutchinson_of_a_fit_leaves_an_expert(tmp_path) -> None:
    fit(tmp_path, DiagonalHessian(estimator="hutchinson", samples=4))
    assert open_expert(tmp_path).info.estimator == "hutchinson"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "kfac"}, r"estimator: must be one of exact, hutchinson"),
        ({"labels": "guessed"}, r"labels: must be one of sampled, observed, expected"),
        ({"reduction": "max"}, r"reduction: must be one of loss, mean, sum"),
        ({"samples": 0}, r"samples: must be a positive integer"),
        ({"samples": 2, "labels": "expected"}, r"samples: must be 1 without labels .sampled."),
        ({"estimator": "hutchinson"}, r"labels: must be .observed. with estimator .hutchinson"),
    ],
)
def test_wrong_settings_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PassSettings(**settings)


def test_labels_have_a_default_per_estimator() -> None:
    assert default_labels("exact", None) == "sampled"
    assert default_labels("exact", "observed") == "observed"
    assert default_labels("hutchinson", None) == "observed"
