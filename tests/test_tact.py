from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lit_merge.correction.corrections import Corrections
from lit_merge.correction.heads import install_heads
from lit_merge.correction.routing import TaskContext
from lit_merge.correction.sites import Site, find_sites
from lit_merge.correction.statistics import ChannelStatistics, gather_statistics
from lit_merge.correction.tact import fit_tact, match_statistics
from lit_merge.errors import InputError
from tests.references import tact_by_passes
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_conv_net, tiny_vit


def chain(seed: int, widths: tuple[int, ...] = (4, 6, 5, 3)) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def average(*models: nn.Module) -> dict[str, Tensor]:
    states = [model.state_dict() for model in models]
    return {
        name: sum(state[name] for state in states) / len(states)
        if value.is_floating_point()
        else value
        for name, value in states[0].items()
    }


def merged_and_corrections(
    build, *, num_tasks: int = 2, **options: object
) -> tuple[nn.Module, Corrections, TaskContext]:
    model = build(0)
    model.load_state_dict(average(build(0), build(1)))
    context = TaskContext()
    corrections = Corrections(find_sites(model, **options), num_tasks, context=context)
    corrections.attach(model)
    return model, corrections, context


def corrected_statistics(
    model: nn.Module, inputs: object, sites: tuple[Site, ...], context: TaskContext, task: int
) -> dict[str, ChannelStatistics]:
    with context.using(task):  # hooks of the measurement come after those of the corrections
        return gather_statistics(model, [inputs], sites)


BUILDS = {
    "vit": (tiny_vit, images(24)),
    "conv": (tiny_conv_net, images(24, channels=1)),
    "bert": (tiny_bert, padded_texts((9, 4, 7, 5, 9, 3, 8, 6))),
    "chain": (chain, torch.randn(64, 4, generator=torch.Generator().manual_seed(9))),
}


@pytest.mark.parametrize(("build", "inputs"), BUILDS.values(), ids=BUILDS)
def test_the_corrected_model_has_the_experts_statistics_at_every_site(build, inputs):
    model, corrections, context = merged_and_corrections(build)
    expert = gather_statistics(build(1), [inputs], corrections.sites)
    plain = corrected_statistics(model, inputs, corrections.sites, context, 1)
    fit_tact(model, corrections, context, batches={1: [inputs]}, expert_statistics={1: expert})
    after = corrected_statistics(model, inputs, corrections.sites, context, 1)
    for name, goal in expert.items():
        size = goal.variance.mean().sqrt().item()
        torch.testing.assert_close(after[name].mean, goal.mean, rtol=1e-5, atol=1e-5 * size)
        torch.testing.assert_close(after[name].std, goal.std, rtol=1e-5, atol=1e-5 * size)
    assert any(
        not torch.allclose(plain[name].std, goal.std, rtol=0.1) for name, goal in expert.items()
    )


