"""The curvature under half precision, scaled losses and fused optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lit_merge.callbacks import DiagonalHessian
from lit_merge.curvature import PerExampleFisher, SquaredBatchGradient
from lit_merge.expert import open_expert
from tests.references import squared_gradients_by_loop
from tests.tiny_fits import (
    NUM_EXAMPLES,
    QUIET,
    TinyClassifier,
    assert_same,
    by_loop,
    cross_entropy_of,
    examples,
    fit,
    hessian_in,
    in_order,
    squared,
)
from tests.tiny_models import images, tiny_conv_net, tiny_vit

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

BFLOAT16 = 0.04  # relative error that 8 bits of mantissa explain, in the norm of a tensor
FLOAT16 = 0.01


def sixteen(**settings: Any) -> list[MixedPrecision]:
    """Return precision 16-mixed on a CPU; the scaler's settings."""
    return [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", **settings))]


class AdamWFit(TinyClassifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, **self.options)


def adamw(**options: Any) -> AdamWFit:
    torch.manual_seed(0)
    return AdamWFit(lr=0.01, **options)


class Recorder(Callback):
    """Keeps each step's weights and batches, and whether the step was made."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Tensor], list[Any]]] = []
        self._window: list[Any] = []
        self._pending: dict[str, Tensor] | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        self._window.append(batch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._pending = copy.deepcopy(pl_module.state_dict())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *others: Any) -> None:
        if self._pending is None:
            return
        moved = any(
            not torch.equal(value, self._pending[name])
            for name, value in pl_module.state_dict().items()
        )
        if moved:
            self.steps.append((self._pending, self._window))
        self._pending, self._window = None, []

    def sums_of_gradients(self) -> list[tuple[int, dict[str, Tensor]]]:
        """Return B and B·ḡ of every step made, in float64: B times the mean of micro-batches."""
        result = []
        for state, window in self.steps:
            model = TinyClassifier().double()
            model.load_state_dict(state)
            losses = [cross_entropy(model(x.double()), y) for x, y in window]
            torch.stack(losses).mean().backward()
            size = sum(len(y) for _, y in window)
            gradients = {name: size * p.grad for name, p in model.named_parameters()}
            result.append((size, gradients))
        return result


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare each tensor in its norm: rounding is random, a wrong factor is not."""
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert value.any(), name
        error = float((found[name].double() - value).norm() / value.norm())
        assert error < tolerance, (name, error)


class TestThePass:
    @pytest.mark.parametrize("build", [tiny_vit, tiny_conv_net])
    @pytest.mark.parametrize("way", ["autocast", "weights"])
    def test_bfloat16_gives_the_squares_up_to_its_rounding(
        self, build: Callable[[], nn.Module], way: str
    ) -> None:
        model = build()
        inputs = images(6, channels=1 if build is tiny_conv_net else 3)
        if way == "weights":
            model, inputs = model.bfloat16(), inputs.bfloat16()
        batch = inputs, torch.arange(6) % 3

        def loss(net: nn.Module, pair: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
                return cross_entropy_of(net, pair)

        fisher = PerExampleFisher(model, loss, labels="observed")
        fisher.update(batch)
        expected = squared_gradients_by_loop(model, [batch], cross_entropy_of)
        found = fisher.sums()
        assert {value.dtype for value in found.values()} == {torch.float32}
        zero = {name for name, value in expected.items() if value.max() < 1e-20}
        largest = max(float(value.max()) for value in expected.values())
        for name in zero:
            assert found[name].max() < 1e-3 * largest
        kept = expected.keys() - zero
        assert_near({n: found[n] for n in kept}, {n: expected[n] for n in kept}, 4 * BFLOAT16)

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
    def test_after_a_bfloat16_fit(self, tmp_path, precision: str) -> None:
        module = fit(
            tmp_path, DiagonalHessian(labels="observed"), module=adamw(), precision=precision
        )
        expected = squared_gradients_by_loop(
            copy_without_trainer(module), [examples()[:]], cross_entropy_of
        )
        assert_near(hessian_in(tmp_path), expected, BFLOAT16)
        assert open_expert(tmp_path).info.details["curvature"]["precision"] == precision

    @pytest.mark.parametrize("fused", [False, True])
    def test_after_a_float16_fit_with_a_scaler_it_is_that_of_float32(self, tmp_path, fused) -> None:
        module = fit(
            tmp_path,
            DiagonalHessian(labels="observed"),
            module=adamw(fused=fused),
            plugins=sixteen(init_scale=2.0**16),
        )
        assert_same(hessian_in(tmp_path), by_loop(module), tolerance=1e-4)

    def test_the_scalers_state_is_not_touched(self, tmp_path) -> None:
        plugins = sixteen(init_scale=1024.0, growth_interval=1000)
        fit(tmp_path, DiagonalHessian(labels="observed"), module=adamw(), plugins=plugins)
        assert plugins[0].scaler.get_scale() == 1024.0


class TestSquaredSteps:
    @pytest.mark.parametrize("accumulate", [1, 3])
    @pytest.mark.parametrize(
        ("settings", "options", "tolerance"),
        [
            ({"precision": "bf16-mixed"}, {"fused": True}, BFLOAT16),
            ({"precision": "bf16-true"}, {"fused": True}, BFLOAT16),
            ({"scale": 2.0**12}, {"fused": True}, FLOAT16),
            ({"scale": 2.0**12}, {"foreach": True}, FLOAT16),
        ],
    )
    def test_they_are_those_of_unscaled_gradients_while_the_weights_move(
        self, tmp_path, settings: dict[str, Any], options: Any, tolerance: float, accumulate: int
    ) -> None:
        settings = dict(settings)
        if "scale" in settings:
            settings["plugins"] = sixteen(init_scale=settings.pop("scale"))
        recorder = Recorder()
        fit(
            tmp_path,
            squared(),
            recorder,
            module=adamw(**options),
            data=in_order(),
            accumulate_grad_batches=accumulate,
            **settings,
        )
        assert len(recorder.steps) == 2 * -(-8 // accumulate)
        assert_near(hessian_in(tmp_path), scaled_sum_of_squares(recorder), tolerance)

    def test_a_fused_optimizers_overflowing_steps_are_left_out(self, tmp_path) -> None:
        recorder = Recorder()
        fit(
            tmp_path,
            squared(),
            recorder,
            module=adamw(fused=True),
            data=in_order(),
            plugins=sixteen(init_scale=2.0**24),
            max_epochs=4,
        )
        curvature = open_expert(tmp_path).info.details["curvature"]
        made = len(recorder.steps)
        assert 0 < made < 32
        assert curvature["skipped_steps"] == 32 - made
        assert_near(hessian_in(tmp_path), scaled_sum_of_squares(recorder), FLOAT16)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_gradients_are_squared_in_float32(self, dtype: torch.dtype) -> None:
        estimator = SquaredBatchGradient()
        small = torch.full((3,), 2.0**-13, dtype=dtype)  # its square underflows in float16
        for _ in range(1000):  # in bfloat16 the sum would stand still at 256 terms
            estimator.update({"w": small}, num_examples=2)
        expected = torch.full((3,), 1000 * 4 * 2.0**-26)
        torch.testing.assert_close(estimator.sums()["w"], expected)


class TestAdamsMoment:
    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("scale", [2.0**8, 2.0**24])
    def test_it_is_of_the_unscaled_gradients_of_the_steps_made(
        self, tmp_path, fused: bool, scale: float
    ) -> None:
        recorder = Recorder()
        data = DataLoader(TensorDataset(*examples(48).tensors), batch_size=8)
        fit(
            tmp_path,
            DiagonalHessian(estimator="adam"),
            recorder,
            module=adamw(fused=fused),
            data=data,
            plugins=sixteen(init_scale=scale),
            max_epochs=6,
        )
        made = len(recorder.steps)
        assert (made < 36) == (scale == 2.0**24)
        beta, moments = 0.999, running_means(recorder, 0.999)
        factor = 48 * 8 / (1 - beta**made)
        expected = {name: factor * value for name, value in moments.items()}
        assert_near(hessian_in(tmp_path), expected, FLOAT16)


def copy_without_trainer(module: nn.Module) -> nn.Module:
    detached = TinyClassifier().double()
    detached.load_state_dict(module.state_dict())
    return detached


def scaled_sum_of_squares(recorder: Recorder) -> dict[str, Tensor]:
    """Return Σ over the steps made of (B ḡ)², brought to one epoch's number of examples."""
    steps = recorder.sums_of_gradients()
    seen = sum(size for size, _ in steps)
    return sum_of([g for _, g in steps], [NUM_EXAMPLES / seen] * len(steps))


def running_means(recorder: Recorder, beta: float) -> dict[str, Tensor]:
    """Return Adam's second moment of ḡ, not corrected for its beginning at zero."""
    steps = recorder.sums_of_gradients()
    last = len(steps) - 1
    weights = [(1 - beta) * beta ** (last - i) / size**2 for i, (size, _) in enumerate(steps)]
    return sum_of([g for _, g in steps], weights)


def sum_of(gradients: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted sum of squares."""
    return {
        name: torch.stack(
            [weight * g[name] ** 2 for g, weight in zip(gradients, weights, strict=True)]
        ).sum(0)
        for name in gradients[0]
    }
