"""The closed form inside a fit: what it calls, on one process and on two, and what it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

import lit_merge.streaming
from lit_merge.checkpoint import save_tensors
from lit_merge.correction import gather_statistics, run_model, to_tensors
from lit_merge.correction.batch_norm import reestimate_batch_norm
from lit_merge.correction.repair import fit_repair
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, write_expert
from lit_merge.least_squares.prefix_sweep import solve_in_prefix
from lit_merge.least_squares.settings import LeastSquares
from lit_merge.least_squares.teacher import Teacher
from lit_merge.merged.closed_form import ClosedFormSettings
from lit_merge.methods import GradientMatching, TaskArithmetic
from lit_merge.module import MergeModule
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

WHOLE = LeastSquares(ridge=0.02, sensitivity=0.0)
"""Without what depends on how the examples are put into batches."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    write_experts(path)
    return path


def fit(module: MergeModule, folder: Path, *callbacks: Callback, **options: Any) -> MergeModule:
    """Fit for no step, or as the options say."""
    settings = {"enable_checkpointing": False, "max_epochs": -1, "max_steps": 0}
    trainer = tiny_trainer(folder, *callbacks, **settings | {"limit_val_batches": 0} | options)
    trainer.fit(module, datamodule=tiny_data())
    return module


def state(module: MergeModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.network.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert sorted(one) == sorted(other)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=atol, msg=name)


def calibration(**options: Any) -> dict[int, list[Tensor]]:
    data = tiny_data()
    return {
        index: data.calibration_batches(task, num_examples=24, **options)
        for index, task in enumerate(CLASSES)
    }


@pytest.mark.parametrize("closed_form", ["none", "tact"])
def test_least_squares_are_the_sweep_over_the_calibration_examples(
    folder: Path, tmp_path: Path, closed_form: str
) -> None:
    options: dict[str, Any] = {"closed_form": closed_form, "calibration_examples": 24}
    module = fit(merge_module(folder, least_squares=LeastSquares(), **options), tmp_path)
    direct = merge_module(folder)
    direct.configure_model()
    before = state(direct)
    network = direct.network
    result = solve_in_prefix(
        network.network,
        [Teacher(expert_net(task), run_model) for task in CLASSES],
        [(task, inputs) for task, batches in calibration().items() for inputs in batches],
        context=network.context,
        forward=run_model,
        corrections=network.corrections if closed_form == "tact" else None,
    )
    assert_equal(state(module), state(direct))
    assert module.solved == result.layers
    assert [one.name for one in module.solved[:2]] == ["body.0", "body.2"]
    moved = {name for name, value in state(module).items() if not torch.equal(value, before[name])}
    assert "network.body.2.weight" in moved
    assert any("corrections" in name for name in moved) == (closed_form == "tact")


def test_experts_that_are_the_merge_leave_it_as_it_is(tmp_path: Path) -> None:
    paths = {}
    for task in ("base", *CLASSES):
        net = base_net()
        if task in CLASSES:
            net.head = expert_net(task).head
        info = ExpertInfo(head_parameters=HEAD)
        write_expert(tmp_path / task, weights=net.state_dict(), info=info)
        paths[task] = str(tmp_path / task)
    experts = {task: paths[task] for task in CLASSES}
    module = merge_module(tmp_path, experts=experts, least_squares=LeastSquares())
    module.configure_model()
    before = state(module)
    fit(module, tmp_path)
    assert module.solved
    assert all(one.before == pytest.approx(0, abs=1e-6) for one in module.solved)
    assert_equal(state(module), before, atol=1e-4)


def test_repair_is_one_scale_and_shift_for_all_tasks(folder: Path, tmp_path: Path) -> None:
    module = merge_module(folder, closed_form="repair", calibration_examples=24)
    fit(module, tmp_path)
    direct = merge_module(folder)
    direct.configure_model()
    network, batches = direct.network, calibration()
    statistics = {
        index: gather_statistics(expert_net(task), batches[index], network.sites)
        for index, task in enumerate(CLASSES)
    }
    fit_repair(
        network.network,
        network.corrections,
        network.context,
        batches=batches,
        expert_statistics=statistics,
    )
    assert_equal(state(module), state(direct))
    for correction in module.network.corrections.children():
        assert torch.equal(correction.weight[0], correction.weight[1])
        assert not torch.equal(correction.weight[0], torch.ones(12))


