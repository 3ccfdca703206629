"""One layer: against dense fits in float64 over explicit rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lit_merge.errors import InputError
from lit_merge.least_squares.layer_solver import LayerRows, TaskRows, solve_layer
from lit_merge.least_squares.linear_layers import LinearLayer, linear_layer
from lit_merge.least_squares.settings import LeastSquares

TIGHT = {"rtol": 1e-6, "atol": 1e-8}


def reading(module: nn.Module) -> LinearLayer:
    layer = linear_layer("layer", module)
    assert layer is not None
    return layer


def solved(
    module: nn.Module,
    batches: Sequence[TaskRows],
    *,
    norm: nn.Module | None = None,
    tasks: int = 2,
    per_task: bool = False,
    **settings: object,
) -> tuple[float, float]:
    chosen = LeastSquares(**{"ridge": 0.0, "max_rows": None, **settings})  # type: ignore[arg-type]
    rows = LayerRows(reading(module), norm, batches, tasks, chosen)
    result = solve_layer(rows, per_task_shift=per_task)
    return result.before, result.after


def data(seed: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator).double() + seed
    return x, torch.randn(count, 3, generator=generator).double() * seed - 1


def task_weight(z: Tensor, v: Tensor) -> Tensor:
    mean = (v[:, None] * z).sum(0) / v.sum()
    return 1 / (v[:, None] * (z - mean).square()).sum()


@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_weighted_fit_with_a_column_of_ones(weighted: bool) -> None:
    pairs = [data(1, 12), data(2, 9)]
    rows_weights = [torch.rand(len(x)).double() + 0.1 for x, _ in pairs]
    if not weighted:
        rows_weights = [torch.ones_like(v) for v in rows_weights]
    roots = [
        (v * task_weight(z, v)).sqrt()[:, None]
        for (_, z), v in zip(pairs, rows_weights, strict=True)
    ]
    left = torch.cat(
        [
            r * torch.cat([x, torch.ones_like(x[:, :1])], 1)
            for r, (x, _) in zip(roots, pairs, strict=True)
        ]
    )
    right = torch.cat([r * z for r, (_, z) in zip(roots, pairs, strict=True)])
    expected = torch.linalg.lstsq(left, right).solution
    layer = nn.Linear(4, 3).double()
    batches = [
        TaskRows(t, x, z, weights=v if weighted else None)
        for t, ((x, z), v) in enumerate(zip(pairs, rows_weights, strict=True))
    ]
    before, after = solved(layer, batches)
    torch.testing.assert_close(layer.weight.mT, expected[:4], **TIGHT)
    torch.testing.assert_close(layer.bias, expected[4], **TIGHT)
    residual = (left @ expected - right).square().sum() / 2
    assert after == pytest.approx(float(residual), rel=1e-6)
    assert before > after


def test_a_shift_per_task_is_a_column_of_ones_per_task() -> None:
    pairs = [data(1, 12), data(2, 9)]
    left, right = [], []
    for task, (x, z) in enumerate(pairs):
        root = task_weight(z, torch.ones(len(z)).double()).sqrt()
        ones = torch.zeros(len(x), 2).double()
        ones[:, task] = 1
        left.append(root * torch.cat([x, ones], 1))
        right.append(root * z)
    expected = torch.linalg.lstsq(torch.cat(left), torch.cat(right)).solution
    layer = nn.Linear(4, 3, bias=False).double()
    solved(layer, [TaskRows(t, *pair) for t, pair in enumerate(pairs)], per_task=True)
    torch.testing.assert_close(layer.weight.mT, expected[:4], **TIGHT)


def test_without_an_offset_rows_are_not_centred() -> None:
    pairs = [data(1, 12), data(2, 9)]
    roots = [task_weight(z, torch.ones(len(z)).double()).sqrt() for _, z in pairs]
    expected = torch.linalg.lstsq(
        torch.cat([r * x for r, (x, _) in zip(roots, pairs, strict=True)]),
        torch.cat([r * z for r, (_, z) in zip(roots, pairs, strict=True)]),
    ).solution
    layer = nn.Linear(4, 3, bias=False).double()
    solved(layer, [TaskRows(t, *pair) for t, pair in enumerate(pairs)])
    torch.testing.assert_close(layer.weight.mT, expected, **TIGHT)


def test_masked_rows_do_not_count_whatever_is_in_them() -> None:
    x, z = data(1, 12)
    mask = (torch.arange(20) % 5 < 3).reshape(4, 5)
    padded_x = torch.full((4, 5, 4), 100.0).double()
    padded_z = torch.full((4, 5, 3), -50.0).double()
    padded_x[mask], padded_z[mask] = x, z
    plain, masked = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    solved(plain, [TaskRows(0, x, z)], tasks=1)
    solved(masked, [TaskRows(0, padded_x, padded_z, mask=mask)], tasks=1)
    torch.testing.assert_close(masked.weight, plain.weight, **TIGHT)
    torch.testing.assert_close(masked.bias, plain.bias, **TIGHT)


def test_what_the_skip_lacks_is_made_up_for() -> None:
    x, z = data(1, 12)
    lack = torch.randn_like(z)
    one, two = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    solved(one, [TaskRows(0, x, z, lack=lack)], tasks=1)
    solved(two, [TaskRows(0, x, z + lack)], tasks=1)
    torch.testing.assert_close(one.weight, two.weight, **TIGHT)


def norm_of(seed: int, channels: int) -> nn.BatchNorm2d:
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(channels).double().eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        tensor.data = torch.rand_like(tensor) + 0.2
    return norm


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_with_its_norm_meets_an_expert_that_it_can_be(
    bias: bool, groups: int
) -> None:
    torch.manual_seed(0)
    expert = nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=bias).double()
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=bias).double()
    expert_norm, norm = norm_of(1, 6), norm_of(2, 6)
    x = torch.randn(5, 4, 6, 6).double()
    before, after = solved(conv, [TaskRows(0, x, expert(x), norm=expert_norm)], norm=norm, tasks=1)
    torch.testing.assert_close(norm(conv(x)), expert_norm(expert(x)), rtol=1e-6, atol=1e-7)
    assert before > 0.1
    assert after < 1e-10


def test_rows_are_chosen_alike_in_inputs_outputs_and_weights() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, dilation=1, groups=2).double()
    expert = copy.deepcopy(conv)
    x = torch.randn(5, 4, 9, 9).double()
    weights = torch.rand(5 * 16).double()
    batch = TaskRows(0, x, expert(x), lack=expert(x), weights=weights, seed=3)
    of_all = LayerRows(reading(conv), None, [batch], 1, LeastSquares(max_rows=None))
    of_some = LayerRows(reading(conv), None, [batch], 1, LeastSquares(max_rows=30))
    xs, zs, vs = of_all.rows(batch)
    some_x, some_z, some_v = of_some.rows(batch)
    assert vs is not None
    assert some_v is not None
    chosen = (vs[0, :, 0][None] == some_v[0, :, 0][:, None]).double().argmax(1)
    assert len(chosen) == 30
    assert len(chosen.unique()) == 30
    torch.testing.assert_close(some_x, xs[:, chosen])
    torch.testing.assert_close(some_z, zs[:, chosen])


def test_outputs_of_the_experts_weights_are_made_of_the_given_inputs() -> None:
    x, z = data(1, 12)
    expert, layer = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    solved(layer, [TaskRows(0, x, z, expert=reading(expert))], tasks=1, wanted="weights")
    torch.testing.assert_close(layer.weight, expert.weight, **TIGHT)
    torch.testing.assert_close(layer.bias, expert.bias, **TIGHT)


def test_a_precision_is_of_the_weight_and_not_of_the_weight_times_its_norm() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 1, bias=False).double()
    norm = norm_of(2, 3)
    x, z = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 3, 4, 4).double()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
    prior = conv.weight.detach().clone()[:, :, 0, 0] * scale[:, None]
    precision = torch.rand(3, 2, 1, 1).double() + 0.1
    identity = norm_of(1, 3)
    assert identity.running_mean is not None
    assert identity.running_var is not None
    identity.weight.data.fill_(1), identity.bias.data.zero_()
    identity.running_mean.zero_(), identity.running_var.fill_(1 - identity.eps)
    batch = TaskRows(0, x, z, norm=identity)
    solved_with(conv, norm, batch, precision)
    found = conv.weight[:, :, 0, 0]

    rows = x.movedim(1, -1).reshape(-1, 2)
    wanted = z.movedim(1, -1).reshape(-1, 3)
    rows, wanted = rows - rows.mean(0), wanted - wanted.mean(0)
    gram, cross = rows.mT @ rows, rows.mT @ wanted
    pull = precision[:, :, 0, 0] / scale.square()[:, None]
    pull = 0.5 * gram.diagonal().mean() * pull / pull.mean()
    for channel in range(3):
        held = pull[channel].diag()
        expected = torch.linalg.solve(gram + held, cross[:, channel] + held @ prior[channel])
        torch.testing.assert_close(found[channel], expected, rtol=1e-5, atol=1e-7)


def solved_with(conv: nn.Module, norm: nn.Module, batch: TaskRows, precision: Tensor) -> None:
    settings = LeastSquares(ridge=0.0, precision=0.5, max_rows=None)
    rows = LayerRows(reading(conv), norm, [batch], 1, settings)
    solve_layer(rows, per_task_shift=False, precision=precision)


def test_a_task_whose_rows_are_all_padding_is_named() -> None:
    x, z = torch.zeros(2, 3, 4), torch.zeros(2, 3, 3)
    batches = [TaskRows(0, x, z), TaskRows(1, x, z, mask=torch.zeros(2, 3))]
    with pytest.raises(InputError, match=r"layer 'layer': must have rows.*none of task 1"):
        solved(nn.Linear(4, 3), batches)


def test_inputs_that_are_not_finite_are_named() -> None:
    x, z = torch.full((3, 4), float("inf")), torch.zeros(3, 3)
    with pytest.raises(InputError, match=r"layer 'layer': inputs of the layer must be finite"):
        solved(nn.Linear(4, 3), [TaskRows(0, x, z)], tasks=1)


def test_a_task_whose_outputs_are_constant_does_not_shape_the_weight() -> None:
    x, z = data(1, 12)
    alone, both = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    solved(alone, [TaskRows(0, x, z)], tasks=1)
    constant = TaskRows(1, data(2, 9)[0], torch.full((9, 3), 7.0).double())
    solved(both, [TaskRows(0, x, z), constant], tasks=2)
    torch.testing.assert_close(both.weight, alone.weight, **TIGHT)
