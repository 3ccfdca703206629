"""MergeModule: the merge, the closed form and the fit, on one process and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

import lit_merge.streaming
from lit_merge.correction import RescaleShift, gather_statistics
from lit_merge.errors import InputError
from lit_merge.merged.learned import RISING_STEPS
from lit_merge.methods import EMR, Average, TaskArithmetic
from lit_merge.module import MergeModule
from lit_merge.parameters import ParametersPolicy
from lit_merge.tasks import ClassificationModule, DatasetTask, MultiTaskDataModule
from tests.tiny_fits import QUIET, tiny_trainer
from tests.tiny_merge import (
    CLASSES,
    TEST_SIZES,
    base_net,
    examples,
    expert_net,
    merge_module,
    tiny_data,
    tiny_tasks,
    write_experts,
)

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    write_experts(path)
    return path


def corrections(module: MergeModule) -> dict[str, Tensor]:
    return module.network.corrections.state_dict()


def disagreement(module: MergeModule) -> float:
    """Mean KL divergence from the experts on fresh points."""
    total = 0.0
    for task in CLASSES:
        inputs = examples(task, 200, 7).tensors[0]
        with torch.no_grad():
            expert = expert_net(task)(inputs).log_softmax(-1)
        own = module.predict_task(inputs, task).log()
        total += float((expert.exp() * (expert - own)).sum(-1).mean())
    return total / len(CLASSES)


def fit(module: MergeModule, folder: Path, *callbacks: Callback, **options: object) -> MergeModule:
    trainer = tiny_trainer(
        folder, *callbacks, **{"enable_checkpointing": bool(callbacks)} | options
    )
    trainer.fit(module, datamodule=tiny_data())
    return module


def test_the_merge_in_memory_is_that_of_the_files(folder, tmp_path):
    experts = {task: str(folder / task) for task in CLASSES}
    lit_merge.streaming.merge(
        str(folder / "base"), experts, TaskArithmetic(0.5), tmp_path / "merged", progress=False
    )
    read = MergeModule.from_folder(tmp_path / "merged", base_net())
    made = merge_module(folder)
    made.configure_model()
    inputs = torch.randn(4, 6)
    for task in CLASSES:
        assert torch.equal(read.predict_task(inputs, task), made.predict_task(inputs, task))


def test_a_merged_network_has_the_weights_of_the_merge_and_the_experts_heads(folder):
    module = merge_module(folder, method=TaskArithmetic(0.5))
    module.configure_model()
    base = base_net().body[0].weight
    experts = [expert_net(task).body[0].weight for task in CLASSES]
    expected = base + 0.5 * sum(expert - base for expert in experts)
    torch.testing.assert_close(module.network.network.body[0].weight, expected)
    for task in CLASSES:
        assert torch.equal(
            module.network.head_state()[task]["head.weight"], expert_net(task).head.weight
        )


def test_the_users_network_stays_as_it_was(folder, tmp_path):
    network = base_net()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    module = MergeModule(
        network, {task: str(folder / task) for task in CLASSES}, base=str(folder / "base"),
        method=Average(),
    )  # fmt: skip
    fit(module, tmp_path, max_epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(name.startswith("_") for name, _ in module.named_children())


def test_a_mixed_batch_gives_what_each_task_gives_alone(folder, tmp_path):
    module = fit(merge_module(folder), tmp_path, max_epochs=1)
    inputs = torch.randn(6, 6)
    task = torch.tensor([1, 0, 0, 1, 1, 0])
    mixed = module(inputs, task)
    for index, name in enumerate(CLASSES):
        alone = module(inputs[task == index], name)
        torch.testing.assert_close(mixed[task == index], alone)
        assert mixed[task == index][:, CLASSES[name] :].eq(float("-inf")).all()


def test_one_expert_merged_alone_stays_what_it_is(folder, tmp_path):
    module = merge_module(folder, experts={"dtd": str(folder / "dtd")}, method=TaskArithmetic(1.0))
    data = MultiTaskDataModule({"dtd": tiny_tasks()["dtd"]}, batch_size=8)
    trainer = tiny_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["train/dtd/loss"] < 1e-3  # Adam's noise floor
    inputs = examples("dtd", 100, 3).tensors[0]
    with torch.no_grad():
        expert = expert_net("dtd")(inputs).softmax(-1)
    torch.testing.assert_close(module.predict_task(inputs, "dtd"), expert, atol=0.02, rtol=0)
    (result,) = trainer.test(module, datamodule=data, verbose=False)
    points, labels = examples("dtd", 17, 2).tensors
    right = expert_net("dtd")(points).argmax(-1) == labels
    assert result["test/dtd/accuracy"] == pytest.approx(float(right.float().mean()))


def test_the_closed_form_alone_is_a_fit_of_no_steps_and_meets_the_experts_statistics(
    folder, tmp_path
):
    module = fit(merge_module(folder), tmp_path, max_steps=0, max_epochs=-1)
    assert module.calibrated
    assert module.targets is None
    network = module.network
    for index, task in enumerate(CLASSES):
        inputs, _ = tiny_data().calibration_batch(task, num_examples=256)
        expert = gather_statistics(expert_net(task), [inputs], network.sites)
        with network.context.using(index):
            own = gather_statistics(network.network, [inputs], network.sites)
        for site in expert:
            torch.testing.assert_close(own[site].mean, expert[site].mean, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(own[site].std, expert[site].std, atol=1e-5, rtol=1e-5)


def test_the_fit_brings_the_merge_nearer_to_the_experts(folder, tmp_path):
    plain = merge_module(folder)
    plain.configure_model()
    closed = fit(merge_module(folder), tmp_path, max_steps=0, max_epochs=-1)
    learned = fit(merge_module(folder, holdout=0.0), tmp_path, max_epochs=20)
    assert disagreement(learned) < 0.8 * min(disagreement(closed), disagreement(plain))


def test_only_the_corrections_learn(folder, tmp_path):
    module = merge_module(folder)
    module.configure_model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, tmp_path, max_epochs=1)
    changed = {n for n, value in module.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {n for n in before if "corrections" in n} | {"calibrated"}


def test_the_loss_is_the_mean_divergence_over_valid_examples(folder, tmp_path):
    losses: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))
            if batch_idx == 0:
                self.batch, self.logits = batch, first

    module = merge_module(folder, closed_form="none", temperature=3.0, holdout=0.0)
    module.configure_model()
    data = tiny_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        first = module(batch.inputs, batch.task)
    fit(module, tmp_path, Watch(), max_steps=1)
    expected = 0.0
    for row, task in enumerate(batch.task.tolist()):
        name = list(CLASSES)[task]
        with torch.no_grad():
            expert = expert_net(name)(batch.inputs[row]).double().div(3).log_softmax(-1)
        own = first[row, : CLASSES[name]].double().div(3).log_softmax(-1)
        expected += 9 * float((expert.exp() * (expert - own)).sum()) / len(batch.task)
    assert losses == [pytest.approx(expected, rel=1e-5)]


def test_labels_can_teach_without_experts(folder, tmp_path):
    experts = {task: str(folder / task) for task in CLASSES}
    lit_merge.streaming.merge(
        str(folder / "base"), experts, Average(), tmp_path / "merged", progress=False
    )
    module = MergeModule(
        base_net(), merged=str(tmp_path / "merged"), teacher="labels", closed_form="none"
    )
    trainer = tiny_trainer(tmp_path, max_epochs=8, enable_checkpointing=False)
    before = trainer.validate(module, datamodule=tiny_data(), verbose=False)[0]
    trainer.fit(module, datamodule=tiny_data())
    after = trainer.validate(module, datamodule=tiny_data(), verbose=False)[0]
    assert after["val/nll"] < before["val/nll"]


def test_networks_in_a_classification_module_are_taken_out(folder, tmp_path):
    wrapped = ClassificationModule(base_net(), 4)
    module = MergeModule(
        wrapped, {task: str(folder / task) for task in CLASSES}, base=str(folder / "base"),
        method=TaskArithmetic(0.5),
    )  # fmt: skip
    plain = merge_module(folder)
    for one in (module, plain):
        one.configure_model()
    inputs = torch.randn(3, 6)
    assert torch.equal(module.predict_task(inputs, "dtd"), plain.predict_task(inputs, "dtd"))


def test_data_may_name_the_tasks_in_another_order(folder, tmp_path):
    there, back = tiny_tasks(), dict(reversed(tiny_tasks().items()))
    results = []
    for tasks in (there, back):
        module = merge_module(folder)
        trainer = tiny_trainer(tmp_path, max_steps=0, max_epochs=-1, enable_checkpointing=False)
        data = MultiTaskDataModule(dict(tasks), batch_size=16)
        trainer.fit(module, datamodule=data)
        results.append(trainer.test(module, datamodule=data, verbose=False)[0])
    assert results[0] == pytest.approx(results[1])


def test_evaluation_before_and_after_a_fit_works_in_one_process(folder, tmp_path):
    # Trainer.validate and Trainer.test run in inference mode, the validation in a fit may not.
    module = merge_module(folder)
    trainer = tiny_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.validate(module, datamodule=tiny_data(), verbose=False)
    trainer.fit(module, datamodule=tiny_data())
    (result, _) = trainer.test(module, datamodule=tiny_data(), verbose=False)
    for task in CLASSES:
        inputs, labels = examples(task, TEST_SIZES[task], 2).tensors
        own = module.predict_task(inputs, task)
        assert result[f"test/{task}/accuracy"] == pytest.approx(
            float((own.argmax(-1) == labels).float().mean())
        )
        nll = -own[torch.arange(len(labels)), labels].log().mean()
        assert result[f"test/{task}/nll"] == pytest.approx(float(nll), rel=1e-5)
    mean = sum(result[f"test/{task}/accuracy"] for task in CLASSES) / 2
    assert result["test/accuracy"] == pytest.approx(mean)


def test_the_learning_rate_rises_and_falls_to_zero_over_the_fit(folder, tmp_path):
    rates: list[float] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(merge_module(folder, lr=0.02), tmp_path, Watch(), max_steps=4)
    falling = [0.02, 0.02 * 0.853553, 0.01, 0.02 * 0.146447]
    rising = [step / (RISING_STEPS + 1) for step in (1, 2, 3, 4)]
    assert rates == pytest.approx([a * b for a, b in zip(falling, rising, strict=True)], rel=1e-5)


@pytest.mark.parametrize("every", ["epoch", "step"])
def test_a_resumed_fit_ends_like_one_that_was_not_broken_off(folder, tmp_path, every):
    def keep() -> ModelCheckpoint:
        steps = {"every_n_train_steps": 5} if every == "step" else {}
        return ModelCheckpoint(tmp_path, save_top_k=-1, **steps)

    whole = fit(merge_module(folder), tmp_path, keep(), max_epochs=2)
    middle = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)[0]
    resumed = merge_module(folder)
    trainer = tiny_trainer(tmp_path, keep(), max_epochs=2)
    trainer.fit(resumed, datamodule=tiny_data(), ckpt_path=middle, weights_only=True)
    for name, value in corrections(whole).items():
        torch.testing.assert_close(corrections(resumed)[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_a_fit_runs_in_the_trainers_precision(folder, tmp_path, precision):
    expected = fit(merge_module(folder), tmp_path, max_epochs=1)
    module = fit(merge_module(folder), tmp_path, max_epochs=1, precision=precision)
    kinds = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert {value.dtype for value in corrections(module).values()} == {kinds[precision]}
    for name, value in corrections(module).items():
        torch.testing.assert_close(value.float(), corrections(expected)[name], atol=0.1, rtol=0)


@pytest.mark.distributed
def test_two_processes_fit_and_test_like_one(folder, tmp_path):
    results = []
    for ranks in (1, 2):
        module = merge_module(folder)
        trainer = tiny_trainer(
            tmp_path,
            devices=ranks,
            strategy="ddp_fork" if ranks == 2 else "auto",
            max_epochs=2,
            enable_checkpointing=False,
        )
        trainer.fit(module, datamodule=tiny_data(batch_size=16 // ranks))
        losses = {name: float(v) for name, v in trainer.callback_metrics.items() if "train" in name}
        trainer.test(module, datamodule=tiny_data(eval_batch_size=8 // ranks), verbose=False)
        measured = trainer.callback_metrics
        metrics = {name: float(value) for name, value in measured.items() if "test" in name}
        results.append((corrections(module), losses, metrics, bool(module.calibrated)))
    (one, one_losses, one_metrics, _), (two, two_losses, two_metrics, calibrated) = results
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-6
    assert one_losses == pytest.approx(two_losses, rel=1e-5)
    accuracies = [name for name in one_metrics if name.endswith("accuracy")]
    assert len(accuracies) == 3
    assert [one_metrics[name] for name in accuracies] == [two_metrics[name] for name in accuracies]
    assert one_metrics == pytest.approx(two_metrics, rel=1e-5)
    assert calibrated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"closed_form": "regmean"},
            "closed_form: must be one of tact, repair, none; got 'regmean'",
        ),
        ({"statistics": "none"}, "statistics: must be one of auto, calibration, stored"),
        ({"teacher": "expert"}, "teacher: must be one of experts, labels; got 'expert'"),
        ({"temperature": 0.0}, "temperature: must be positive and finite; got 0.0"),
        ({"lr": float("nan")}, "lr: must be positive and finite; got nan"),
        ({"calibration_examples": 1}, "calibration_examples: must be at least 2"),
        ({"merged": "merged"}, "base: must be left out where merged is given"),
    ],
)
def test_options_out_of_range_are_named(folder, options, message):
    with pytest.raises(InputError, match=message):
        merge_module(folder, **options)


def test_without_model_and_checkpoint_it_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="merged: must be given, or experts, or a checkpoint"):
        fit(MergeModule(base_net()), tmp_path)


def test_a_fit_that_needs_experts_says_so(folder, tmp_path):
    module = merge_module(folder)
    module.configure_model()
    module.save_corrected(tmp_path / "corrected")
    with pytest.raises(InputError, match="experts: must be given for a fit that learns from them"):
        fit(MergeModule(base_net(), merged=str(tmp_path / "corrected")), tmp_path)


def test_experts_must_be_those_of_the_merged_folder(folder, tmp_path):
    module = merge_module(folder)
    module.configure_model()
    module.save_corrected(tmp_path / "corrected")
    with pytest.raises(
        InputError, match="experts: must be those that were merged, svhn, dtd; got cars"
    ):
        MergeModule.from_folder(tmp_path / "corrected", base_net(), experts={"cars": "runs/cars"})


def test_tasks_of_the_data_must_be_the_experts(folder, tmp_path):
    trainer = tiny_trainer(tmp_path, enable_checkpointing=False)
    data = MultiTaskDataModule({"cars": tiny_tasks()["dtd"]})
    with pytest.raises(
        InputError, match="tasks: the data module must have the model's tasks, svhn"
    ):
        trainer.fit(merge_module(folder), datamodule=data)
    half = MultiTaskDataModule({"dtd": tiny_tasks()["dtd"]})
    with pytest.raises(InputError, match="must have the model's tasks, svhn, dtd; got dtd"):
        trainer.fit(merge_module(folder), datamodule=half)


def test_one_of_the_tasks_can_be_tested_alone(folder, tmp_path):
    trainer = tiny_trainer(tmp_path, enable_checkpointing=False)
    data = MultiTaskDataModule({"dtd": tiny_tasks()["dtd"]})
    (result,) = trainer.test(merge_module(folder), datamodule=data, verbose=False)
    assert {"test/dtd/accuracy", "test/accuracy"} <= set(result)
    assert "test/svhn/accuracy" not in result


def test_the_number_of_classes_must_be_the_width_of_the_head(folder, tmp_path):
    tasks = dict(tiny_tasks())
    tasks["dtd"] = DatasetTask(examples("dtd", 9, 0), num_classes=7)
    trainer = tiny_trainer(tmp_path, enable_checkpointing=False)
    with pytest.raises(
        InputError, match="task 'dtd': num_classes must be the width of its head, 3; got 7"
    ):
        trainer.fit(merge_module(folder), datamodule=MultiTaskDataModule(tasks))


def test_other_data_modules_are_refused(folder, tmp_path):
    trainer = tiny_trainer(tmp_path, enable_checkpointing=False)
    with pytest.raises(InputError, match="datamodule: must be a MultiTaskDataModule; got NoneType"):
        trainer.test(merge_module(folder), dataloaders=tiny_data().test_dataloader())


def test_another_network_is_refused_by_tensor(folder):
    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 13))
            self.head = nn.Linear(12, 4)

    experts = {task: str(folder / task) for task in CLASSES}
    module = MergeModule(Wider(), experts, base=str(folder / "base"), method=Average())
    with pytest.raises(
        InputError, match=r"merge of svhn, dtd: tensor 'body.2.* must have the shape"
    ):
        module.configure_model()


def test_labels_cannot_teach_an_unlabelled_task(folder, tmp_path):
    module = merge_module(folder, teacher="labels")
    trainer = tiny_trainer(tmp_path, enable_checkpointing=False)
    data = MultiTaskDataModule(dict(tiny_tasks(unlabelled=True)))
    with pytest.raises(
        InputError, match="teacher: must be \"experts\" for the unlabelled task 'svhn'"
    ):
        trainer.fit(module, datamodule=data)


def test_a_loss_that_is_not_finite_stops_the_fit(folder, tmp_path):
    module = merge_module(folder, closed_form="none", teacher="labels")
    module.configure_model()
    with torch.no_grad():
        next(module.network.corrections.parameters()).fill_(float("inf"))
    with pytest.raises(
        InputError, match="lr: must keep the loss finite; got NaN or infinity at step 0"
    ):
        fit(module, tmp_path, num_sanity_val_steps=0)


def test_heads_of_all_tasks_may_be_merged(folder, tmp_path):
    experts = {}
    for task in CLASSES:
        net = expert_net(task)
        net.head = nn.Linear(12, 4)
        from lit_merge.expert import ExpertInfo, write_expert

        write_expert(tmp_path / task, weights=net.state_dict(), info=ExpertInfo())
        experts[task] = str(tmp_path / task)
    module = merge_module(folder, experts=experts, policy=ParametersPolicy(heads="merge"))
    module.configure_model()
    assert module.network.head_names == ()
    assert module.predict_task(torch.randn(2, 6), "dtd").shape == (2, 4)


def test_stored_statistics_replace_a_run_of_the_expert(folder, tmp_path):
    from lit_merge.correction import to_tensors
    from lit_merge.expert import ExpertInfo, write_expert
    from tests.tiny_merge import HEAD

    module = merge_module(folder)
    module.configure_model()
    for task in CLASSES:
        net = expert_net(task)
        inputs, _ = tiny_data().calibration_batch(task, num_examples=256)
        found = gather_statistics(net, [inputs], module.network.sites)
        named = {f"model.{name}": value for name, value in to_tensors(found).items()}
        weights = {f"model.{name}": value for name, value in net.state_dict().items()}
        info = ExpertInfo(head_parameters=tuple(f"model.{name}" for name in HEAD))
        write_expert(tmp_path / task, weights=weights, info=info, activations=named)
    experts = {task: str(tmp_path / task) for task in CLASSES}
    stored = merge_module(folder, experts=experts, statistics="stored", teacher="labels")
    for one in (module, stored):
        fit(one, tmp_path, max_steps=0, max_epochs=-1)
    for name, value in corrections(module).items():
        torch.testing.assert_close(corrections(stored)[name], value)


class Doubled(RescaleShift):
    """A correction of a user's own."""


def test_a_correction_of_ones_own_is_used(folder, tmp_path):
    module = fit(merge_module(folder, correction=Doubled), tmp_path, max_epochs=1)
    assert all(isinstance(one, Doubled) for one in module.network.corrections.children())


def test_a_merge_with_masks_is_no_model_for_all_tasks(folder, tmp_path):
    experts = {task: str(folder / task) for task in CLASSES}
    with pytest.raises(InputError, match="method: must give one model for all tasks; got EMR"):
        MergeModule(base_net(), experts, base=str(folder / "base"), method=EMR())
    lit_merge.streaming.merge(
        str(folder / "base"), experts, EMR(), tmp_path / "masked", progress=False
    )
    with pytest.raises(InputError, match=r"masked: must be one model .*lit-merge export"):
        MergeModule.from_folder(tmp_path / "masked", base_net())
