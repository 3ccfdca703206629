"""Running statistics measured anew, against slow passes in float64 and against PyTorch's own."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from lit_merge.correction.batch_norm import (
    anchor_batch_norm,
    batch_norms,
    mix_statistics,
    reestimate_batch_norm,
)
from lit_merge.correction.corrections import Corrections
from lit_merge.correction.routing import TaskContext
from lit_merge.correction.sites import find_sites
from lit_merge.correction.statistics import ChannelStatistics, gather_statistics
from lit_merge.errors import InputError
from tests.processes import on_ranks
from tests.tiny_models import images, tiny_conv_net, tiny_vit


def tasks() -> dict[int, Tensor]:
    one, two = images(24, seed=1, channels=1), images(9, seed=2, channels=1) * 2 + 1
    return {0: one, 1: two}


def mixture(of_tasks: list[Tensor], *, weighting: str) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel of [B, C, H, W] per task, by the definition."""
    rows = [x.movedim(1, -1).reshape(-1, x.shape[1]).double() for x in of_tasks]
    total = sum(len(x) for x in rows)
    weights = [len(x) / total if weighting == "example" else 1 / len(rows) for x in rows]
    mean = sum(w * x.mean(0) for w, x in zip(weights, rows, strict=True))
    square = sum(w * (x - mean).square().mean(0) for w, x in zip(weights, rows, strict=True))
    return mean, square


@pytest.mark.parametrize("weighting", ["task", "example"])
def test_each_batch_norm_gets_what_reaches_it_behind_the_new_ones(weighting: str) -> None:
    model = tiny_conv_net()
    inputs = tasks()
    batches = {task: some.split(5) for task, some in inputs.items()}
    oracle = copy.deepcopy(model).double()
    assert reestimate_batch_norm(model, batches, weighting=weighting) == ("1", "4")
    for number in (1, 4):
        with torch.no_grad():
            reaching = [oracle[:number](some.double()) for some in inputs.values()]
        mean, variance = mixture(reaching, weighting=weighting)
        torch.testing.assert_close(model[number].running_mean, mean.float())
        torch.testing.assert_close(model[number].running_var, variance.float())
        oracle[number].running_mean.copy_(mean)
        oracle[number].running_var.copy_(variance)


def test_outputs_in_evaluation_are_those_of_training_on_the_same_batch() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    inputs = images(6)
    reestimate_batch_norm(model, {0: [inputs[:4], inputs[4:]]})
    with torch.no_grad():
        found = model(inputs)
        expected = copy.deepcopy(model).train()(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_with_heads_and_corrections_the_task_of_each_batch_is_known() -> None:
    model, context = tiny_conv_net(), TaskContext()
    corrections = Corrections(find_sites(model, where="0"), 2, context=context)
    corrections.attach(model)
    corrections.at("0").set_(1, torch.full((6,), 3.0), torch.zeros(6))
    inputs = tasks()
    reestimate_batch_norm(model, {t: [x] for t, x in inputs.items()}, context=context)
    with torch.no_grad(), corrections.disabled():
        reaching = [model[0](inputs[0]), 3 * model[0](inputs[1])]
    mean, _ = mixture(reaching, weighting="task")
    torch.testing.assert_close(model[1].running_mean, mean.float())


def test_buffers_keep_their_precision_and_all_else_its_value() -> None:
    model = tiny_conv_net().to(torch.bfloat16).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = tasks()[0].to(torch.bfloat16)
    reestimate_batch_norm(model, {0: [inputs]})
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        changed = name.endswith(("running_mean", "running_var"))
        assert torch.equal(value, before[name]) != changed, name
    assert model.training


def test_a_constant_channel_gets_variance_zero_and_its_mean() -> None:
    model = tiny_conv_net()
    with torch.no_grad():
        model[0].weight[2] = 0
    reestimate_batch_norm(model, {task: [some] for task, some in tasks().items()})
    assert model[1].running_var[2] == 0
    torch.testing.assert_close(model[1].running_mean[2], model[0].bias[2].detach())


def test_padding_does_not_count() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    reestimate_batch_norm(model, {0: [x]}, mask=lambda batch: mask)
    kept = torch.cat([x[0, :, :3], x[1, :, :1]], dim=1).double()
    torch.testing.assert_close(model[0].running_mean, kept.mean(1).float())
    torch.testing.assert_close(model[0].running_var, kept.var(1, correction=0).float())


def test_a_mixture_is_the_union_when_tasks_are_equally_large() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(8, 2, generator=generator) + n for n in range(3)]
    of_tasks = [ChannelStatistics.empty(2) for _ in rows]
    for one, values in zip(of_tasks, rows, strict=True):
        one.update(values)
    for weighting in ("task", "example"):
        mixed = mix_statistics(of_tasks, weighting=weighting)
        torch.testing.assert_close(mixed.mean, torch.cat(rows).double().mean(0))
        torch.testing.assert_close(mixed.variance, torch.cat(rows).double().var(0, correction=0))


