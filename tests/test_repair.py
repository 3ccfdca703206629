"""REPAIR against a slow pass per layer in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_merge.correction.corrections import Corrections
from lit_merge.correction.repair import average_statistics, fit_repair
from lit_merge.correction.routing import TaskContext
from lit_merge.correction.sites import find_sites
from lit_merge.correction.statistics import ChannelStatistics, gather_statistics
from lit_merge.errors import InputError


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def examples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(n, 4, generator=generator, dtype=torch.float64) + n for n in (30, 11, 5)]


def repaired(num_tasks: int = 3) -> tuple[nn.Module, Corrections, TaskContext]:
    model, context, inputs = net(0), TaskContext(), examples()
    corrections = Corrections(find_sites(model), num_tasks, context=context).double()
    corrections.attach(model)
    statistics = {
        task: gather_statistics(net(task + 1), [inputs[task]], corrections.sites)
        for task in range(3)
    }
    batches = {task: some.split(7) for task, some in enumerate(inputs)}
    fit_repair(model, corrections, context, batches=batches, expert_statistics=statistics)
    return model, corrections, context


def test_the_numbers_are_those_of_a_pass_for_every_layer() -> None:
    _, corrections, _ = repaired()
    merged, experts, inputs = net(0), [net(task + 1) for task in range(3)], examples()
    x = torch.cat(inputs)
    for number, site in enumerate(corrections.sites):
        z = merged[2 * number](x.relu() if number else x)
        outputs = []
        for expert, own in zip(experts, inputs, strict=True):
            hidden = expert[0](own)
            outputs.append(expert[2](hidden.relu()) if number else hidden)
        goal_mean = sum(out.mean(0) for out in outputs) / 3
        goal_std = sum(out.std(0, correction=0) for out in outputs) / 3
        scale = goal_std / z.std(0, correction=0)
        shift = goal_mean - scale * z.mean(0)
        for task in range(3):
            torch.testing.assert_close(corrections.at(site).weight[task], scale)
            torch.testing.assert_close(corrections.at(site).bias[task], shift)
        x = z * scale + shift


def test_all_tasks_of_the_model_get_the_same_numbers_also_those_without_examples() -> None:
    _, corrections, _ = repaired(num_tasks=5)
    for value in corrections.parameters():
        assert (value == value[0]).all()
        assert not torch.equal(value[0], torch.ones_like(value[0]))


def test_the_average_of_one_expert_is_it() -> None:
    one = ChannelStatistics(7, torch.tensor([1.0, -2.0]), torch.tensor([14.0, 0.0]))
    found = average_statistics([one])
    torch.testing.assert_close(found.mean, one.mean)
    torch.testing.assert_close(found.variance, one.variance)


def test_an_expert_of_another_width_is_refused() -> None:
    model, context = net(0), TaskContext()
    corrections = Corrections(find_sites(model), 1, context=context).double()
    corrections.attach(model)
    narrow = {"0": ChannelStatistics(3, torch.zeros(2), torch.ones(2))}
    with pytest.raises(InputError, match="site '0' must have 6 channels and examples; got 2"):
        fit_repair(
            model,
            corrections,
            context,
            batches={0: examples()[:1]},
            expert_statistics={0: narrow},
        )
