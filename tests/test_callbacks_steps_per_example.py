"""The exact diagonal beside training against a float64 loop over exactly the watched batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lit_merge.callbacks import DiagonalHessian
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
    by_loop,
    examples,
    hessian_in,
    in_order,
    loader,
    still,
    tiny_classifier,
    tiny_trainer,
)

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


@pytest.fixture(autouse=True)
def _nothing_listens_afterwards() -> Iterator[None]:
    yield
    assert _get_current_function_mode_stack() == []


def watching(**settings: Any) -> DiagonalHessian:
    return DiagonalHessian(estimator="exact-in-training", **{"last_part": 1.0, **settings})


def details(folder: Path) -> dict[str, Any]:
    return open_expert(folder).info.details["curvature"]


def of_batches(module: nn.Module, batches: list[int]) -> dict[str, Tensor]:
    """Return the sum over some micro-batches of an epoch, scaled to all examples."""
    seen = [index for number in batches for index in MICRO[number]]
    sums = [by_loop(module, MICRO[number]) for number in batches]
    scale = NUM_EXAMPLES / len(seen)
    return {name: scale * sum(own[name] for own in sums) for name in sums[0]}


@pytest.mark.parametrize(
    ("settings", "watched"),
    [
        ({"last_part": 0.1}, [6, 7]),  # 2 of 16 steps
        ({"last_part": 0.5, "every_n_batches": 3}, [0, 3, 6]),
        ({"every_n_batches": 5}, [0, 5, 2, 7]),  # counted on from epoch to epoch
    ],
)
def test_the_sums_are_over_exactly_the_watched_batches(tmp_path, settings, watched) -> None:
    module = still()
    tiny_trainer(tmp_path, watching(**settings)).fit(module, in_order())
    assert_same(hessian_in(tmp_path), of_batches(module, watched))
    info = open_expert(tmp_path).info
    assert (info.estimator, info.labels) == ("exact-in-training", "observed")
    assert info.num_examples == NUM_EXAMPLES
    own = {"every_n_batches": 1, **settings, "num_batches": len(watched)}
    own["num_seen"] = sum(len(MICRO[number]) for number in watched)
    assert {name: details(tmp_path)[name] for name in own} == own


@pytest.mark.parametrize(("last_part", "watched"), [(1.0, [*range(8)]), (0.1, [6, 7])])
def test_accumulation_counts_single_examples_also_in_the_short_last_window(
    tmp_path, last_part: float, watched: list[int]
) -> None:
    module = still()
    trainer = tiny_trainer(tmp_path, watching(last_part=last_part), accumulate_grad_batches=3)
    trainer.fit(module, in_order())
    assert_same(hessian_in(tmp_path), of_batches(module, watched))


class Noisy(TinyClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.model.gelu = nn.Sequential(nn.LayerNorm(6), nn.GELU(), nn.Dropout(0.2))


def test_training_is_the_same_but_for_rounding(tmp_path) -> None:
    modules = []
    for others in ((), (watching(every_n_batches=2),)):
        torch.manual_seed(0)
        module = Noisy()
        torch.manual_seed(1)
        folder = tmp_path / str(len(others))
        trainer = tiny_trainer(folder, *others, accumulate_grad_batches=3, gradient_clip_val=0.5)
        trainer.fit(module, loader(generator=None))
        modules.append(module)
    plain, watched = modules
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(watched.state_dict()[name], value, rtol=1e-6, atol=1e-6)
    assert watched.training
    assert all(parameter.requires_grad for parameter in watched.parameters())


class Remembering(Still):
    """Drops out, and keeps what chance said before each step."""

    def __init__(self) -> None:
        super().__init__()
        self.model.gelu = nn.Sequential(nn.GELU(), nn.Dropout(0.5))
        self.steps: list[tuple[Tensor, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(batch[0]) > 4:  # not what is tried out
            self.steps.append((torch.get_rng_state(), batch))
        return super().training_step(batch, batch_idx)


def test_the_gradients_are_those_of_the_activations_that_training_kept(tmp_path) -> None:
    torch.manual_seed(0)
    module = Remembering()
    tiny_trainer(tmp_path, watching(), max_epochs=1).fit(module, in_order())
    expected = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    module.train()
    for state, (inputs, labels) in module.steps[-len(MICRO) :]:
        torch.set_rng_state(state)
        losses = cross_entropy(module(inputs), labels, reduction="none")
        for loss in losses:
            found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
            for total, gradient in zip(expected.values(), found, strict=True):
                total += gradient.square()
    assert_same(hessian_in(tmp_path), expected)


class CompiledFunction(Still):
    def forward(self, inputs: Tensor) -> Tensor:
        if not hasattr(self, "fast"):
            vars(self)["fast"] = torch.compile(self.model.forward, backend="eager")
        return self.fast(inputs) if self.training else self.model(inputs)


def test_compiled_functions_run_uncompiled_in_watched_batches(tmp_path) -> None:
    torch.manual_seed(0)
    module = CompiledFunction()
    tiny_trainer(tmp_path, watching(last_part=0.3)).fit(module, in_order())
    assert_same(hessian_in(tmp_path), of_batches(module, [3, 4, 5, 6, 7]))


def test_mixed_precision_is_that_of_training(tmp_path) -> None:
    module = still()
    tiny_trainer(tmp_path, watching(), precision="bf16-mixed").fit(module, in_order())
    assert_same(hessian_in(tmp_path), by_loop(module), tolerance=0.1)


def test_only_the_parameters_asked_for_are_watched(tmp_path) -> None:
    module = still()
    tiny_trainer(tmp_path, watching(parameters=["model.body.*"])).fit(module, in_order())
    expected = {name: value for name, value in by_loop(module).items() if "body" in name}
    assert_same(hessian_in(tmp_path), expected)


def test_a_stream_has_as_many_examples_as_an_epoch_shows(tmp_path) -> None:
    module = still()
    tiny_trainer(tmp_path, watching(every_n_batches=2)).fit(module, Stream())
    assert_same(hessian_in(tmp_path), of_batches(module, [0, 2, 4, 6]))
    assert open_expert(tmp_path).info.num_examples == NUM_EXAMPLES


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from (examples()[list(micro)] for micro in MICRO)


@pytest.mark.distributed
def test_two_processes_watch_what_one_watches(tmp_path) -> None:
    data = TensorDataset(*(tensor[:48] for tensor in examples().tensors))
    for folder, settings in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        size = 8 if settings else 16
        callbacks = (
            watching(last_part=0.5),
            ModelCheckpoint(dirpath=tmp_path / folder, every_n_train_steps=2, save_top_k=-1),
        )
        module = still()
        tiny_trainer(tmp_path / folder, *callbacks, **settings).fit(
            module, DataLoader(data, batch_size=size, drop_last=True)
        )
    assert_same(hessian_in(tmp_path / "two"), hessian_in(tmp_path / "one"), tolerance=1e-6)
    assert_same(hessian_in(tmp_path / "one"), by_loop(still(), range(48)))
    assert details(tmp_path / "two") == details(tmp_path / "one")
    (path,) = (tmp_path / "two").glob("*step=6-batches=3.safetensors")
    kept = _sums(path)
    assert_same(kept, by_loop(still(), range(48)))


def _sums(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name.partition(".")[2]: value for name, value in load_file(path).items()}


@pytest.mark.parametrize("stop", [3, 6])
def test_a_fit_resumed_in_the_middle_ends_as_if_it_had_not_stopped(tmp_path, stop: int) -> None:
    """The watched part begins after 4 of 8 steps: the fit stops before and in it."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def module(seed: int) -> TinyClassifier:
        created = tiny_classifier(seed)
        vars(created).update(curvature_dataloader=in_order)
        return created

    def fit(folder: Path, module: TinyClassifier, stop: int = -1, **where: Any) -> TinyClassifier:
        class Stopping(Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
                if trainer.global_step == stop:
                    raise KeyboardInterrupt

        saving = ModelCheckpoint(dirpath=folder, every_n_train_steps=3, save_top_k=-1)
        callbacks = [watching(last_part=0.5, every_n_batches=2), saving]
        callbacks += [Stopping()] if stop > 0 else []
        trainer = tiny_trainer(folder, *callbacks, accumulate_grad_batches=2)
        if stop > 0:
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                trainer.fit(module, StatefulBatches(), **where)
        else:
            trainer.fit(module, StatefulBatches(), **where)
        return module

    uninterrupted = fit(whole, module(0))
    fit(parts, module(0), stop + 1)
    (kept,) = parts.glob(f"*step={stop}.ckpt")
    resumed = fit(parts, module(7), ckpt_path=kept)
    for name, value in uninterrupted.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-6, atol=1e-6)
    assert_same(hessian_in(parts), hessian_in(whole), tolerance=1e-5)
    assert details(parts) == details(whole)
    assert details(parts)["num_batches"] == 4


