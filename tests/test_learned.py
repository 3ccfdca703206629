"""The learned fit: what it trains, what it measures, and which state it ends with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

import lit_merge.streaming
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, open_expert, write_expert
from lit_merge.merged.holdout import choose_held_out
from lit_merge.methods import Average, GradientMatching
from lit_merge.module import MergeModule
from tests.references import softened_divergence
from tests.tiny_fits import QUIET, tiny_trainer
from tests.tiny_merge import (
    CLASSES,
    HEAD,
    SIZES,
    base_net,
    expert_net,
    merge_module,
    tiny_data,
    write_experts,
)

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

ALL = {"trainable": "all", "heads": "refit", "surgery_rank": 3, "feature_weight": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    write_experts(path)
    return path


@pytest.fixture(autouse=True)
def steps_of_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fits of a few steps go somewhere."""
    monkeypatch.setattr("lit_merge.merged.learned.RISING_STEPS", 0)


def fit(module: MergeModule, folder: Path, *callbacks: Callback, **options: Any) -> Any:
    settings = {"enable_checkpointing": False, "max_epochs": -1, "limit_val_batches": 0}
    trainer = tiny_trainer(folder, *callbacks, **settings | options)
    trainer.fit(module, datamodule=tiny_data())
    return trainer


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


def test_a_fit_that_only_gets_worse_ends_as_it_began(folder: Path, tmp_path: Path) -> None:
    module = merge_module(folder, lr=3.0, holdout=0.25, closed_form="none")
    module.configure_model()
    before = state(module.network)
    trainer = fit(module, tmp_path, max_steps=4)
    assert not changed(before, state(module.network))
    assert trainer.callback_metrics["holdout/loss"] > 0.5
    last = merge_module(folder, lr=3.0, holdout=0.0, closed_form="none")
    fit(last, tmp_path, max_steps=4)
    assert changed(before, state(last.network))


