"""What each function's weight and bias get from every example, against autograd on it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name

from lit_merge.curvature.estimator import zeros_for
from lit_merge.curvature.kernels import Contribution, add_squares, example_gradient
from lit_merge.curvature.operations import DESCRIPTIONS

EXAMPLES = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def numbers(*shape: int) -> Tensor:
    return torch.randint(5, shape, generator=torch.Generator().manual_seed(0))


class Call(NamedTuple):
    """A call of a function.

    Attributes:
        function: The function.
        args: Its arguments.
        x: Which of them is the input; its dimension 0 is EXAMPLES or a multiple.
        weight: Which of them is the weight, -1 for none.
        bias: Which of them is the bias, -1 for none.
        kwargs: Further arguments.
    """

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    x: int = 0
    weight: int = 1
    bias: int = -1
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - never changed


def tokens(rows: int = EXAMPLES) -> Tensor:
    return normal(rows, 4, 6)


def _convolutions() -> dict[str, Call]:
    calls = {}
    for dims, function in ((1, F.conv1d), (2, F.conv2d), (3, F.conv3d)):
        x, weight = normal(6, 4, *(7, 6, 5)[:dims]), normal(6, 2, *(3, 2, 3)[:dims])
        for setting in ({}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"padding": "same"}):
            settings = {**setting, "groups": 2}
            calls[f"conv{dims}d {setting}"] = Call(
                function, (x, weight, normal(6)), bias=2, kwargs=settings
            )
    pairs = ((1, F.conv_transpose1d), (2, F.conv_transpose2d), (3, F.conv_transpose3d))
    for dims, function in pairs:
        x, weight = normal(6, 4, *(4, 3, 3)[:dims]), normal(4, 3, *(3, 2, 3)[:dims])
        more = {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}
        for name, settings in (("plain", {}), ("all settings", more)):
            width = 3 * settings.get("groups", 1)
            calls[f"conv_transpose{dims}d {name}"] = Call(
                function, (x, weight, normal(width)), bias=2, kwargs=settings
            )
    return calls


def _norms() -> dict[str, Call]:
    maps, running = normal(6, 4, 3, 2), (normal(4, seed=1), normal(4, seed=2).exp())
    w, b = normal(4, seed=3), normal(4, seed=4)
    last, two = (normal(6, seed=5), normal(6, seed=6)), (normal(4, 6), normal(4, 6, seed=7))
    batch = (maps, *running, w, b)
    return {
        "layer_norm": Call(F.layer_norm, (tokens(), (6,), *last), weight=2, bias=3),
        "layer_norm of two": Call(F.layer_norm, (tokens(6), (4, 6), *two), weight=2, bias=3),
        "torch.layer_norm": Call(torch.layer_norm, (tokens(), (6,), *last), weight=2, bias=3),
        "rms_norm": Call(F.rms_norm, (tokens(), (6,), last[0], 1e-3), weight=2),
        "torch.rms_norm": Call(torch.rms_norm, (tokens(), (6,), last[0], 1e-3), weight=2),
        "group_norm": Call(F.group_norm, (maps, 2, w, b), weight=2, bias=3),
        "torch.group_norm": Call(torch.group_norm, (maps, 2, w, b), weight=2, bias=3),
        "batch_norm": Call(F.batch_norm, batch, weight=3, bias=4),
        "batch_norm of rows": Call(
            F.batch_norm, (normal(3, 4), *running, w, b), weight=3, bias=4, kwargs={"eps": 0.1}
        ),
        "torch.batch_norm": Call(
            torch.batch_norm, (maps, w, b, *running, False, 0.1, 1e-5, False), weight=1, bias=2
        ),
        "instance_norm": Call(F.instance_norm, (maps, None, None, w, b), weight=3, bias=4),
        "instance_norm with statistics": Call(
            F.instance_norm, batch, weight=3, bias=4, kwargs={"use_input_stats": False}
        ),
    }


def _products() -> dict[str, Call]:
    w, b, x = normal(6, 5), normal(5, seed=1), normal(6, 6, seed=2)
    calls = {
        "linear": Call(F.linear, (tokens(), w.mT, b), bias=2),
        "linear of rows": Call(F.linear, (x, w.mT, b), bias=2),
        "addmm": Call(torch.addmm, (b, x, w), x=1, weight=2, bias=0),
        "Tensor.addmm": Call(Tensor.addmm, (b, x, w), x=1, weight=2, bias=0),
        "torch.mm": Call(torch.mm, (x, w)),
        "Tensor.mm": Call(Tensor.mm, (x, w)),
    }
    for function in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
        calls[resolve_name(function)] = Call(function, (tokens(6), w))
    return calls


def _tables() -> dict[str, Call]:
    table, places = normal(5, 6), numbers(3, 4)
    bags = numbers(6, 3)
    shares = normal(6, 3, seed=1)
    return {
        "embedding": Call(F.embedding, (places, table)),
        "embedding of one": Call(F.embedding, (numbers(6), table)),
        "embedding with padding": Call(F.embedding, (places, table, 2)),
        "embedding with padding from the end": Call(F.embedding, (places, table, -1)),
        "rows": Call(Tensor.__getitem__, (table, places), x=1, weight=0),
        "rows from the end": Call(
            Tensor.__getitem__, (table, torch.tensor([[-1, 4], [0, -5], [4, -1]])), x=1, weight=0
        ),
        "no rows": Call(Tensor.__getitem__, (table, places[:, :0]), x=1, weight=0),
        "sums": Call(F.embedding_bag, (bags, table), kwargs={"mode": "sum"}),
        "means": Call(F.embedding_bag, (bags, table)),
        "means with padding": Call(F.embedding_bag, (bags, table), kwargs={"padding_idx": -3}),
        "weighted sums": Call(
            F.embedding_bag, (bags, table), kwargs={"mode": "sum", "per_sample_weights": shares}
        ),
        "prelu": Call(F.prelu, (normal(6, 4, 3), normal(4))),
        "Tensor.prelu": Call(Tensor.prelu, (normal(6, 4, 3), normal(4))),
        "prelu of one": Call(F.prelu, (normal(6, 4, 3), normal(1))),
    }


CALLS = {**_products(), **_tables(), **_norms(), **_convolutions()}


def of_examples(call: Call, numbers: slice) -> Call:
    """Return the call with some examples' rows of the input, and of what goes with it."""
    args, kwargs = list(call.args), dict(call.kwargs)
    rows = len(args[call.x]) // EXAMPLES
    own = slice(numbers.start * rows, numbers.stop * rows)
    args[call.x] = args[call.x][own]
    if "per_sample_weights" in kwargs:
        kwargs["per_sample_weights"] = kwargs["per_sample_weights"][own]
    return call._replace(args=tuple(args), kwargs=kwargs)