def norm_net() -> Any:
    net = base_net()
    net.body.insert(1, nn.BatchNorm1d(12))
    return net


def test_batch_norm_is_estimated_anew_over_the_calibration_examples(tmp_path: Path) -> None:
    for number, task in enumerate(("base", *CLASSES)):
        net = norm_net()
        torch.manual_seed(number)
        if task in CLASSES:
            net.head = expert_net(task).head
            net.body[0].weight.data += 0.4 * torch.randn_like(net.body[0].weight)
        info = ExpertInfo(head_parameters=HEAD)
        write_expert(tmp_path / task, weights=net.state_dict(), info=info)

    def make(**options: Any) -> MergeModule:
        return MergeModule(
            norm_net(), {task: str(tmp_path / task) for task in CLASSES},
            base=str(tmp_path / "base"), method=TaskArithmetic(0.5), **options,
        )  # fmt: skip

    options: dict[str, Any] = {"closed_form": "none", "calibration_examples": 24}
    module = fit(make(batch_norm="reestimate", **options), tmp_path, max_steps=0)
    direct = make()
    direct.configure_model()
    network = direct.network
    with network.corrections.disabled():
        reestimate_batch_norm(network.network, calibration(), context=network.context)
    assert_equal(state(module), state(direct))
    assert module.network.network.body[1].running_var.std() > 0.01


def write_with_statistics(folder: Path, path: Path, *, left_out: str = "") -> dict[str, str]:
    """Write the experts with statistics at all sites; one task may lack a site."""
    module = merge_module(folder)
    module.configure_model()
    experts = {}
    for task in CLASSES:
        net = expert_net(task)
        sites = [s for s in module.network.sites if task != left_out or s.name != "body.2"]
        inputs = tiny_data().calibration_batches(task, num_examples=9, seed=5)
        info = ExpertInfo(task=task, head_parameters=HEAD)
        write_expert(
            path / task,
            weights=net.state_dict(),
            info=info,
            activations=to_tensors(gather_statistics(net, inputs, sites)),
        )
        experts[task] = str(path / task)
    return experts


@pytest.mark.parametrize(("left_out", "taken"), [("", "stored"), ("dtd", "calibration")])
def test_stored_statistics_are_taken_where_all_of_them_are_there(
    folder: Path, tmp_path: Path, left_out: str, taken: str
) -> None:
    experts = write_with_statistics(folder, tmp_path, left_out=left_out)
    found = fit(merge_module(folder, experts=experts, statistics="auto"), tmp_path)
    expected = fit(merge_module(folder, experts=experts, statistics=taken), tmp_path)
    for name, value in state(expected).items():
        assert torch.equal(state(found)[name], value)