def test_the_held_out_loss_is_the_mean_over_tasks_of_the_held_out_examples(
    folder: Path, tmp_path: Path
) -> None:
    found: list[dict[str, float]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            found.append({**module.holdout_losses(), "best": module.best.loss})

    module = merge_module(folder, closed_form="none", holdout=0.25, seed=3)
    module.configure_model()
    held = choose_held_out(SIZES, 0.25, seed=3)
    expected = {}
    for task in CLASSES:
        inputs = tiny_data().examples(task, "train")[list(held[task])][0]
        with torch.no_grad():
            own, teacher = module(inputs, task)[:, : CLASSES[task]], expert_net(task)(inputs)
        expected[task] = float(softened_divergence(own, teacher, 2.0).mean())
    fit(module, tmp_path, Watch(), max_steps=1)
    expected["best"] = sum(expected.values()) / len(expected)
    assert found == [pytest.approx(expected, rel=1e-5)]


def test_patience_ends_a_fit_that_gets_worse(folder: Path, tmp_path: Path) -> None:
    options = {"lr": 3.0, "holdout": 0.25, "holdout_every": 1, "patience": 2}
    module = merge_module(folder, closed_form="none", **options)
    assert fit(module, tmp_path, max_steps=30).global_step == 2


def test_the_best_state_survives_in_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    module = merge_module(folder, lr=3.0, holdout=0.25, closed_form="none")
    module.configure_model()
    before = state(module.network.corrections)

    class Keep(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index == 1:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    fit(module, tmp_path, Keep(), max_steps=2)
    middle = torch.load(tmp_path / "middle.ckpt", weights_only=True)["state_dict"]
    assert any(not torch.equal(middle[f"merged.corrections.{n}"], v) for n, v in before.items())
    resumed = merge_module(folder, lr=3.0, holdout=0.25, closed_form="none")
    trainer = tiny_trainer(
        tmp_path, enable_checkpointing=False, max_epochs=-1, max_steps=3, limit_val_batches=0
    )
    trainer.fit(
        resumed, datamodule=tiny_data(), ckpt_path=tmp_path / "middle.ckpt", weights_only=True
    )
    assert not changed(before, state(resumed.network.corrections))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, {"corrections"}),
        ({"trainable": "all"}, {"corrections", "body"}),
        ({"heads": "refit"}, {"corrections", "head"}),
        ({"surgery_rank": 3}, {"corrections", "final_feature"}),
        ({"coefficients": "layer"}, {"corrections", "body"}),
    ],
)
def test_only_what_is_asked_for_learns(
    folder: Path, tmp_path: Path, options: dict[str, Any], parts: set[str]
) -> None:
    module = merge_module(folder, holdout=0.0, closed_form="none", **options)
    module.configure_model()
    before = state(module.network)
    trainer = fit(module, tmp_path, max_steps=2)
    names = changed(before, state(module.network))
    assert {n.removeprefix("network.").partition(".")[0] for n in names} == parts
    rates = {group["initial_lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == ({1e-2, 3e-3} if "trainable" in options or "heads" in options else {1e-2})
    assert module.targets is None
    data = trainer.datamodule
    assert len(data.train_dataloader().dataset) == sum(SIZES.values())


def test_coefficients_are_in_the_weights_when_the_fit_ends(folder: Path, tmp_path: Path) -> None:
    found: dict[str, Any] = {}

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index == 2:
                found["logits"] = module(batch.inputs, batch.task).detach()
                found["batch"] = batch
                found["c"] = module.network.coefficients.weight.detach().double().tanh()

    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)

    module = merge_module(
        folder, holdout=0.0, closed_form="none", coefficients="layer", lr=0.1, sites="body.0"
    )
    fit(module, tmp_path, Watch(), keep(), max_steps=3, enable_checkpointing=True)
    middle = tmp_path / "step=2.ckpt"
    loaded = MergeModule(base_net(), sites="body.0")
    content = torch.load(middle, weights_only=True)
    loaded.on_load_checkpoint(content)
    loaded.load_state_dict(content["state_dict"])
    batch = found["batch"]
    torch.testing.assert_close(loaded(batch.inputs, batch.task).detach(), found["logits"])
    for number, layer in enumerate(("body.0", "body.2")):
        base = base_net().get_parameter(f"{layer}.weight").double()
        vectors = [expert_net(t).get_parameter(f"{layer}.weight").double() - base for t in CLASSES]
        expected = base + sum(
            (0.5 + found["c"][t, number]) * vector for t, vector in enumerate(vectors)
        )
        moved = loaded.network.network.get_parameter(f"{layer}.weight").detach().double()
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)
    assert found["c"].abs().min() > 0.02
    assert module.network.coefficients is not None
    assert not module.network.coefficients.active
    assert not module.network.coefficients.weight.any()
    resumed = merge_module(
        folder, holdout=0.0, closed_form="none", coefficients="layer", lr=0.1, sites="body.0"
    )
    trainer = tiny_trainer(tmp_path, keep(), max_epochs=-1, max_steps=3, limit_val_batches=0)
    trainer.fit(resumed, datamodule=tiny_data(), ckpt_path=middle, weights_only=True)
    for name, value in state(module.network).items():
        torch.testing.assert_close(state(resumed.network)[name], value, rtol=1e-4, atol=1e-5)


def test_surgery_comes_back_from_a_folder(folder: Path, tmp_path: Path) -> None:
    module = merge_module(folder, holdout=0.0, surgery_rank=3, closed_form="none")
    fit(module, tmp_path, max_steps=2)
    module.save_corrected(tmp_path / "corrected")
    loaded = MergeModule.from_folder(tmp_path / "corrected", base_net())
    assert loaded.network.surgery_rank == 3
    inputs = torch.randn(4, 6)
    for task in CLASSES:
        assert torch.equal(loaded.predict_task(inputs, task), module.predict_task(inputs, task))
    with pytest.raises(InputError, match=r"surgery_rank: must be that of .*corrected, 3; got 2"):
        MergeModule.from_folder(tmp_path / "corrected", base_net(), surgery_rank=2)


def merged_folder(folder: Path, path: Path) -> Path:
    """Write the experts with Hessians, and their merge."""
    experts = {}
    for task in CLASSES:
        net = expert_net(task)
        hessian = {n: p.detach().abs() + 0.1 for n, p in net.named_parameters()}
        info = ExpertInfo(task=task, head_parameters=HEAD)
        write_expert(path / task, weights=net.state_dict(), info=info, hessian=hessian)
        experts[task] = str(path / task)
    method = GradientMatching()
    lit_merge.streaming.merge(
        str(folder / "base"), experts, method, path / "merged", progress=False
    )
    return path / "merged"


