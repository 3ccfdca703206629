"""The sweep: its laws, RegMean and RegMean++, and slow loops that run the whole prefix anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_merge.correction import fit_tact, gather_statistics, run_model
from lit_merge.correction.corrections import Corrections
from lit_merge.correction.routing import TaskContext, TaskRouter
from lit_merge.correction.sites import find_sites
from lit_merge.errors import InputError
from lit_merge.least_squares.layer_solver import SolvedLayer
from lit_merge.least_squares.prefix_sweep import SweepResult, Teacher, solve_in_prefix
from lit_merge.least_squares.settings import LeastSquares
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_conv_net, tiny_vit

EXACT = LeastSquares(ridge=0.01, sensitivity=0.0, max_rows=None)
"""What does not depend on chance, nor on how the examples are split."""


def sweep(
    model: nn.Module,
    experts: Sequence[nn.Module],
    batches: Sequence[tuple[int, Any]],
    settings: LeastSquares = EXACT,
    corrections: Corrections | None = None,
    **options: Any,
) -> SweepResult:
    context = corrections.context if corrections else TaskContext()
    teachers = [Teacher(expert, run_model) for expert in experts]
    return solve_in_prefix(
        model,
        teachers,
        batches,
        settings,
        context=context,
        forward=run_model,
        corrections=corrections,
        **options,
    )


def corrected(model: nn.Module, tasks: int, where: str = "auto") -> Corrections:
    corrections = Corrections(find_sites(model, where=where), tasks, context=TaskContext())
    corrections.attach(model)
    return corrections


def average(models: Sequence[nn.Module]) -> nn.Module:
    merged = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    merged.load_state_dict(
        {
            name: torch.stack([state[name] for state in states]).mean(0)
            if value.is_floating_point()
            else value
            for name, value in states[0].items()
        }
    )
    return merged


class ResidualMLP(nn.Module):
    """x → in → relu → h + two(tanh(one(h))) → out."""

    def __init__(self, seed: int, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.into = nn.Linear(5, 6, bias=bias)
        self.one = nn.Linear(6, 7, bias=bias)
        self.two = nn.Linear(7, 6, bias=bias)
        self.out = nn.Linear(6, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.into(x))
        hidden = hidden + self.two(torch.tanh(self.one(hidden)))
        output: Tensor = self.out(hidden)
        return output


def mlps(bias: bool = True) -> tuple[list[nn.Module], nn.Module]:
    experts: list[nn.Module] = [ResidualMLP(seed, bias).double() for seed in (1, 2)]
    return experts, average(experts)


def features(count: int, seed: int) -> Tensor:
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)).double()
    return x + 0.3 * seed


def chain(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 4, bias=False))
    return nn.Sequential(*layers).double()


# The laws


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (tiny_vit, images(6)),
        (tiny_conv_net, images(6, channels=1)),
        (tiny_bert, padded_texts((9, 4, 7, 5))),
    ],
    ids=["vit", "conv", "bert"],
)
def test_a_merge_of_equal_experts_stays_what_it_is(
    make: Callable[[], nn.Module], inputs: Any
) -> None:
    expert, model = make(), make()
    corrections = corrected(model, 2)
    settings = LeastSquares(norms=True, embeddings=True)
    result = sweep(model, [expert, make()], [(0, inputs), (1, inputs)], settings, corrections)
    assert len(result.layers) > 2
    with corrections.context.using(1), torch.no_grad():
        output, wanted = run_model(model, inputs), run_model(expert, inputs)
    output, wanted = getattr(output, "logits", output), getattr(wanted, "logits", wanted)
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_linear_experts_on_inputs_of_their_own_fit_into_one_model_exactly() -> None:
    torch.manual_seed(0)
    experts: list[nn.Module] = [
        nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False)).double()
        for _ in (0, 1)
    ]
    data = [torch.randn(40, 6).double() for _ in (0, 1)]
    data[0][:, 3:], data[1][:, :3] = 0, 0
    model = average(experts)
    settings = LeastSquares(ridge=1e-10, sensitivity=0.0)
    result = sweep(model, experts, list(enumerate(data)), settings)
    for expert, x in zip(experts, data, strict=True):
        torch.testing.assert_close(model(x), expert(x), rtol=1e-5, atol=1e-6)
    assert all(layer.before > 0.1 and layer.after < 1e-8 for layer in result.layers), result


@pytest.mark.parametrize("where", ["conv", "norm", "1:input"])
def test_a_conv_net_alone_is_its_own_expert_wherever_the_sites_are(where: str) -> None:
    expert, model = tiny_conv_net(1).double(), tiny_conv_net(2).double()
    model[0].weight.data.copy_(expert[0].weight)  # so that the first layer is realisable
    corrections = corrected(model, 1, where)
    inputs = images(30, channels=1).double()
    settings = LeastSquares(ridge=1e-9, sensitivity=0.0, max_rows=None)
    sweep(model, [expert], [(0, inputs)], settings, corrections)
    with corrections.context.using(0), torch.no_grad():
        torch.testing.assert_close(model(inputs), expert(inputs), rtol=1e-4, atol=1e-4)


def weights_after(
    batches: Sequence[tuple[int, Any]], settings: LeastSquares = EXACT, flip: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    experts, model = mlps()
    corrections = corrected(model, 2)
    if flip:
        experts = experts[::-1]
    sweep(model, experts, batches, settings, corrections)
    return model.state_dict(), corrections.state_dict()


def test_examples_may_be_split_over_batches() -> None:
    one, two = features(12, 1), features(9, 2)
    whole = weights_after([(0, one), (1, two)])
    split = weights_after([(0, one[:5]), (1, two), (0, one[5:6]), (0, one[6:])])
    for expected, found in zip(whole, split, strict=True):
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)


def test_the_order_of_the_tasks_does_not_matter() -> None:
    one, two = features(12, 1), features(9, 2)
    weights, scales = weights_after([(0, one), (1, two)])
    flipped, flipped_scales = weights_after([(0, two), (1, one)], flip=True)
    for name, value in weights.items():
        torch.testing.assert_close(flipped[name], value, rtol=1e-6, atol=1e-7)
    for name, value in scales.items():
        torch.testing.assert_close(flipped_scales[name].flip(0), value, rtol=1e-5, atol=1e-6)


def test_tokens_of_padding_do_not_matter() -> None:
    found = []
    text = padded_texts((6, 4, 6, 5, 3))
    for padding in (0, 5):
        experts = [tiny_bert(seed).double() for seed in (1, 2)]
        model = average(experts)
        padded = {name: nn.functional.pad(value, (0, padding)) for name, value in text.items()}
        corrections = corrected(model, 2)
        sweep(model, experts, [(0, padded), (1, text)], corrections=corrections)
        found.append({**model.state_dict(), **corrections.state_dict()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-7)


# Slow loops


def dense_fit(
    x: Sequence[Tensor],
    z: Sequence[Tensor],
    prior: Tensor,
    ridge: float,
    *,
    intercept: bool,
    per_task: bool = False,
) -> tuple[Tensor, Tensor]:
    """The fit by lstsq on stacked rows: (M [d, o], b [o])."""
    weights = [1 / (len(b) * b.var(0, correction=0).sum()) for b in z]
    rows = torch.cat([w.sqrt() * a for w, a in zip(weights, x, strict=True)])
    if per_task:
        x_fit = [a - a.mean(0) for a in x]
        z_fit = [b - b.mean(0) for b in z]
    elif intercept:
        total = sum(w * len(b) for w, b in zip(weights, z, strict=True))
        centre_x = sum(w * a.sum(0) for w, a in zip(weights, x, strict=True)) / total
        centre_z = sum(w * b.sum(0) for w, b in zip(weights, z, strict=True)) / total
        x_fit, z_fit = [a - centre_x for a in x], [b - centre_z for b in z]
    else:
        x_fit, z_fit = list(x), list(z)
    rows = torch.cat([w.sqrt() * a for w, a in zip(weights, x_fit, strict=True)])
    wanted = torch.cat([w.sqrt() * b for w, b in zip(weights, z_fit, strict=True)])
    strength = (ridge * rows.square().sum() / rows.shape[1]).sqrt()
    left = torch.cat([rows, strength * torch.eye(len(prior)).to(rows)])
    matrix = torch.linalg.lstsq(left, torch.cat([wanted, strength * prior])).solution
    total = sum(w * len(b) for w, b in zip(weights, z, strict=True))
    mean_x = sum(w * a.sum(0) for w, a in zip(weights, x, strict=True)) / total
    mean_z = sum(w * b.sum(0) for w, b in zip(weights, z, strict=True)) / total
    return matrix, mean_z - mean_x @ matrix


def test_it_is_a_loop_over_layers_that_runs_the_whole_prefix_for_each() -> None:
    experts, model = mlps()
    slow, data = copy.deepcopy(model), [features(30, 1), features(20, 2)]
    corrections = corrected(model, 2)
    result = sweep(model, experts, list(enumerate(data)), corrections=corrections)
    assert [layer.name for layer in result.layers] == ["into", "one", "two", "out"]

    layers = ("into", "one", "two", "out")
    scales: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def run(net: Any, x: Tensor, task: int | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Every layer's input and (corrected) output; the skip under its own name."""
        seen = {}

        def through(name: str, value: Tensor) -> Tensor:
            module = getattr(net, name)
            output: Tensor = value @ module.weight.mT + module.bias
            if task is not None and name in scales:
                scale, shift = scales[name][task]
                output = output * scale + shift
            seen[name] = value, output
            return output

        hidden = torch.relu(through("into", x))
        seen["skip"] = hidden, hidden
        through("out", hidden + through("two", torch.tanh(through("one", hidden))))
        return seen

    with torch.no_grad():
        for name in layers:
            x, z = [], []
            for task, batch in enumerate(data):
                mine, theirs = run(slow, batch, task), run(experts[task], batch, None)
                lack = theirs["skip"][0] - mine["skip"][0] if name == "two" else 0
                x.append(mine[name][0])
                z.append(theirs[name][1] + lack)
            module = getattr(slow, name)
            matrix, offset = dense_fit(x, z, module.weight.mT, 0.01, intercept=True, per_task=True)
            module.weight.copy_(matrix.mT)
            module.bias.copy_(offset)
            fits = []
            for a, b in zip(x, z, strict=True):
                y = a @ matrix + offset
                deviation = y - y.mean(0)
                scale = (deviation * (b - b.mean(0))).mean(0) / deviation.square().mean(0)
                fits.append((scale, b.mean(0) - scale * y.mean(0)))
            scales[name] = fits
    for name in layers:
        torch.testing.assert_close(
            getattr(model, name).weight, getattr(slow, name).weight, rtol=1e-5, atol=1e-6
        )
        for task in (0, 1):
            correction: Any = corrections.at(name)
            scale, shift = scales[name][task]
            torch.testing.assert_close(correction.weight[task], scale.float(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(correction.bias[task], shift.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["expert", "merged"])
def test_reg_mean_and_reg_mean_plus_plus_are_special_cases(prefix: Any) -> None:
    from lit_merge.curvature.input_grams import LayerGrams
    from lit_merge.methods import RegMean
    from lit_merge.methods.method import ParameterSlice

    experts = [chain(1), chain(2)]
    data = [features(30, 1), features(20, 2)]
    model = average(experts)
    slow = copy.deepcopy(model)
    with torch.no_grad():
        for number in (0, 2):
            inputs = [
                (slow if prefix == "merged" else expert)[:number](x)
                for expert, x in zip(experts, data, strict=True)
            ]
            wanted = [e[number](x) for e, x in zip(experts, inputs, strict=True)]
            weights = tuple(float(1 / (len(z) * z.var(0, correction=0).sum())) for z in wanted)
            if prefix == "expert":
                grams = []
                for expert, x in zip(experts, data, strict=True):
                    found = LayerGrams(expert, run_model, dtype=torch.float64)
                    found.update(x)
                    grams.append(found.matrices()[f"{number}.weight"])
            else:
                grams = [x.mT @ x for x in inputs]
            prior = sum(w * e[number].weight for w, e in zip(weights, experts, strict=True))
            model[number].weight.copy_(prior / sum(weights))
            merged = RegMean(off_diagonal=1.0, ridge=0.01, weights=weights)(
                ParameterSlice(
                    name=f"{number}.weight",
                    base=None,
                    experts=tuple(e[number].weight.detach() for e in experts),
                    tasks=("a", "b"),
                    grams=tuple(grams),
                )
            )
            slow[number].weight.copy_(merged)
    settings = LeastSquares(
        ridge=0.01,
        prefix=prefix,
        wanted="weights",
        sensitivity=0.0,
        skips=False,
        heads=False,
        max_rows=None,
    )
    sweep(model, experts, list(enumerate(data)), settings)
    for number in (0, 2):
        torch.testing.assert_close(model[number].weight, slow[number].weight, rtol=1e-5, atol=1e-7)


# Corrections on the way


def test_statistics_without_layers_are_tact() -> None:
    experts, model = mlps()
    data = [features(30, 1), features(20, 2)]
    other = copy.deepcopy(model)
    settings = LeastSquares(layers=(), scales="statistics", sensitivity=0.0)
    found, expected = corrected(model, 2), corrected(other, 2)
    sweep(model, experts, list(enumerate(data)), settings, found)
    fit_tact(
        other,
        expected,
        expected.context,
        batches={0: [data[0]], 1: [data[1]]},
        expert_statistics={
            task: gather_statistics(expert, [data[task]], expected.sites)
            for task, expert in enumerate(experts)
        },
    )
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, torch.ones_like(value))


def test_a_site_before_a_layer_is_fitted_before_the_layer_is_solved() -> None:
    experts, model = mlps()
    data = [features(30, 1), features(20, 2)]
    corrections = corrected(model, 2, "one:input")
    given: list[Tensor] = []
    sweep(
        model,
        experts,
        list(enumerate(data)),
        LeastSquares(ridge=1e-9, sensitivity=0.0, layers=("one",)),
        corrections,
    )
    model.one.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    wanted = []
    with torch.no_grad():
        for task, batch in enumerate(data):
            with corrections.context.using(task):
                model(batch)
            wanted.append(experts[task].one(torch.relu(experts[task].into(batch))))
    prior = torch.zeros(6, 7).double()
    matrix, offset = dense_fit(given, wanted, prior, 1e-9, intercept=True)
    torch.testing.assert_close(model.one.weight.mT, matrix, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.one.bias, offset, rtol=1e-4, atol=1e-5)


# Errors


@pytest.fixture
def pair() -> tuple[list[nn.Module], nn.Module, list[tuple[int, Tensor]]]:
    experts, model = mlps()
    return experts, model, [(0, features(9, 1)), (1, features(9, 2))]


def test_a_task_without_batches_is_named(pair: Any) -> None:
    experts, model, batches = pair
    with pytest.raises(InputError, match=r"calibration examples.*got none of task 1"):
        sweep(model, experts, batches[:1])


def test_a_task_without_an_expert_is_named(pair: Any) -> None:
    experts, model, batches = pair
    with pytest.raises(InputError, match=r"indices of the 2 experts; got 2"):
        sweep(model, experts, [*batches, (2, features(3, 1))])


def test_an_expert_with_nan_is_named_with_its_layer(pair: Any) -> None:
    experts, model, batches = pair
    experts[1].one.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layer 'one': outputs of the expert's.*NaN.*task 1"):
        sweep(model, experts, batches)


def test_a_singular_layer_is_named(pair: Any) -> None:
    experts, model, _ = pair
    few = [(0, features(2, 1)), (1, features(2, 2))]
    with pytest.raises(InputError, match=r"ridge: must make the normal equations of 'into'"):
        sweep(model, experts, few, LeastSquares(ridge=0.0, sensitivity=0.0))


def test_a_pattern_that_matches_nothing_is_answered_with_near_names(pair: Any) -> None:
    experts, model, batches = pair
    with pytest.raises(InputError, match=r"got 'onn', which matches none. Near it are: .*one"):
        sweep(model, experts, batches, LeastSquares(layers=("into", "onn")))


def test_nothing_to_do_is_refused(pair: Any) -> None:
    experts, model, batches = pair
    with pytest.raises(InputError, match=r"must leave something to do"):
        sweep(model, experts, batches, LeastSquares(layers=()))


def test_an_expert_of_another_architecture_is_refused(pair: Any) -> None:
    experts, model, batches = pair
    experts[1].one = nn.Linear(6, 9).double()
    with pytest.raises(InputError, match=r"expert of task 1: the weight of 'one'.*\(7, 6\).*\(9"):
        sweep(model, experts, batches)
    experts[1].other = experts[1].one
    del experts[1].one
    with pytest.raises(InputError, match=r"expert of task 1: must have the merged model's 'one'"):
        sweep(model, experts, batches)


def test_a_precision_must_be_there(pair: Any) -> None:
    experts, model, batches = pair
    settings = LeastSquares(precision=1.0)
    with pytest.raises(InputError, match=r"least_squares.precision: must come with the precision"):
        sweep(model, experts, batches, settings)
    precisions = {
        name: torch.ones_like(value)
        for name, value in model.named_parameters()
        if name != "two.weight"
    }
    with pytest.raises(InputError, match=r"got none of 'two.weight'"):
        sweep(model, experts, batches, settings, precisions=precisions)
    with pytest.raises(InputError, match=r"of 'two.weight' must have shape \(6, 7\)"):
        sweep(
            model, experts, batches, settings, precisions=precisions | {"two.weight": torch.ones(2)}
        )
    bad = precisions | {"two.weight": torch.full((6, 7), -1.0)}
    with pytest.raises(InputError, match=r"of 'two.weight' must be finite, from 0"):
        sweep(model, experts, batches, settings, precisions=bad)


def test_an_error_leaves_no_hooks(pair: Any) -> None:
    experts, model, batches = pair
    experts[1].two.weight.data[0, 0] = float("inf")
    with pytest.raises(InputError):
        sweep(model, experts, batches)
    for network in (model, *experts):
        for module in network.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


def test_solved_layers_are_told_as_they_are_solved(pair: Any) -> None:
    experts, model, batches = pair
    told: list[SolvedLayer] = []
    result = sweep(model, experts, batches, solved=told.append)
    assert tuple(told) == result.layers


# Networks of all sorts


def grouped_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, groups=2, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()


def tiny_resnet(seed: int) -> nn.Module:
    import timm

    torch.manual_seed(seed)
    model: nn.Module = timm.create_model("test_resnet", num_classes=3, zero_init_last=False)
    return model.eval()


def tiny_gpt2(seed: int) -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2, pad_token_id=0, num_labels=3
    )
    model: nn.Module = GPT2ForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (tiny_resnet, [images(16, 1), images(16, 2)]),
        (tiny_vit, [images(16, 1), images(16, 2)]),
        (grouped_net, [images(32, 1, channels=1), images(32, 2, channels=1)]),
        (tiny_bert, [padded_texts((9, 4, 7, 5) * 8, seed) for seed in (1, 2)]),
        (tiny_gpt2, [padded_texts((9, 4, 7, 5) * 8, seed) for seed in (1, 2)]),
    ],
    ids=["resnet", "vit", "grouped", "bert", "gpt2"],
)
def test_every_layer_comes_nearer_to_the_experts(
    make: Callable[[int], nn.Module], inputs: list[Any]
) -> None:
    experts = [make(1), make(2)]
    model = average(experts)
    corrections = corrected(model, 2)

    def distance(net: nn.Module) -> float:
        total = 0.0
        for task, batch in enumerate(inputs):
            with corrections.context.using(task), torch.no_grad():
                found, wanted = run_model(net, batch), run_model(experts[task], batch)
            found, wanted = getattr(found, "logits", found), getattr(wanted, "logits", wanted)
            centred = wanted - wanted.mean(0)
            total += float((found - wanted).square().sum() / centred.square().sum())
        return total

    before = distance(model)
    settings = LeastSquares(ridge=0.01, max_rows=500)
    result = sweep(model, experts, list(enumerate(inputs)), settings, corrections)
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    solved = {layer.name for layer in result.layers}
    assert solved >= layers
    for layer in result.layers:
        assert layer.after < layer.before
    assert distance(model) < 0.5 * before