def test_models_without_batch_norms_are_refused_or_left_alone() -> None:
    frozen = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False))
    for model in (tiny_vit(), frozen):
        assert batch_norms(model) == {}
        with pytest.raises(InputError, match="model: must have batch norms with running statist"):
            reestimate_batch_norm(model, {0: [images(2)]})
        assert reestimate_batch_norm(model, {0: [images(2)]}, required=False) == ()


def test_an_unknown_weighting_is_refused() -> None:
    with pytest.raises(InputError, match="weighting: must be task or example; got 'rows'"):
        reestimate_batch_norm(tiny_conv_net(), {0: []}, weighting="rows")  # type: ignore[arg-type]


def test_after_an_error_the_model_is_as_it_was() -> None:
    model = tiny_conv_net()
    with torch.no_grad():
        model[3].weight[0] = torch.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"site '4:input \(task 0\)': activations must be finite"):
        reestimate_batch_norm(model, {0: [tasks()[0]]})
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def _anchored(model: nn.Module, batches: dict[int, list[Tensor]], **options: Any) -> nn.Module:
    found = copy.deepcopy(model)
    norms = batch_norms(found, affine=True)
    assert anchor_batch_norm(found, norms, batches, **options) == tuple(norms)
    return found


def test_an_anchored_model_computes_what_it_did_with_the_statistics_of_its_inputs() -> None:
    model = tiny_conv_net().eval()
    with torch.no_grad():  # the second one as least squares leave it: an offset and nothing else
        model[4].weight.fill_(1)
        model[4].running_mean.zero_()
        model[4].running_var.fill_(1 - model[4].eps)
    inputs = tasks()
    found = _anchored(model, {task: list(some.split(5)) for task, some in inputs.items()})
    for some in inputs.values():
        torch.testing.assert_close(found(some), model(some), rtol=1e-5, atol=1e-5)
    for number in (1, 4):
        with torch.no_grad():
            reaching = [copy.deepcopy(model).double()[:number](x.double()) for x in inputs.values()]
        mean, variance = mixture(reaching, weighting="task")
        torch.testing.assert_close(found[number].running_mean, mean.float())
        torch.testing.assert_close(found[number].running_var, variance.float())


def test_training_begins_where_evaluation_is_once_anchored() -> None:
    model, inputs = tiny_conv_net().eval(), images(24, seed=1, channels=1)
    before = model(inputs)
    assert float((copy.deepcopy(model).train()(inputs) - before).detach().abs().max()) > 0.1
    found = _anchored(model, {0: [inputs]}).train()(inputs)
    torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-5)


def test_a_constant_channel_stays_constant_once_anchored() -> None:
    model = tiny_conv_net().eval()
    with torch.no_grad():
        model[0].weight[2] = 0
    inputs = images(8, seed=1, channels=1)
    found = _anchored(model, {0: [inputs]})
    assert found[1].running_var[2] == 0
    torch.testing.assert_close(found(inputs), model(inputs), rtol=1e-5, atol=1e-5)


def test_after_an_error_an_anchored_model_is_as_it_was() -> None:
    model = tiny_conv_net()
    with torch.no_grad():
        model[3].weight[0] = torch.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"site '4:input \(task 0\)': activations must be finite"):
        anchor_batch_norm(model, batch_norms(model), {0: [tasks()[0]]})
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_batch_norms_without_scale_and_shift_are_left_out_on_request() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3))
    assert list(batch_norms(model)) == ["0", "1"]
    assert list(batch_norms(model, affine=True)) == ["1"]


def _reestimated(batches: dict[int, list[Tensor]]) -> dict[str, list[float]]:
    model = tiny_conv_net()
    reestimate_batch_norm(model, batches)
    return {name: value.tolist() for name, value in model.state_dict().items() if "running" in name}


def _on_rank(rank: int, batches: list[dict[int, list[Tensor]]]) -> dict[str, list[float]]:
    return _reestimated(batches[rank])


@pytest.mark.distributed
def test_ranks_with_other_shares_agree_bit_for_bit(tmp_path: Path) -> None:
    inputs = tasks()
    shares = [
        {0: list(inputs[0].split(7)), 1: []},
        {0: [], 1: list(inputs[1].split(4))},
    ]
    found = on_ranks(partial(_on_rank, batches=shares), world_size=2, folder=tmp_path)
    assert found[0] == found[1]
    for name, value in _reestimated({task: [some] for task, some in inputs.items()}).items():
        torch.testing.assert_close(torch.tensor(found[0][name]), torch.tensor(value))


def test_statistics_behind_match_what_the_model_then_produces() -> None:
    model = tiny_conv_net()
    inputs = tasks()[0]
    reestimate_batch_norm(model, {0: inputs.split(6)})
    normalised = gather_statistics(model, [inputs], find_sites(model, where="norm"))
    for name, norm in batch_norms(model).items():
        scale, shift = norm.weight.detach().double(), norm.bias.detach().double()
        torch.testing.assert_close(normalised[name].mean, shift, rtol=0, atol=1e-5)
        torch.testing.assert_close(normalised[name].std, scale.abs(), rtol=1e-3, atol=0)
