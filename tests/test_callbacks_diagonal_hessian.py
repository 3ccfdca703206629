from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lit_merge.callbacks import ActivationStatistics, DiagonalHessian
from lit_merge.checkpoint import fingerprint, load_into
from lit_merge.curvature import CurvatureWarning, diagonal_hessian
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from lit_merge.passes.training_examples import random_subset
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
    loader,
    tiny_classifier,
    tiny_trainer,
)

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def loss(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def test_the_expert_folder_has_the_trained_weights_and_their_exact_curvature(tmp_path) -> None:
    base = fingerprint(tiny_classifier().state_dict())
    module = fit(tmp_path, DiagonalHessian(labels="observed", task="clouds"))
    expert = open_expert(tmp_path)  # the run folder is enough
    assert expert.notes == ()
    assert_same(hessian_in(tmp_path), by_loop(module))
    for name, value in module.state_dict().items():
        assert torch.equal(expert.weights.tensor(name), value)
    info = expert.info
    assert (info.task, info.estimator, info.labels) == ("clouds", "exact", "observed")
    assert info.num_examples == NUM_EXAMPLES
    assert info.base_fingerprint == base
    assert info.head_parameters == ("model.head.weight", "model.head.bias")
    assert info.details["curvature"]["num_seen"] == NUM_EXAMPLES
    assert info.details["module"] == "tests.tiny_fits.TinyClassifier"


def test_sampled_labels_are_those_of_the_plain_function(tmp_path) -> None:
    module = fit(tmp_path, DiagonalHessian(seed=5, batch_size=7))
    plain = diagonal_hessian(module, [examples()[:]], cross_entropy_of, labels="sampled", seed=5)
    assert_same(hessian_in(tmp_path), plain)
    assert open_expert(tmp_path).info.labels == "sampled"


@pytest.mark.parametrize(
    "callback",
    [
        DiagonalHessian(),
        DiagonalHessian(estimator="squared-batch-gradient"),
        DiagonalHessian(estimator="adam"),
    ],
    ids=["exact", "squared", "adam"],
)
def test_training_is_bit_by_bit_the_same_with_the_callback(tmp_path, callback) -> None:
    class Noisy(TinyClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.model.gelu = nn.Sequential(nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(0.2))

    modules = []
    for others in ((), (callback,)):
        torch.manual_seed(0)
        module = Noisy()
        torch.manual_seed(1)
        folder = tmp_path / str(len(others))
        tiny_trainer(folder, *others).fit(module, loader(generator=None, drop_last=True))
        modules.append(module)
    plain, watched = modules
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name])
    assert watched.training
    assert all(parameter.requires_grad for parameter in watched.parameters())


def test_a_subset_is_scaled_to_the_whole_set(tmp_path) -> None:
    module = fit(tmp_path, DiagonalHessian(labels="observed", max_examples=20, seed=2))
    chosen = random_subset(range(NUM_EXAMPLES), 20, seed=2)
    scale = NUM_EXAMPLES / 20
    expected = {name: scale * value for name, value in by_loop(module, chosen).items()}
    assert_same(hessian_in(tmp_path), expected)
    info = open_expert(tmp_path).info
    assert info.num_examples == NUM_EXAMPLES
    assert info.details["curvature"]["num_seen"] == 20


def test_only_the_parameters_asked_for_have_curvature(tmp_path) -> None:
    fit(tmp_path, DiagonalHessian(parameters=["model.body.*"]))
    assert sorted(hessian_in(tmp_path)) == ["model.body.bias", "model.body.weight"]


def test_frozen_parameters_have_no_curvature_and_are_named(tmp_path) -> None:
    module = tiny_classifier()
    module.model.body.bias.requires_grad_(False)
    fit(tmp_path, DiagonalHessian(), module=module)
    assert "model.body.bias" not in hessian_in(tmp_path)
    assert open_expert(tmp_path).info.frozen_parameters == ("model.body.bias",)