class Routed(ResidualMLP):
    """With a head per task in the place of the last layer."""

    def __init__(self, experts: Sequence[Any], context: TaskContext) -> None:
        super().__init__(0)
        self.double()
        self.load_state_dict(average(experts).state_dict())
        layers = {str(task): copy.deepcopy(expert.out) for task, expert in enumerate(experts)}
        self.out = TaskRouter(layers, tasks=tuple(layers), context=context)


def test_each_head_is_fitted_to_its_own_experts_logits() -> None:
    experts, _ = mlps()
    data = [features(30, 1), features(20, 2)]
    context = TaskContext()
    model: Any = Routed(experts, context)
    before = copy.deepcopy(model.out.heads)
    teachers = [Teacher(expert, run_model) for expert in experts]
    given: list[Tensor] = []
    solve_in_prefix(
        model, teachers, list(enumerate(data)), EXACT, context=context, forward=run_model
    )
    model.out.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with torch.no_grad():
        for task, batch in enumerate(data):
            with context.using(task):
                model(batch)
            matrix, offset = dense_fit(
                given[-1:],
                [experts[task](batch)],
                before[str(task)].weight.mT,
                0.01,
                intercept=True,
            )
            head = model.out.heads[str(task)]
            torch.testing.assert_close(head.weight.mT, matrix, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(head.bias, offset, rtol=1e-6, atol=1e-8)
            assert (head.weight - before[str(task)].weight).abs().max() > 1e-3


def test_heads_can_be_left() -> None:
    experts, _ = mlps()
    context = TaskContext()
    model: Any = Routed(experts, context)
    before = copy.deepcopy(model.out.state_dict())
    result = solve_in_prefix(
        model,
        [Teacher(expert, run_model) for expert in experts],
        [(task, features(20, task)) for task in (0, 1)],
        LeastSquares(heads=False),
        context=context,
        forward=run_model,
    )
    assert [layer.name for layer in result.layers] == ["into", "one", "two"]
    for name, value in model.out.state_dict().items():
        assert torch.equal(value, before[name])