@pytest.mark.distributed
@pytest.mark.parametrize("options", [
    {"least_squares": WHOLE},
    {"least_squares": WHOLE, "closed_form": "none"},
    {"closed_form": "repair"},
])  # fmt: skip
def test_two_processes_solve_like_one(
    folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    # 37 and 61 examples do not divide by two.
    assert all(size % 2 for size in SIZES.values())
    one = fit(merge_module(folder, **options), tmp_path)
    two = fit(merge_module(folder, **options), tmp_path, devices=2, strategy="ddp_fork")
    assert_equal(state(two), state(one), atol=2e-5)


def test_a_corrected_folder_holds_what_was_solved(folder: Path, tmp_path: Path) -> None:
    module = fit(merge_module(folder, least_squares=LeastSquares()), tmp_path)
    module.save_corrected(tmp_path / "corrected")
    loaded = MergeModule.from_folder(tmp_path / "corrected", base_net())
    for name, value in state(module).items():
        assert torch.equal(state(loaded)[name], value)
    assert loaded.solved == module.solved
    assert loaded.record().solved == module.solved


def test_a_resumed_fit_does_not_solve_again(folder: Path, tmp_path: Path) -> None:
    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)

    options: dict[str, Any] = {"least_squares": LeastSquares(), "holdout": 0.0}
    whole = fit(
        merge_module(folder, **options), tmp_path, keep(), max_steps=4, enable_checkpointing=True
    )
    resumed = merge_module(folder, **options)
    trainer = tiny_trainer(tmp_path, keep(), max_epochs=-1, max_steps=4, limit_val_batches=0)
    calls: list[object] = []
    resumed._calibrate = calls.append  # type: ignore[method-assign]
    middle = tmp_path / "step=2.ckpt"
    trainer.fit(resumed, datamodule=tiny_data(), ckpt_path=middle, weights_only=True)
    assert not calls
    assert resumed.solved == whole.solved
    assert_equal(state(resumed), state(whole))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"closed_form": "repair", "least_squares": WHOLE}, 'closed_form: must be "tact" or'),
        ({"statistics": "stored", "least_squares": WHOLE}, 'statistics: must be "calibration"'),
        ({"batch_norm": "train"}, "batch_norm: must be one of keep, reestimate; got 'train'"),
        ({"examples": 1}, "calibration_examples: must be at least 2"),
    ],
)
def test_options_that_exclude_each_other_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClosedFormSettings(**options)


def test_a_precision_needs_a_merged_folder_with_a_hessian(folder: Path, tmp_path: Path) -> None:
    settings = LeastSquares(precision=1.0)
    with pytest.raises(InputError, match=r"least_squares.precision: must come with merged, a"):
        fit(merge_module(folder, least_squares=settings), tmp_path)
    experts = {task: str(folder / task) for task in CLASSES}
    lit_merge.streaming.merge(
        str(folder / "base"), experts, TaskArithmetic(0.5), tmp_path / "merged", progress=False
    )
    module = MergeModule(
        base_net(), experts, merged=str(tmp_path / "merged"), least_squares=settings
    )
    with pytest.raises(InputError, match=r"hessian.safetensors for least_squares.precision"):
        fit(module, tmp_path)


def test_the_merges_precision_holds_what_it_is_sure_of(folder: Path, tmp_path: Path) -> None:
    experts = {}
    for task in CLASSES:
        net = expert_net(task)
        hessian = {name: torch.ones_like(p) for name, p in net.named_parameters()}
        hessian["body.2.weight"][:6] = 1e6
        info = ExpertInfo(task=task, head_parameters=HEAD)
        write_expert(tmp_path / task, weights=net.state_dict(), info=info, hessian=hessian)
        experts[task] = str(tmp_path / task)
    path = tmp_path / "merged"
    lit_merge.streaming.merge(
        str(folder / "base"), experts, GradientMatching(), path, progress=False
    )
    settings = LeastSquares(ridge=0.01, precision=10.0)
    module = MergeModule(base_net(), experts, merged=str(path), least_squares=settings)
    module.configure_model()
    before = module.network.network.body[2].weight.detach().clone()
    fit(module, tmp_path)
    moved = (module.network.network.body[2].weight.detach() - before).abs().mean(dim=1)
    assert moved[:6].max() < 0.5 * moved[6:].min()


def test_an_expert_with_activations_of_nan_is_named_with_the_layer(
    folder: Path, tmp_path: Path
) -> None:
    write_experts(tmp_path)
    experts = {task: str(tmp_path / task) for task in CLASSES}
    module = merge_module(folder, experts=experts, least_squares=LeastSquares())
    module.configure_model()
    net = expert_net("dtd")
    net.body[2].bias.data[3] = float("nan")
    save_tensors(tmp_path / "dtd" / "model.safetensors", net.state_dict(), {"format": "pt"})
    with pytest.raises(InputError, match=r"body\.2.*task"):
        fit(module, tmp_path)
