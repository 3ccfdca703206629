"""One pass with all batches in step: as one big batch, on one rank or several."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lit_merge.correction.corrections import Corrections
from lit_merge.correction.repair import fit_repair
from lit_merge.correction.routing import TaskContext
from lit_merge.correction.site import Site
from lit_merge.correction.site_pass import StatisticsOfTasks, visit_sites
from lit_merge.correction.sites import find_sites
from lit_merge.correction.statistics import ChannelStatistics, gather_statistics
from lit_merge.correction.tact import fit_tact
from lit_merge.errors import InputError
from tests.processes import on_ranks
from tests.sharded_nets import VOCABULARY, shard_fully, small_transformer
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_conv_net, tiny_vit

Batches = dict[int, list[Tensor]]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    return nn.Sequential(*layers).double()


def examples(task: int, count: int = 23) -> Tensor:
    generator = torch.Generator().manual_seed(task)
    return torch.randn(count, 4, generator=generator, dtype=torch.float64) * (task + 1) + task


def goals(sites: tuple[Site, ...], task: int) -> dict[str, ChannelStatistics]:
    generator = torch.Generator().manual_seed(100 + task)
    return {
        site.name: ChannelStatistics(
            10,
            torch.randn(site.num_features, generator=generator, dtype=torch.float64),
            10 * torch.rand(site.num_features, generator=generator, dtype=torch.float64) + 1,
        )
        for site in sites
    }


def fitted(batches: Batches, *, fit=fit_tact, where: str = "linear") -> dict[str, Tensor]:
    model, context = net(), TaskContext()
    corrections = Corrections(find_sites(model, where=where), 2, context=context).double()
    corrections.attach(model)
    statistics = {task: goals(corrections.sites, task) for task in (0, 1)}
    fit(model, corrections, context, batches=batches, expert_statistics=statistics)
    return {name: value.detach().clone() for name, value in corrections.state_dict().items()}


def split(sizes: dict[int, list[int]]) -> Batches:
    return {task: list(examples(task).split(parts)) for task, parts in sizes.items()}


WHOLE = {0: [23], 1: [23]}
SPLITS = ({0: [1, 20, 2], 1: [23]}, {0: [7, 7, 7, 2], 1: [11, 12]}, {1: [5, 18], 0: [23]})


@pytest.mark.parametrize("fit", [fit_tact, fit_repair])
@pytest.mark.parametrize("sizes", SPLITS)
def test_any_batching_gives_the_numbers_of_one_batch(fit, sizes: dict[int, list[int]]) -> None:
    expected, found = fitted(split(WHOLE), fit=fit), fitted(split(sizes), fit=fit)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


def test_tasks_together_are_tasks_one_by_one() -> None:
    together = fitted(split(WHOLE))
    model, context = net(), TaskContext()
    corrections = Corrections(find_sites(model), 2, context=context).double()
    corrections.attach(model)
    for task in (1, 0):
        fit_tact(
            model,
            corrections,
            context,
            batches={task: [examples(task)]},
            expert_statistics={task: goals(corrections.sites, task)},
        )
    for name, value in corrections.state_dict().items():
        torch.testing.assert_close(value, together[name], rtol=1e-12, atol=1e-12)


def test_inputs_of_layers_are_fitted_as_their_outputs_are() -> None:
    # A layer's input behind tanh: the tanh's output, so both sites get the same numbers.
    model, context = net(), TaskContext()
    hidden: list[Tensor] = []
    for sites in ((Site("2:input", 6, -1),), (Site("1", 6, -1),)):
        corrections = Corrections(sites, 1, context=context).double()
        corrections.attach(model)
        statistics = {sites[0].name: goals((Site("1", 6, -1),), 0)["1"]}
        fit_tact(
            model,
            corrections,
            context,
            batches={0: list(examples(0).split(10))},
            expert_statistics={0: statistics},
        )
        with context.using(0):
            hidden.clear()
            handle = model[2].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
            output = model(examples(0))
            handle.remove()
        goal = statistics[sites[0].name]
        torch.testing.assert_close(hidden[0].mean(0), goal.mean)
        torch.testing.assert_close(hidden[0].var(0, correction=0), goal.variance)
        corrections.detach()
        torch.testing.assert_close(output, model[4](model[2](hidden[0]).tanh()))


def test_every_site_of_a_real_net_has_its_experts_statistics_on_every_task() -> None:
    for build, batches in (
        (tiny_vit, {t: list(images(40, seed=t).split(16)) for t in (0, 1)}),
        (tiny_conv_net, {t: list(images(40, seed=t, channels=1).split(16)) for t in (0, 1)}),
        (tiny_bert, {t: [padded_texts((9, 4, 7), s + t) for s in (1, 5, 9)] for t in (0, 1)}),
    ):
        model, context = build(0), TaskContext()
        corrections = Corrections(find_sites(model), 2, context=context)
        goal = {t: gather_statistics(build(t + 1), batches[t], corrections.sites) for t in (0, 1)}
        corrections.attach(model)
        fit_tact(model, corrections, context, batches=batches, expert_statistics=goal)
        for task in (0, 1):
            with context.using(task):
                after = gather_statistics(model, batches[task], corrections.sites)
            for name, one in goal[task].items():
                size = one.variance.mean().sqrt().item()
                torch.testing.assert_close(after[name].mean, one.mean, rtol=0, atol=1e-4 * size)
                torch.testing.assert_close(after[name].std, one.std, rtol=0, atol=1e-4 * size)


def test_sixteen_and_five_hundred_examples_both_fit_exactly() -> None:
    for count in (16, 512):
        inputs = examples(0, count)
        model, context = net(), TaskContext()
        corrections = Corrections(find_sites(model), 1, context=context).double()
        corrections.attach(model)
        goal = goals(corrections.sites, 0)
        fit_tact(
            model, corrections, context, batches={0: inputs.split(100)}, expert_statistics={0: goal}
        )
        with context.using(0):
            after = gather_statistics(model, [inputs], corrections.sites)
        for name, one in goal.items():
            torch.testing.assert_close(after[name].mean, one.mean)
            torch.testing.assert_close(after[name].std, one.std)


def test_a_constant_channel_gets_the_experts_mean_and_keeps_its_scale() -> None:
    model, context = net(), TaskContext()
    with torch.no_grad():
        model[0].weight[2] = 0
    corrections = Corrections((Site("0", 6, -1),), 1, context=context).double()
    corrections.attach(model)
    goal = goals(corrections.sites, 0)
    fit_tact(
        model,
        corrections,
        context,
        batches={0: examples(0).split(5)},
        expert_statistics={0: goal},
    )
    assert corrections.at("0").weight[0, 2] == 1
    found = model[0].bias[2] + corrections.at("0").bias[0, 2]
    torch.testing.assert_close(found, goal["0"].mean[2])


def test_visits_come_in_forward_order_with_the_statistics_of_all_batches() -> None:
    model, seen = net(), {}
    sites = find_sites(model)[::-1]

    def visit(site: Site, statistics: StatisticsOfTasks) -> None:
        seen[site.name] = statistics

    ran = visit_sites(model, sites, split({0: [20, 3], 1: [4, 4, 15]}), visit)
    assert ran == tuple(seen) == ("0", "2", "4")
    for task in (0, 1):
        for name, one in gather_statistics(model, [examples(task)], sites).items():
            assert seen[name][task].count == one.count == 23
            torch.testing.assert_close(seen[name][task].mean, one.mean)
            torch.testing.assert_close(seen[name][task].m2, one.m2)


@pytest.mark.parametrize("broken", [False, True])
def test_a_forward_that_changes_the_default_dtype_changes_it_for_itself_alone(broken: bool) -> None:
    def forward(model: nn.Module, batch: Tensor) -> None:
        outside = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model(batch)
            assert torch.get_default_dtype() is torch.bfloat16
        finally:
            torch.set_default_dtype(outside)

    def visit(site: Site, statistics: StatisticsOfTasks) -> None:
        assert torch.get_default_dtype() is torch.float32
        if broken and site.name == "2":
            raise InputError("broken")

    batches = split({0: [20, 3], 1: [4, 4, 15]})
    if broken:
        with pytest.raises(InputError, match="broken"):
            visit_sites(net(), find_sites(net()), batches, visit, forward=forward)
    else:
        visit_sites(net(), find_sites(net()), batches, visit, forward=forward)
    assert torch.get_default_dtype() is torch.float32


def refused(match: str, batches: Batches, **options: object) -> None:
    model, context = net(), TaskContext()
    corrections = Corrections(find_sites(model), 2, context=context).double()
    corrections.attach(model)
    statistics = {task: goals(corrections.sites, task) for task in (0, 1)}
    before = {name: value.clone() for name, value in corrections.state_dict().items()}
    arguments = {"batches": batches, "expert_statistics": statistics, **options}
    with pytest.raises(InputError, match=match):
        fit_tact(model, corrections, context, **arguments)
    assert all(torch.equal(before[name], value) for name, value in corrections.state_dict().items())


def test_a_task_without_calibration_data_is_refused() -> None:
    refused("batches: task 1 must have calibration examples; got none", {0: [examples(0)], 1: []})


def test_a_task_without_expert_is_refused() -> None:
    refused(
        "expert_statistics: must have those of every task.*none of task 1",
        split(WHOLE),
        expert_statistics={0: goals(find_sites(net()), 0)},
    )


def test_nan_in_any_batch_is_refused_with_site_and_task() -> None:
    batches = split({0: [23], 1: [20, 3]})
    batches[1][1][2, 0] = torch.nan
    refused(r"site '0 \(task 1\)': activations must be finite", batches)


def test_a_task_whose_tokens_are_all_padding_is_refused() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    refused(
        "site '0': must have values of task 1 that count; got none",
        {0: [x], 1: [-x.abs()]},
        mask=lambda batch: torch.ones(2, 3) * bool((batch > 0).any()),
    )


# Rank by rank: which batches of which task it has; together always the 23 examples of each.
UNEVEN = (
    lambda rank: {t: examples(t).split([3, 9, 11])[rank : rank + 1] for t in (0, 1)},
    lambda rank: {0: examples(0).split([3, 20])[rank : rank + 1], 1: [examples(1)][rank:]},
    lambda rank: {0: [], 1: []} if rank == 0 else split({0: [10, 13], 1: [1, 22]}),
)


def _fit_on_rank(rank: int, which: int, fit) -> dict[str, list[list[float]]]:
    batches = {task: list(some) for task, some in UNEVEN[which](rank).items()}
    return {name: value.tolist() for name, value in fitted(batches, fit=fit).items()}


@pytest.mark.distributed
@pytest.mark.parametrize("which", range(len(UNEVEN)))
def test_any_split_over_ranks_gives_the_numbers_of_one_batch(which: int, tmp_path: Path) -> None:
    ranks = 3 if which == 0 else 2
    fit = fit_repair if which == 1 else fit_tact
    run = partial(_fit_on_rank, which=which, fit=fit)
    found = on_ranks(run, world_size=ranks, folder=tmp_path)
    assert all(of_rank == found[0] for of_rank in found)  # bit for bit
    for name, value in fitted(split(WHOLE), fit=fit).items():
        torch.testing.assert_close(
            torch.tensor(found[0][name], dtype=torch.float64), value, rtol=1e-10, atol=1e-12
        )


def _broken_on_rank(rank: int, case: str) -> None:
    batches = split(WHOLE)
    if case == "nan" and rank == 1:
        batches[0][0][0, 0] = torch.nan
    if case == "forward" and rank == 1:
        batches[1] = [torch.zeros(2, 99, dtype=torch.float64)]
    if case == "idle":
        batches = {0: [examples(0)], 1: []}
    if case == "other net":
        model = net()
        sites = find_sites(model)[: 2 + rank]
        visit_sites(model, sites, batches, lambda *_: None)
    fitted(batches)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "messages"),
    [
        ("nan", ("site '0 (task 0)': activations must be finite",) * 2),
        ("forward", ("rank 1: ", "mat1 and mat2")),
        ("idle", ("batches: task 1 must have calibration examples",) * 2),
        ("other net", ("must run the same sites in the same order on every rank",) * 2),
    ],
)
def test_an_error_on_one_rank_ends_all(
    case: str, messages: tuple[str, str], tmp_path: Path
) -> None:
    found = on_ranks(partial(_broken_on_rank, case=case), world_size=2, folder=tmp_path)
    assert all(message in text for message, text in zip(messages, found, strict=True)), found


def _fit_sharded(rank: int, shares: list[dict[int, list[Tensor]]]) -> dict[str, list[float]]:
    from torch.distributed.device_mesh import init_device_mesh

    model, context = small_transformer(), TaskContext()
    sites = find_sites(model, where=["blocks.*.up", "blocks.*.down", "blocks.*.down:input"])
    shard_fully(model, init_device_mesh("cpu", (2,)))
    return _fit_transformer(model, sites, context, shares[rank])


def _fit_transformer(
    model: nn.Module,
    sites: tuple[Site, ...],
    context: TaskContext,
    batches: dict[int, list[Tensor]],
) -> dict[str, list[float]]:
    corrections = Corrections(sites, 2, context=context)
    corrections.attach(model)
    statistics = {task: goals(sites, task) for task in (0, 1)}
    fit_tact(model, corrections, context, batches=batches, expert_statistics=statistics)
    return {name: value.flatten().tolist() for name, value in corrections.state_dict().items()}


@pytest.mark.distributed
@pytest.mark.parametrize("idle", [False, True])
def test_a_sharded_model_is_fitted_as_a_whole_one(idle: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    words = {t: torch.randint(0, VOCABULARY, (9, 4), generator=generator) for t in (0, 1)}
    shares = [
        {0: list(words[0].split(4)), 1: [words[1][:2]]},
        {0: [], 1: [words[1][2:]]},
    ]
    if idle:
        shares = [{0: list(words[0].split(5)), 1: [words[1]]}, {0: [], 1: []}]
    run = partial(_fit_sharded, shares=shares)
    found = on_ranks(run, world_size=2, folder=tmp_path)
    assert found[0] == found[1]
    model = small_transformer()
    sites = find_sites(model, where=["blocks.*.up", "blocks.*.down", "blocks.*.down:input"])
    whole = _fit_transformer(model, sites, TaskContext(), {t: [x] for t, x in words.items()})
    for name, value in whole.items():
        torch.testing.assert_close(
            torch.tensor(found[0][name]), torch.tensor(value), rtol=1e-4, atol=1e-5
        )
