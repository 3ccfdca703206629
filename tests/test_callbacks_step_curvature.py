from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lit_merge.callbacks import DiagonalHessian
from lit_merge.curvature import adam_second_moment
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from tests.tiny_fits import (
    MICRO,
    NUM_EXAMPLES,
    QUIET,
    StatefulBatches,
    Still,
    TinyClassifier,
    assert_same,
    examples,
    hessian_in,
    in_order,
    loader,
    squared,
    still,
    tiny_classifier,
    tiny_trainer,
)

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def mean_gradient(module: nn.Module, indices: Sequence[int]) -> dict[str, Tensor]:
    inputs, labels = examples().tensors
    chosen = torch.tensor(list(indices))
    value = cross_entropy(module(inputs[chosen]), labels[chosen])
    parameters = dict(module.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))


def from_windows(module: nn.Module, windows: Sequence[Sequence[range]]) -> dict[str, Tensor]:
    """Return Σ over windows of (B · mean over micro-batches of their mean gradient)²."""
    sums = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for window in windows:
        size = sum(map(len, window))
        gradients = [mean_gradient(module, micro) for micro in window]
        for name in sums:
            mean = sum(g[name] for g in gradients) / len(window)
            sums[name] += (size * mean) ** 2
    return sums


def test_each_step_gives_its_squared_sum_of_gradients(tmp_path) -> None:
    module = still()
    tiny_trainer(tmp_path, squared()).fit(module, in_order())
    assert_same(hessian_in(tmp_path), from_windows(module, [[micro] for micro in MICRO]))
    info = open_expert(tmp_path).info
    assert (info.estimator, info.labels) == ("squared-batch-gradient", "observed")
    assert info.num_examples == NUM_EXAMPLES
    curvature = info.details["curvature"]
    assert curvature["num_seen"] == 2 * NUM_EXAMPLES
    assert curvature["num_steps"] == [16]


def test_accumulated_windows_are_steps_and_the_shorter_last_one_too(tmp_path) -> None:
    module = still()
    tiny_trainer(tmp_path, squared(), accumulate_grad_batches=3).fit(module, in_order())
    assert_same(hessian_in(tmp_path), from_windows(module, [MICRO[:3], MICRO[3:6], MICRO[6:]]))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_micro_batch_without_loss_does_not_count(tmp_path) -> None:
    class Skipping(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    module = Skipping()
    tiny_trainer(tmp_path, squared(), accumulate_grad_batches=2, max_epochs=1).fit(
        module, in_order()
    )
    windows = [[MICRO[0]], MICRO[2:4], MICRO[4:6], MICRO[6:]]
    seen = NUM_EXAMPLES - 8
    expected = {
        name: value * (NUM_EXAMPLES / seen) for name, value in from_windows(module, windows).items()
    }
    assert_same(hessian_in(tmp_path), expected)
    assert open_expert(tmp_path).info.details["curvature"]["num_seen"] == seen


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_comes_after(tmp_path, algorithm: str) -> None:
    module = still()
    tiny_trainer(
        tmp_path, squared(), gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm
    ).fit(module, in_order())
    assert_same(hessian_in(tmp_path), from_windows(module, [[micro] for micro in MICRO]))


def test_each_of_several_optimizers_counts_its_own_parameters(tmp_path) -> None:
    class Two(TinyClassifier):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            value = cross_entropy(self(batch[0]), batch[1])
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(value)
            first.step()
            if batch_idx % 2 == 1:  # sees the gradient of this batch only
                second.step()

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(part.parameters(), lr=0.0)
                for part in (self.model.body, self.model.head)
            ]

    torch.manual_seed(0)
    module = Two()
    tiny_trainer(tmp_path, squared()).fit(module, in_order())
    every = from_windows(module, [[micro] for micro in MICRO])
    found = hessian_in(tmp_path)
    for name in ("model.body.weight", "model.body.bias"):
        torch.testing.assert_close(found[name], every[name])
    expected = torch.zeros_like(found["model.head.weight"])
    for first, second in zip(MICRO[::2], MICRO[1::2], strict=True):
        size = len(first) + len(second)
        expected += (size * mean_gradient(module, second)["model.head.weight"]) ** 2
    torch.testing.assert_close(found["model.head.weight"], expected)


@pytest.mark.parametrize("fused", [False, True])
def test_the_scalers_factor_is_taken_out(tmp_path, fused: bool) -> None:
    module = still(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    tiny_trainer(tmp_path, squared(), plugins=[plugin]).fit(module, in_order())
    assert scaler.get_scale() == 1024.0
    expected = from_windows(module, [[micro] for micro in MICRO])
    assert_same(hessian_in(tmp_path), expected, tolerance=0.03)


def test_steps_that_the_scaler_skips_do_not_count(tmp_path) -> None:
    module = still()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # overflows until it is small enough
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    tiny_trainer(tmp_path, squared(), plugins=[plugin], max_epochs=8).fit(module, in_order())
    curvature = open_expert(tmp_path).info.details["curvature"]
    assert curvature["skipped_steps"] > 0
    expected = from_windows(module, [[micro] for micro in MICRO])
    assert_same(hessian_in(tmp_path), expected, tolerance=0.2)


def test_no_finite_step_at_all_is_an_error(tmp_path) -> None:
    plugin = MixedPrecision(
        "16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**60)
    )
    trainer = tiny_trainer(tmp_path, squared(), plugins=[plugin], max_epochs=1)
    with pytest.raises(InputError, match=r"must have been finite in at least one step; got 8"):
        trainer.fit(still(), in_order())
    assert not (tmp_path / "expert").exists()


def test_a_parameter_without_gradient_has_none(tmp_path) -> None:
    class Unused(Still):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)

    for estimator in ("squared-batch-gradient", "adam"):
        folder = tmp_path / estimator
        module = Unused() if estimator != "adam" else UnusedAdam()
        tiny_trainer(folder, DiagonalHessian(estimator=estimator)).fit(module, loader())
        assert not hessian_in(folder)["unused.weight"].any()
        curvature = open_expert(folder).info.details["curvature"]
        assert curvature["unused"] == ["unused.weight", "unused.bias"]