def test_sums_saved_within_a_window_have_a_file_of_their_own(tmp_path) -> None:
    class Saving(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            batch_idx = _[-1]
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}-{batch_idx}.ckpt")

    trainer = tiny_trainer(tmp_path, watching(), Saving(), accumulate_grad_batches=3, max_epochs=1)
    trainer.fit(still(), in_order())
    for number in range(len(MICRO)):
        state = torch.load(tmp_path / f"0-{number}.ckpt", weights_only=True)["callbacks"]
        (own,) = (value for key, value in state.items() if key.startswith("DiagonalHessian"))
        seen = [index for micro in MICRO[: number + 1] for index in micro]
        assert own["steps"]["num_seen"] == len(seen)
        assert_same(_sums(tmp_path / own["steps"]["file"]), by_loop(still(), seen))


class Failing(Still):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == 3:
            raise RuntimeError("broken")
        return loss


def test_a_step_that_fails_leaves_nothing_behind(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        tiny_trainer(tmp_path, watching()).fit(Failing(), in_order())
    assert _get_current_function_mode_stack() == []
    assert not (tmp_path / "expert").exists()


class Modes(Still):
    """Notes where somebody listens; without a loss on some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, int]] = []

    def note(self, where: str) -> None:
        self.heard.append((where, len(_get_current_function_mode_stack())))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.note("step")
        return None if batch_idx in (2, 7) else super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        self.note("end")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note("validation")


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_without_loss_does_not_count_and_is_left(tmp_path) -> None:
    torch.manual_seed(0)
    module = Modes()
    tiny_trainer(tmp_path, watching(), max_epochs=1).fit(module, in_order(), in_order())
    assert_same(hessian_in(tmp_path), of_batches(module, [0, 1, 3, 4, 5, 6]))
    assert details(tmp_path)["num_batches"] == 6
    after_look = module.heard[module.heard.index(("end", 0)) :]
    assert {depth for where, depth in after_look if where != "step"} == {0}
    assert {depth for where, depth in after_look if where == "step"} == {1}


def test_a_batch_that_the_module_declines_does_not_count(tmp_path) -> None:
    class Declining(Modes):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 1 else None

        def on_train_epoch_end(self) -> None:
            self.note("epoch end")

    torch.manual_seed(0)
    module = Declining()
    tiny_trainer(tmp_path, watching()).fit(module, in_order())
    assert_same(hessian_in(tmp_path), of_batches(module, [0]))
    assert ("epoch end", 0) in module.heard
    assert ("epoch end", 1) not in module.heard


class Checkpointed(Still):
    """Recomputes its activations, in training only."""

    reentrant = False

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return self.model(inputs)
        inputs = inputs.clone().requires_grad_()
        hidden = checkpoint(
            lambda x: self.model.gelu(self.model.body(x)), inputs, use_reentrant=self.reentrant
        )
        return self.model.head(hidden)


def test_checkpointed_activations_are_watched(tmp_path) -> None:
    torch.manual_seed(0)
    module = Checkpointed()
    tiny_trainer(tmp_path, watching()).fit(module, in_order())
    assert_same(hessian_in(tmp_path), by_loop(module))


class Squared(torch.autograd.Function):
    """A layer that nobody can look into."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return inputs @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        inputs, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].T @ inputs


class Hiding(Still):
    """Has a layer of another kind in training."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return self.model(inputs)
        features = self.model.gelu(self.model.body(inputs))
        return Squared.apply(features, self.model.head.weight) + self.model.head.bias


class Opaque(Hiding):
    def forward(self, inputs: Tensor) -> Tensor:
        features = self.model.gelu(self.model.body(inputs))
        return Squared.apply(features, self.model.head.weight) + self.model.head.bias


class Reentrant(Checkpointed):
    reentrant = True


class Summed(Still):
    """Has a mean loss for a pass, but trains with another one."""

    def curvature_loss(self, batch: Any) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1], reduction="sum")


class Manual(Summed):
    automatic_optimization = False


class FromIterator(Summed):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        return self.curvature_loss(next(dataloader_iter)[0])


class Normed(Still):
    def __init__(self) -> None:
        super().__init__()
        self.model.gelu = nn.BatchNorm1d(6)


class Frozen(Normed):
    def on_train_epoch_start(self) -> None:
        self.model.gelu.eval()


def compiled_part() -> Still:
    module = still()
    module.model = torch.compile(module.model, backend="eager")
    return module


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Manual, r"Manual: must have automatic optimization.*got manual.*estimator \"exact\""),
        (FromIterator, r"training_step: must take a batch.*dataloader_iter.*estimator \"exact\""),
        (compiled_part, r"Still: must not be compiled.*on 'model'.*estimator \"exact\""),
        (lambda: torch.compile(still(), backend="eager"), r"must not be comp.*on 'the module'"),
        (Normed, r"model\.gelu: must not take its statistics.*BatchNorm1d in train mode.*eval\(\)"),
        (Summed, r"mean"),
        (Opaque, r"model\.head\.weight: must be one whose per-example gradients come by"),
        (Hiding, r"model\.head\.weight: must be one whose per-example gradients come by"),
        (Reentrant, r"reentrant checkpointing.*Set use_reentrant=False"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_the_first_step(
    tmp_path, module: Callable[[], Any], message: str
) -> None:
    trainer = tiny_trainer(tmp_path, watching(last_part=0.1))
    with pytest.raises(InputError, match=message):
        trainer.fit(module(), in_order())
    assert trainer.global_step == 0


def test_a_gradient_scaler_is_refused(tmp_path) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(InputError, match=r'precision: must not be "16-mixed".*bf16-mixed'):
        tiny_trainer(tmp_path, watching(), plugins=[plugin]).fit(still(), in_order())


def test_frozen_statistics_are_taken(tmp_path) -> None:
    torch.manual_seed(0)
    module = Frozen()
    tiny_trainer(tmp_path, watching()).fit(module, in_order())
    module.eval()
    expected = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for inputs, label in examples():
        loss = cross_entropy(module(inputs[None]), label[None])
        loss_gradients = torch.autograd.grad(loss, list(module.parameters()))
        for total, gradient in zip(expected.values(), loss_gradients, strict=True):
            total += gradient.square()
    assert_same(hessian_in(tmp_path), expected)


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({"max_epochs": -1, "max_time": "00:00:01:00"}, []),
        ({"max_time": "00:00:01:00"}, []),
        ({}, [GradientAccumulationScheduler({1: 2})]),
    ],
)
def test_a_part_of_a_fit_of_unknown_length_is_refused(tmp_path, settings, others) -> None:
    trainer = tiny_trainer(tmp_path, watching(last_part=0.2), *others, **settings)
    with pytest.raises(InputError, match=r"last_part: must be 1\.0 where.*got 0\.2\. Set"):
        trainer.fit(still(), in_order())


def test_a_part_of_a_stream_without_length_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=r"last_part: must be 1\.0 where"):
        tiny_trainer(tmp_path, watching(last_part=0.2)).fit(still(), Stream())


def test_windows_that_change_are_followed(tmp_path) -> None:
    module = still()
    scheduler = GradientAccumulationScheduler({1: 3})
    tiny_trainer(tmp_path, watching(), scheduler).fit(module, in_order())
    assert_same(hessian_in(tmp_path), by_loop(module))


def test_a_fit_that_stops_before_the_watched_part_says_what_to_do(tmp_path) -> None:
    stopping = EarlyStopping("loss", patience=1, check_on_train_epoch_end=True, min_delta=1.0)
    trainer = tiny_trainer(tmp_path, watching(last_part=0.1), stopping, max_epochs=10)
    with pytest.raises(InputError, match=r"after 16 optimizer steps, 72 before the.*lit-merge cur"):
        trainer.fit(still(), in_order())
    assert not (tmp_path / "expert").exists()


def test_a_batch_without_finite_gradients_is_an_error_at_the_end(tmp_path) -> None:
    class Spoilt(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 3 else 1)

    with pytest.raises(InputError, match=r"model\.\w+\.\w+: must have finite squared gradients"):
        tiny_trainer(tmp_path, watching(), max_epochs=1).fit(Spoilt(), in_order())


class Unfreezing(Callback):
    """Trains the body from the second epoch on."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.model.body.requires_grad_(False)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.model.body.weight.requires_grad_(trainer.current_epoch == 1)


def test_layers_unfrozen_before_the_watched_part_are_watched(tmp_path) -> None:
    module = still()
    tiny_trainer(tmp_path, Unfreezing(), watching(last_part=0.5)).fit(module, in_order())
    expected = by_loop(module)
    del expected["model.body.bias"]
    assert_same(hessian_in(tmp_path), expected)


def test_layers_unfrozen_in_the_watched_part_are_refused(tmp_path) -> None:
    message = r"last_part: must hold no step at which.*got model\.body\.weight at such a step"
    with pytest.raises(InputError, match=message):
        tiny_trainer(tmp_path, Unfreezing(), watching()).fit(still(), in_order())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"last_part": 0.0}, r"last_part: must be the part.*got 0\.0"),
        ({"last_part": 1.5}, r"last_part: must be the part.*got 1\.5"),
        ({"every_n_batches": 0}, r"every_n_batches: must be a positive integer.*got 0"),
        ({"every_n_batches": None}, r"every_n_batches: must be a positive integer.*got None"),
        ({"labels": "sampled"}, r"labels: must be 'observed' with"),
        ({"samples": 2}, r"samples: must be 1 with"),
        ({"weights": "best"}, r"weights: must be 'last' with"),
        ({"estimator": "exact", "last_part": 0.5}, r"last_part: must be 0\.1 with.*\"exact-in-tra"),
        ({"estimator": "adam", "every_n_batches": 2}, r"every_n_batches: must be 1 with"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DiagonalHessian(**{"estimator": "exact-in-training", **settings})