def gradients_of_one(call: Call, which: int, cotangent: Tensor) -> Tensor:
    leaf = call.args[which].detach().clone().requires_grad_()
    args = list(call.args)
    args[which] = leaf
    output = call.function(*args, **call.kwargs)
    return torch.autograd.grad((output * cotangent).sum(), leaf)[0]


def assert_contribution(contribution: Contribution, call: Call, which: int, g: Tensor) -> None:
    like = zeros_for(call.args[which])
    total = torch.zeros_like(like)
    for n in range(EXAMPLES):
        one = of_examples(call, slice(n, n + 1))
        rows = len(g) // EXAMPLES
        expected = gradients_of_one(one, which, g[n * rows : (n + 1) * rows])
        found = example_gradient([contribution], n, like)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        total += expected.square()
    sums = torch.zeros_like(like)
    add_squares(sums, [contribution], EXAMPLES)
    torch.testing.assert_close(sums, total, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("name", CALLS)
def test_contributions_equal_the_gradients_of_every_example_alone(name: str) -> None:
    call = CALLS[name]
    operation = DESCRIPTIONS[call.function](*call.args, **call.kwargs)
    assert operation is not None
    y = call.function(*call.args, **call.kwargs)
    assert operation.fits(y, EXAMPLES)
    g = normal(*y.shape, seed=9)
    if call.weight >= 0:
        assert operation.weight is call.args[call.weight]
        contribution = operation.weight_gradient(g, EXAMPLES)
        assert_contribution(contribution, call, call.weight, g)
    if call.bias >= 0:
        assert operation.bias is call.args[call.bias]
        assert_contribution(operation.bias_gradient(g, EXAMPLES), call, call.bias, g)


def test_every_described_function_is_compared() -> None:
    assert {call.function for call in CALLS.values()} == set(DESCRIPTIONS)


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (torch.addmm, (normal(5), tokens()[0], normal(6, 5)), {"beta": 2}),
        (torch.addmm, (normal(4, 5), tokens()[0], normal(6, 5)), {}),
        (F.embedding, (numbers(3), normal(5, 6)), {"max_norm": 1.0}),
        (F.embedding, (numbers(3), normal(5, 6)), {"scale_grad_by_freq": True}),
        (F.embedding_bag, (numbers(3, 2), normal(5, 6)), {"mode": "max"}),
        (F.embedding_bag, (numbers(6), normal(5, 6), torch.tensor([0, 3])), {}),
        (F.batch_norm, (tokens(), normal(4), normal(4), normal(4), normal(4), True), {}),
        (F.batch_norm, (tokens(), None, None, normal(4), normal(4), True), {}),
        (Tensor.__getitem__, (normal(5, 6), 2), {}),
        (Tensor.__getitem__, (normal(5, 6), torch.tensor(2)), {}),
        (Tensor.__getitem__, (normal(5, 6), torch.tensor([True, False] * 2 + [True])), {}),
        (Tensor.__getitem__, (normal(5, 6), (slice(None), torch.tensor([1]))), {}),
    ],
)
def test_a_call_without_a_description(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    assert DESCRIPTIONS[function](*args, **kwargs) is None


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (F.linear, (normal(4, 6), normal(5, 6))),  # 4 rows for 3 examples
        (F.linear, (normal(6), normal(5, 6))),
        (F.linear, (normal(6, 6), normal(6))),
        (torch.matmul, (tokens(), normal(3, 6, 5))),
        (torch.matmul, (tokens(), normal(6))),
        (F.layer_norm, (normal(3, 6), (3, 6), normal(3, 6))),
        (F.conv1d, (normal(4, 7), normal(5, 4, 3))),  # one image without a batch
        (F.embedding, (numbers(3), normal(5, 6)[:, 0])),
    ],
    ids=["rows", "vector", "weight vector", "3d", "matrix-vector", "norm", "image", "table"],
)
def test_a_call_without_the_examples_in_the_first_dimension(
    function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    operation = DESCRIPTIONS[function](*args)
    assert operation is not None
    y = function(*args) if function is not F.embedding else args[0]
    assert not operation.fits(y, EXAMPLES)