class UnusedAdam(TinyClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


def test_adams_moment_is_scaled_by_examples_and_step_size(tmp_path) -> None:
    module = tiny_classifier()
    trainer = tiny_trainer(tmp_path, DiagonalHessian(estimator="adam"), accumulate_grad_batches=2)
    data = DataLoader(TensorDataset(*(t[:48] for t in examples().tensors)), batch_size=8)
    trainer.fit(module, data)
    names = {parameter: name for name, parameter in module.named_parameters()}
    expected = adam_second_moment(trainer.optimizers[0], names, num_examples=48, batch_size=16)
    assert_same(hessian_in(tmp_path), expected)
    info = open_expert(tmp_path).info
    assert (info.estimator, info.num_examples) == ("adam", 48)


def test_steps_of_unequal_size_have_their_harmonic_mean(tmp_path) -> None:
    module = tiny_classifier()
    trainer = tiny_trainer(tmp_path, DiagonalHessian(estimator="adam"))
    trainer.fit(module, in_order())
    names = {parameter: name for name, parameter in module.named_parameters()}
    size = 8 / (7 / 8 + 1 / 5)
    expected = adam_second_moment(
        trainer.optimizers[0], names, num_examples=NUM_EXAMPLES, batch_size=1
    )
    assert_same(hessian_in(tmp_path), {name: size * value for name, value in expected.items()})


def test_adam_needs_an_adam_optimizer(tmp_path) -> None:
    module = still()
    with pytest.raises(InputError, match=r'than "adam" without an Adam optimizer.*got SGD'):
        tiny_trainer(tmp_path, DiagonalHessian(estimator="adam")).fit(module, loader())
    assert module.trainer.global_step == 0

    class NoMoment(TinyClassifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adamax(self.parameters(), lr=0.01)

    module = NoMoment()
    with pytest.raises(InputError, match=r"keeps no second moment; got Adamax"):
        tiny_trainer(tmp_path, DiagonalHessian(estimator="adam")).fit(module, loader())
    assert module.trainer.global_step == 1


def test_adam_warns_of_clipping(tmp_path) -> None:
    trainer = tiny_trainer(tmp_path, DiagonalHessian(estimator="adam"), gradient_clip_val=0.1)
    with pytest.warns(UserWarning, match=r"Adam's second moment is of clipped gradients"):
        trainer.fit(tiny_classifier(), loader())


def test_manual_optimization_needs_no_curvature_loss_from_steps(tmp_path) -> None:
    class Manual(TinyClassifier):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
            optimizer.step()  # a second step on the same batch is not counted

    tiny_trainer(tmp_path, squared()).fit(Manual(), loader())
    assert open_expert(tmp_path).info.details["curvature"]["num_steps"] == [16]


def test_layers_that_are_unfrozen_later_are_followed(tmp_path) -> None:
    class Unfreezing(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.model.body.requires_grad_(False)

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.model.body.weight.requires_grad_(trainer.current_epoch == 1)

    tiny_trainer(tmp_path, Unfreezing(), squared()).fit(tiny_classifier(), loader())
    found = hessian_in(tmp_path)
    assert "model.body.bias" not in found
    assert found["model.body.weight"].any()
    assert open_expert(tmp_path).info.frozen_parameters == ("model.body.bias",)


def test_a_strategy_that_hides_gradients_is_refused(tmp_path) -> None:
    trainer = tiny_trainer(tmp_path, squared())

    class Hiding(type(trainer.strategy)):
        handles_gradient_accumulation = True

    trainer.strategy.__class__ = Hiding
    with pytest.raises(InputError, match=r'must be "exact" with Hiding'):
        trainer.fit(tiny_classifier(), loader())


def test_a_stream_has_as_many_examples_as_an_epoch_shows(tmp_path) -> None:
    tiny_trainer(tmp_path, squared()).fit(tiny_classifier(), StatefulBatches())
    assert open_expert(tmp_path).info.num_examples == NUM_EXAMPLES


@pytest.mark.distributed
@pytest.mark.parametrize("estimator", ["squared-batch-gradient", "adam"])
def test_two_processes_count_what_one_counts_with_twice_the_batch(tmp_path, estimator) -> None:
    data = DataLoader(TensorDataset(*(t[:48] for t in examples().tensors)), batch_size=8)
    double = DataLoader(data.dataset, batch_size=16)
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    for folder, batches, settings in (
        (alone, double, {}),
        (shared, data, {"devices": 2, "strategy": "ddp_fork"}),
    ):
        callback = DiagonalHessian(estimator=estimator)
        saving = ModelCheckpoint(dirpath=folder, every_n_train_steps=2)
        module = tiny_classifier()
        trainer = tiny_trainer(folder, callback, saving, overfit_batches=1.0, **settings)
        trainer.fit(module, batches)
    found, expected = hessian_in(shared), hessian_in(alone)
    assert_same(found, expected, tolerance=1e-4)
    a, b = (open_expert(folder).info.details["curvature"] for folder in (alone, shared))
    assert a == b