def test_a_strong_elastic_holds_the_weights_to_the_merged_mean(
    folder: Path, tmp_path: Path
) -> None:
    merged = merged_folder(folder, tmp_path)
    mean = open_expert(merged).weights
    distances = []
    for strength in (0.0, 1e4):
        module = MergeModule(
            base_net(), {t: str(tmp_path / t) for t in CLASSES}, merged=str(merged),
            trainable="all", elastic=strength, holdout=0.0, weights_lr=1e-2,
        )  # fmt: skip
        fit(module, tmp_path, max_steps=20)
        distances.append(
            sum(
                float((p.detach() - mean.tensor(name)).square().sum())
                for name, p in module.network.shared_parameters().items()
            )
        )
    assert distances[1] < 0.05 * distances[0]


def test_elastic_needs_a_folder(folder: Path, tmp_path: Path) -> None:
    module = merge_module(folder, trainable="all", elastic=1.0)
    with pytest.raises(InputError, match="elastic: must come with merged, a folder"):
        fit(module, tmp_path, max_steps=1)


def test_features_need_a_known_head(folder: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = base_net().body
            self.last = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.body(x))
            return out

    for option in ("surgery_rank", "feature_weight"):
        module = MergeModule(Net(), **{option: 1})
        with pytest.raises(InputError, match=f"{option}: must meet a network whose head is known"):
            module.build(("a",), {}, (), source="test")


class Nothing(nn.Module):
    """A correction without parameters."""

    def __init__(self, num_tasks: int, num_features: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        return x


def test_a_fit_without_anything_to_learn_is_refused(folder: Path, tmp_path: Path) -> None:
    module = merge_module(folder, correction=Nothing, closed_form="none")
    with pytest.raises(InputError, match="correction: must leave something to learn"):
        fit(module, tmp_path, max_steps=1)


def test_a_strategy_that_would_not_bring_the_gradients_together_is_refused(folder: Path) -> None:
    module = merge_module(folder)
    module.configure_model()
    module._device_mesh = object()  # type: ignore[assignment]
    module._trainer = SimpleNamespace(world_size=2, strategy=object())  # type: ignore[assignment]
    with pytest.raises(InputError, match="strategy: must bring the gradients of all processes"):
        module.require_synchronised()


@pytest.mark.distributed
@pytest.mark.parametrize("options", [ALL, {"coefficients": "layer", "holdout_every": 2}])
def test_two_processes_learn_like_one(
    folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    results = []
    for ranks in (1, 2):
        module = merge_module(folder, holdout=0.25, **options)
        strategy = "ddp_fork" if ranks == 2 else "auto"
        trainer = tiny_trainer(
            tmp_path, devices=ranks, strategy=strategy, max_epochs=1, enable_checkpointing=False
        )
        trainer.fit(module, datamodule=tiny_data(batch_size=16 // ranks))
        results.append((state(module.network), float(trainer.callback_metrics["holdout/loss"])))
    (one, one_loss), (two, two_loss) = results
    assert max(float((one[n].float() - two[n].float()).abs().max()) for n in one) <= 2e-5
    assert one_loss == pytest.approx(two_loss, rel=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_two_processes_in_half_precision_learn_like_one(
    folder: Path, tmp_path: Path, precision: str
) -> None:
    results = []
    for ranks in (1, 2):
        module = merge_module(folder, holdout=0.0, trainable="all")
        strategy = "ddp_fork" if ranks == 2 else "auto"
        trainer = tiny_trainer(
            tmp_path, devices=ranks, strategy=strategy, max_steps=2, max_epochs=-1,
            enable_checkpointing=False, precision=precision, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=tiny_data(batch_size=16 // ranks))
        results.append(state(module.network))
    one, two = results
    for name in one:
        torch.testing.assert_close(one[name].float(), two[name].float(), rtol=0.05, atol=0.02)


def test_coefficients_need_a_base(folder: Path, tmp_path: Path) -> None:
    module = merge_module(folder, base=None, method=Average(), coefficients="layer")
    with pytest.raises(InputError, match='base: must be given for coefficients: "layer"'):
        fit(module, tmp_path, max_steps=1)


def test_training_batch_norms_needs_some(folder: Path) -> None:
    module = merge_module(folder, trainable="all", batch_norm_mode="train")
    with pytest.raises(InputError, match='batch_norm_mode: must not be "train" for a network with'):
        module.configure_model()