def test_tied_parameters_have_one_curvature_and_are_named(tmp_path) -> None:
    class Tied(TinyClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.twice = nn.Linear(4, 6)
            self.twice.weight = self.model.body.weight

        def forward(self, inputs: Tensor) -> Tensor:
            return self.model(inputs) + self.twice(inputs)[:, :3]

    fit(tmp_path, DiagonalHessian(), module=Tied())
    assert "twice.weight" not in hessian_in(tmp_path)
    assert open_expert(tmp_path).info.tied_parameters == (("model.body.weight", "twice.weight"),)


class Product(torch.autograd.Function):
    """A product with a weight that nobody can look into."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return inputs @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        inputs, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].T @ inputs


class Opaque(TinyClassifier):
    """Uses the head's weight by a function of its own."""

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.model.gelu(self.model.body(inputs))
        return Product.apply(features, self.model.head.weight) + self.model.head.bias


def test_a_parameter_that_needs_the_slow_way_is_named_once_and_right(tmp_path) -> None:
    module = Opaque()
    with pytest.warns(CurvatureWarning, match=r"model\.head\.weight"):
        fit(tmp_path, DiagonalHessian(labels="observed"), module=module)
    assert_same(hessian_in(tmp_path), by_loop(module))
    one_by_one = open_expert(tmp_path).info.details["curvature"]["one_by_one"]
    assert list(one_by_one) == ["model.head.weight"]


@pytest.mark.parametrize("estimator", ["exact", "squared-batch-gradient", "adam"])
def test_compiled_parts_are_measured_under_their_plain_names(tmp_path, estimator: Any) -> None:
    module = tiny_classifier()
    module.model = torch.compile(module.model, backend="eager")
    callback = DiagonalHessian(estimator=estimator, parameters=["model.*.weight"])
    fit(tmp_path, callback, ActivationStatistics(), module=module)
    assert sorted(hessian_in(tmp_path)) == ["model.body.weight", "model.head.weight"]
    expert = open_expert(tmp_path)
    assert sorted(expert.weights) == sorted(tiny_classifier().state_dict())
    assert expert.activations is not None
    assert "model.body.mean" in expert.activations
    if estimator == "exact":
        module.model = module.model._orig_mod
        data = [examples()[:]]
        plain = diagonal_hessian(
            module, data, cross_entropy_of, labels="sampled", parameters=["*.weight"]
        )
        assert_same(hessian_in(tmp_path), plain)


def test_the_loss_is_tried_out_before_training(tmp_path) -> None:
    class Summed(TinyClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self(batch[0]), batch[1], reduction="sum")

    module = Summed()
    with pytest.raises(InputError, match=r"mean"):
        fit(tmp_path, DiagonalHessian(), module=module)
    assert module.trainer.global_step == 0


def test_manual_optimization_is_refused_before_training(tmp_path) -> None:
    module = tiny_classifier()
    module.automatic_optimization = False
    with pytest.raises(InputError, match=r"got manual optimization"):
        fit(tmp_path, DiagonalHessian(), module=module)


def test_data_without_one_loader_is_refused_before_training(tmp_path) -> None:
    class Pairs(TinyClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["a"], batch_idx)

    module = Pairs()
    with pytest.raises(InputError, match=r"got a collection of them \(dict\)"):
        fit(tmp_path, DiagonalHessian(), module=module, data={"a": loader()})
    assert module.trainer.global_step == 0


@pytest.mark.parametrize(("kind", "reads"), [(DiagonalHessian, 2), (ActivationStatistics, 1)])
def test_a_stream_that_runs_dry_before_the_pass_is_refused(tmp_path, kind: Any, reads: int) -> None:
    class Dry:
        left = reads

        def __iter__(self) -> Any:
            self.left -= 1
            return iter([examples()[:8]] if self.left >= 0 else [])

    module = tiny_classifier()
    stream = Dry()
    vars(module)["curvature_dataloader"] = lambda: stream
    with pytest.raises(InputError, match=r"must yield its examples again.*read once"):
        fit(tmp_path, kind(), module=module)


def test_a_curvature_dataloader_is_used(tmp_path) -> None:
    class Own(TinyClassifier):
        def curvature_dataloader(self) -> Any:
            return DataLoader(Subset(examples(), range(9)), batch_size=4)

    module = Own()
    fit(tmp_path, DiagonalHessian(labels="observed"), module=module, limit_train_batches=2)
    assert_same(hessian_in(tmp_path), by_loop(module, range(9)))
    assert open_expert(tmp_path).info.num_examples == 9


def test_the_trainers_limit_bounds_the_pass(tmp_path) -> None:
    fit(tmp_path, DiagonalHessian(), limit_train_batches=2)
    info = open_expert(tmp_path).info
    assert info.num_examples == NUM_EXAMPLES
    assert info.details["curvature"]["num_seen"] == 16


def test_unknown_parameters_are_refused_before_training(tmp_path) -> None:
    with pytest.raises(InputError, match=r"'model.boddy\.\*', which matches none.*model\.body"):
        fit(tmp_path, DiagonalHessian(parameters=["model.boddy.*"]))


def test_mixed_precision_is_that_of_training(tmp_path) -> None:
    module = fit(tmp_path, DiagonalHessian(labels="observed"), precision="bf16-mixed")
    assert_same(hessian_in(tmp_path), by_loop(module), tolerance=0.1)
    assert open_expert(tmp_path).info.details["curvature"]["precision"] == "bf16-mixed"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "kfac"}, r"estimator: must be one of exact, hutchinson, sq.*got 'kfac'"),
        ({"labels": "guessed"}, r"labels: must be one of sampled, observed, exp.*got 'guessed'"),
        ({"max_examples": -1}, r"max_examples: must be a positive integer.*got -1"),
        ({"batch_size": 0}, r"batch_size: must be a positive integer.*got 0"),
        ({"samples": 0}, r"samples: must be a positive integer.*got 0"),
        ({"reduction": "max"}, r"reduction: must be one of loss, mean, sum; got 'max'"),
        ({"labels": "expected", "samples": 2}, r"samples: must be 1 without labels .sampled"),
        ({"estimator": "hutchinson", "labels": "sampled"}, r"labels: must be .observed. with"),
        ({"estimator": "adam", "labels": "sampled"}, r"labels: must be 'observed' with"),
        ({"estimator": "adam", "samples": 2}, r"samples: must be 1 with"),
        ({"estimator": "adam", "reduction": "sum"}, r"reduction: must be 'loss' with"),
        ({"estimator": "adam", "weights": "best"}, r"weights: must be 'last' with"),
        ({"estimator": "adam", "max_examples": 5}, r"max_examples: must be None with"),
        ({"estimator": "adam", "batch_size": 5}, r"batch_size: must be None with"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DiagonalHessian(**settings)


def fit_still(folder: Path, data: Any, **settings: Any) -> None:
    """Fit with steps of length zero, so that all fits end at the same weights."""
    module = Opaque(lr=0.0)
    load_into(module, tiny_classifier().state_dict())
    callback = DiagonalHessian(batch_size=7)
    tiny_trainer(folder, callback, max_epochs=1, **settings).fit(module, data)


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore::lit_merge.curvature.CurvatureWarning")
@pytest.mark.parametrize("size", [NUM_EXAMPLES, 1])
def test_two_processes_measure_what_one_measures(tmp_path, size: int) -> None:
    fit_still(tmp_path / "one", loader(size))
    fit_still(tmp_path / "two", loader(size), devices=2, strategy="ddp_fork")
    one, two = hessian_in(tmp_path / "one"), hessian_in(tmp_path / "two")
    assert all(value.any() for value in one.values())
    assert_same(two, one, tolerance=1e-6)
    assert open_expert(tmp_path / "two").info.num_examples == size


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore::lit_merge.curvature.CurvatureWarning")
def test_an_error_on_one_rank_is_an_error_on_all(tmp_path) -> None:
    class Spoilt(Dataset[Any]):
        """One of its examples, on the second rank, is only given out for the pass."""

        def __len__(self) -> int:
            return NUM_EXAMPLES

        def __getitem__(self, index: int) -> Any:
            inputs, label = examples()[index]
            return (inputs * float("nan") if index == 31 and self.spoilt else inputs), label

        spoilt = False

    class Spoiling(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.train_dataloader.dataset.spoilt = True

    callbacks = (Spoiling(), DiagonalHessian(labels="observed"))
    trainer = tiny_trainer(tmp_path, *callbacks, devices=2, strategy="ddp_fork", max_epochs=1)
    with pytest.raises(Exception, match=r"loss: must be finite; got nan on the examples"):
        trainer.fit(tiny_classifier(), DataLoader(Spoilt(), batch_size=8))
    assert list(tmp_path.glob("**/*expert*")) == []


def test_a_plain_script_with_one_more_line_ends_in_an_expert(tmp_path) -> None:
    """The script of somebody who knows nothing of lit-merge; the line is the callback's."""
    data = TensorDataset(torch.randn(32, 1, 8, 8), torch.randint(0, 4, (32,)))

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(1, 4, 3),
                nn.BatchNorm2d(4),
                nn.ReLU(inplace=True),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(4, 4),
            )

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            logits = self.net(x)
            self.log("acc", (logits.argmax(-1) == y).float().mean(), prog_bar=True)
            return nn.functional.cross_entropy(logits, y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[DiagonalHessian()],
    )
    trainer.fit(Net(), DataLoader(data, batch_size=16, shuffle=True))

    expert = open_expert(tmp_path / "lightning_logs" / "version_0")
    assert expert.path.name == "version_0"
    assert expert.hessian is not None
    assert expert.hessian.infos.keys() == {name for name, _ in Net().named_parameters()}
    assert expert.notes == ()