def test_one_forward_equals_a_pass_for_every_site():
    inputs = BUILDS["chain"][1]
    model, corrections, context = merged_and_corrections(chain)
    expert = chain(1)
    fits = tact_by_passes(
        [(layer.weight.detach(), layer.bias.detach()) for layer in model[::2]],
        [(layer.weight.detach(), layer.bias.detach()) for layer in expert[::2]],
        inputs,
    )
    fit_tact(
        model,
        corrections,
        context,
        batches={0: [inputs]},
        expert_statistics={0: gather_statistics(expert, [inputs], corrections.sites)},
    )
    for site, (scale, shift) in zip(corrections.sites, fits, strict=True):
        correction = corrections.at(site)
        torch.testing.assert_close(correction.weight[0].double(), scale, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(correction.bias[0].double(), shift, rtol=1e-4, atol=1e-5)
        assert (correction.weight[1] == 1).all()
        assert (correction.bias[1] == 0).all()


@pytest.mark.parametrize(("build", "inputs"), BUILDS.values(), ids=BUILDS)
def test_a_model_that_is_its_own_expert_gets_the_identity(build, inputs):
    model = build(0)
    context = TaskContext()
    sites = find_sites(model)
    corrections = Corrections(sites, 1, context=context)
    statistics = gather_statistics(model, [inputs], sites)
    corrections.attach(model)
    fit_tact(model, corrections, context, batches={0: [inputs]}, expert_statistics={0: statistics})
    for site in sites:
        correction = corrections.at(site)
        spread = statistics[site.name].std.mean().item()
        assert (correction.weight - 1).abs().max() < 1e-4
        assert correction.bias.abs().max() < 1e-4 * max(1, spread)


def test_tokens_of_padding_have_no_part_in_the_fit():
    fits = []
    for pad_token in (0, 9):
        inputs = padded_texts((9, 2, 3, 4), pad_token=pad_token)
        model, corrections, context = merged_and_corrections(tiny_bert)
        expert = gather_statistics(tiny_bert(1), [inputs], corrections.sites)
        fit_tact(model, corrections, context, batches={0: [inputs]}, expert_statistics={0: expert})
        fits.append({name: value.clone() for name, value in corrections.state_dict().items()})
    for name, value in fits[0].items():
        torch.testing.assert_close(value, fits[1][name], rtol=1e-4, atol=1e-4)


def test_heads_of_the_task_run_while_it_is_fitted():
    inputs = images(8)
    model, corrections, context = merged_and_corrections(tiny_vit, exclude=["head"])
    heads = {
        task: {"head.weight": torch.randn(width, 32), "head.bias": torch.randn(width)}
        for task, width in (("a", 2), ("b", 3))
    }
    install_heads(model, heads, context, tasks=("a", "b"))
    ran = []
    for task, head in model.head.heads.items():
        head.register_forward_hook(lambda _, __, ___, task=task: ran.append(task))
    expert = gather_statistics(tiny_vit(1), [inputs], corrections.sites)
    fit_tact(model, corrections, context, batches={1: [inputs]}, expert_statistics={1: expert})
    assert ran == ["b"]


def test_fitting_leaves_modes_hooks_weights_and_gradients_alone():
    model, corrections, context = merged_and_corrections(tiny_conv_net)
    model.train()
    inputs = images(4, channels=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expert = gather_statistics(tiny_conv_net(1), [inputs], corrections.sites)
    fit_tact(model, corrections, context, batches={0: [inputs]}, expert_statistics={0: expert})
    assert model.training
    assert model[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [len(module._forward_hooks) for module in model] == [0, 1, 0, 0, 1, 0, 0, 0, 0]
    assert all(parameter.grad is None for parameter in corrections.parameters())
    assert all(parameter.requires_grad for parameter in corrections.parameters())


def test_fitting_again_gives_the_same():
    model, corrections, context = merged_and_corrections(tiny_vit)
    inputs = images(8)
    expert = gather_statistics(tiny_vit(1), [inputs], corrections.sites)

    def fitted() -> dict[str, Tensor]:
        fit_tact(model, corrections, context, batches={0: [inputs]}, expert_statistics={0: expert})
        return {name: value.clone() for name, value in corrections.state_dict().items()}

    first, second = fitted(), fitted()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_constant_channel_keeps_its_scale_and_gets_the_experts_mean():
    values = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    values[:, 1] = 7.0
    goal = torch.randn(30, 3, generator=torch.Generator().manual_seed(1)) * 4 - 1
    goal[:, 2] = 5.0
    merged, expert = ChannelStatistics.empty(3), ChannelStatistics.empty(3)
    merged.update(values)
    expert.update(goal)
    scale, shift = match_statistics(merged, expert)
    after = values.double() * scale + shift
    torch.testing.assert_close(after.mean(0), expert.mean)
    assert scale[1] == 1
    assert scale[2] == 0
    torch.testing.assert_close(after[:, 0].std(correction=0), expert.std[0])


def test_a_spread_that_is_only_rounding_counts_as_constant():
    merged = ChannelStatistics(10, torch.tensor([1e4]), torch.tensor([1e-7]))
    expert = ChannelStatistics(10, torch.tensor([2.0]), torch.tensor([10.0]))
    scale, shift = match_statistics(merged, expert)
    assert scale.item() == 1
    assert shift.item() == 2 - 1e4


def check_refused(
    match: str, model, corrections, context, *, task: int = 0, of_expert=None, **changes: object
) -> None:
    inputs = images(4, channels=1)
    if of_expert is None:
        of_expert = gather_statistics(tiny_conv_net(1), [inputs], corrections.sites)
    options = {
        "batches": {task: [inputs]},
        "expert_statistics": {task: of_expert},
        **changes,
    }
    before = {name: value.clone() for name, value in corrections.state_dict().items()}
    with pytest.raises(InputError, match=match):
        fit_tact(model, corrections, context, **options)
    assert all(torch.equal(before[name], value) for name, value in corrections.state_dict().items())
    assert sum(len(module._forward_hooks) for module in model.modules()) == (
        len(corrections.sites) if corrections.attached else 0
    )


def test_detached_or_disabled_corrections_are_refused():
    model, corrections, context = merged_and_corrections(tiny_conv_net)
    with corrections.disabled():
        check_refused(
            "corrections: must be attached to the model and enabled", model, corrections, context
        )
    corrections.detach()
    check_refused(
        "corrections: must be attached to the model and enabled", model, corrections, context
    )


def test_unknown_tasks_are_refused():
    setting = merged_and_corrections(tiny_conv_net)
    for task in (2, -1):
        check_refused(
            f"task: must be the index of one of the 2 tasks; got {task}", *setting, task=task
        )


def test_missing_or_foreign_statistics_are_refused_by_site_and_nothing_is_half_fitted():
    setting = merged_and_corrections(tiny_conv_net)
    good = gather_statistics(tiny_conv_net(1), [images(4, channels=1)], setting[1].sites)
    narrow = ChannelStatistics(3, torch.zeros(2), torch.ones(2))
    broken = ChannelStatistics(3, torch.zeros(8) / 0, torch.ones(8))
    for statistics, match in (
        ({"1": good["1"]}, "must have every site that runs; got none for '4'"),
        ({**good, "4": narrow}, "site '4' must have 8 channels and examples; got 2 channels of 3"),
        ({**good, "4": ChannelStatistics.empty(8)}, "got 8 channels of 0 rows"),
        ({**good, "4": broken}, "site '4': activations must be finite"),
    ):
        check_refused(match, *setting, of_expert=statistics)


def test_nan_activations_are_refused_by_site():
    model, corrections, context = merged_and_corrections(tiny_conv_net)
    with torch.no_grad():
        model[3].weight[0] = torch.nan
    check_refused(r"site '4 \(task 0\)': activations must be finite", model, corrections, context)


def test_a_forward_that_runs_no_site_is_refused():
    setting = merged_and_corrections(tiny_conv_net)
    check_refused("batches: must run at least one of the 2 sites", *setting, forward=lambda m, x: x)


def test_a_correction_without_a_closed_form_is_refused():
    class Learned(nn.Module):
        def __init__(self, num_tasks: int, num_features: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(num_tasks, num_features))

        def forward(self, x: Tensor, task: Tensor) -> Tensor:
            return x

    model, context = tiny_conv_net(), TaskContext()
    corrections = Corrections(find_sites(model), 1, Learned, context=context)
    corrections.attach(model)
    check_refused(
        r"must have set_\(task, scale, shift\).*got a Learned", model, corrections, context
    )


def test_a_site_that_runs_twice_in_a_forward_is_refused():
    layer = nn.Linear(3, 3)
    model, context = nn.Sequential(layer, nn.Tanh(), layer), TaskContext()
    inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    corrections = Corrections(find_sites(model), 1, context=context)
    statistics = gather_statistics(model, [inputs], corrections.sites)
    corrections.attach(model)
    with pytest.raises(InputError, match=r"site '0': must run once in a forward"):
        fit_tact(
            model, corrections, context, batches={0: [inputs]}, expert_statistics={0: statistics}
        )
    assert (corrections.at("0").weight == 1).all()


def test_sites_that_do_not_run_keep_their_identity():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    context = TaskContext()
    corrections = Corrections(find_sites(model), 1, context=context)
    corrections.attach(model)
    expert = {"used": ChannelStatistics(5, torch.full((2,), 3.0), torch.full((2,), 20.0))}
    inputs = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    fit_tact(
        model,
        corrections,
        context,
        batches={0: [inputs]},
        expert_statistics={0: expert},
        forward=lambda m, x: m["used"](x),
    )
    with context.using(0):
        out = model["used"](inputs)
    torch.testing.assert_close(out.mean(0), torch.full((2,), 3.0))
    torch.testing.assert_close(out.std(0, correction=0), torch.full((2,), 2.0))
    assert (corrections.at("unused").weight == 1).all()
