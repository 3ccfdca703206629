"""Copies of a parameter for every example: the same output, and the gradients of each alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_merge.curvature.broadcasting import broadcast, of_einsum
from lit_merge.curvature.estimator import zeros_for
from lit_merge.curvature.kernels import example_gradient

EXAMPLES = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Call(NamedTuple):
    """A function of inputs, with the examples in their first dimension, and of parameters."""

    function: Callable[..., Tensor]
    arguments: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Any, ...]]
    inputs: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]


def first(x: Sequence[Tensor], p: Sequence[Tensor]) -> tuple[Any, ...]:
    return (*x, *p)


def last(x: Sequence[Tensor], p: Sequence[Tensor]) -> tuple[Any, ...]:
    return (*p, *x)


def einsum(equation: str, *shapes: tuple[int, ...], inputs: int = 1) -> Call:
    tensors = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    return Call(
        torch.einsum,
        lambda x, p: (equation, *x, *p),
        tuple(tensors[:inputs]),
        tuple(tensors[inputs:]),
    )


X, IMAGES, WINDOWS = normal(3, 4, 6), normal(3, 4, 5, 6), normal(6, 4, 6)
HEADS = normal(3, 2, 4, 6)
CALLS = {
    "number": Call(torch.mul, first, (X,), (normal(),)),
    "vector": Call(torch.add, first, (X,), (normal(6),)),
    "table": Call(torch.add, first, (X,), (normal(4, 6),)),
    "with a dimension of its own": Call(torch.add, first, (X,), (normal(1, 4, 1),)),
    "channels": Call(torch.mul, first, (IMAGES,), (normal(4, 1, 1),)),
    "k rows": Call(torch.mul, first, (WINDOWS,), (normal(4, 6),)),
    "k rows and one of the parameter": Call(torch.mul, first, (WINDOWS,), (normal(1, 1, 6),)),
    "reversed": Call(Tensor.__rsub__, first, (X,), (normal(6),)),
    "parameter first": Call(torch.sub, last, (X,), (normal(6),)),
    "quotient": Call(torch.div, last, (X,), (normal(4, 6).exp(),)),
    "power": Call(torch.pow, first, (X.exp(),), (normal(6),)),
    "two parameters": Call(torch.addcmul, last, (X,), (normal(6), normal(4, 6, seed=1))),
    "interpolation": Call(torch.lerp, first, (X, X.cos()), (normal(6),)),
    "choice": Call(torch.where, first, (X > 0, X), (normal(6),)),
    "maximum": Call(torch.maximum, first, (X,), (normal(6),)),
    "matrix from the left": Call(torch.matmul, last, (X,), (normal(5, 4),)),
    "matrices": Call(torch.matmul, first, (HEADS,), (normal(2, 6, 5),)),
    "own rows": Call(torch.add, first, (X,), (normal(3, 4, 6),)),
    "own k rows": Call(torch.add, first, (WINDOWS,), (normal(6, 1, 6),)),
    "concatenation": Call(
        torch.cat, lambda x, p: ([*p, *x, *p], 1), (X,), (normal(3, 1, 6, seed=1),)
    ),
    "mask of attention": Call(
        F.scaled_dot_product_attention,
        lambda x, p: (*x, *p),
        (HEADS, HEADS.cos(), HEADS.sin()),
        (normal(2, 4, 4),),
    ),
    "queries of attention": Call(
        F.scaled_dot_product_attention, last, (HEADS, HEADS.sin()), (normal(1, 2, 5, 6),)
    ),
    "einsum": einsum("bti,io->bto", (3, 4, 6), (6, 5)),
    "einsum with blanks": einsum("b t i, i o -> b o", (3, 4, 6), (6, 5)),
    "einsum of two": einsum("bti,io,t->bo", (3, 4, 6), (6, 5), (4,)),
    "einsum of two inputs": einsum("bti,btj,ijo->bto", (3, 4, 6), (3, 4, 5), (6, 5, 2), inputs=2),
    "einsum of a diagonal": einsum("bi,ii->bi", (3, 6), (6, 6)),
}


def plan(call: Call) -> Any:
    known = {id(x) for x in call.inputs}
    make = of_einsum if call.function is torch.einsum else broadcast
    return make(
        call.function,
        call.arguments(call.inputs, call.parameters),
        {},
        call.parameters,
        lambda tensor: id(tensor) in known,
        EXAMPLES,
    )


def of_one(call: Call, n: int, g: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of the parameters by a call for one example alone."""
    leaves = [p.clone().requires_grad_() for p in call.parameters]
    rows = max(len(x) for x in call.inputs) // EXAMPLES
    own = slice(n * rows, (n + 1) * rows)
    width = rows * EXAMPLES
    inputs = [x[own] if len(x) == width else x for x in call.inputs]
    parameters = [
        p[own] if p.dim() == max(x.dim() for x in inputs) and len(p) == width else p for p in leaves
    ]
    output = call.function(*call.arguments(inputs, parameters))
    return torch.autograd.grad((output * g[own]).sum(), leaves)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_copies_give_the_output_and_the_gradients_of_every_example(name: str, frozen: bool) -> None:
    call = CALLS[name]
    parameters = [p.clone().requires_grad_(not frozen) for p in call.parameters]
    call = call._replace(parameters=tuple(parameters))
    changes = plan(call)
    assert changes is not None
    anchor = torch.zeros((), requires_grad=True)
    copies = {id(c.operand): c.copies(anchor, EXAMPLES) for c in changes.operands}
    own = {id(c.operand): c.in_rows(copies[id(c.operand)]) for c in changes.operands}
    args = changes.args or call.arguments(call.inputs, call.parameters)
    args = tuple(
        [own.get(id(a), a) for a in arg] if isinstance(arg, list) else own.get(id(arg), arg)
        for arg in args
    )
    output = call.function(*args)
    expected = call.function(*call.arguments(call.inputs, call.parameters))
    torch.testing.assert_close(output, expected)
    g = normal(*output.shape, seed=9)
    arrived = torch.autograd.grad((output * g).sum(), list(copies.values()), retain_graph=True)
    by_parameter = dict(zip(copies, arrived, strict=True))
    for n in range(EXAMPLES):
        alone = of_one(call, n, g)
        for parameter, gradient in zip(call.parameters, alone, strict=True):
            (change,) = (c for c in changes.operands if c.operand is parameter)
            contribution = change.contribution(by_parameter[id(parameter)], EXAMPLES)
            found = example_gradient([contribution], n, zeros_for(parameter))
            torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


REFUSED = {
    "no function that broadcasts": Call(torch.atan2, first, (X,), (normal(6),)),
    "rows of no one": Call(torch.add, first, (normal(4, 6),), (normal(6),)),
    "more dimensions than the examples": Call(
        torch.add, first, (normal(3, 6),), (normal(1, 4, 6),)
    ),
    "rows that are not of the examples": Call(torch.mul, first, (normal(3, 1),), (normal(5, 6),)),
    "different rows": Call(torch.add, first, (X, normal(6, 4, 6)), ()),
    "product with a vector": Call(torch.matmul, first, (X,), (normal(6),)),
    "concatenation with what is for all": Call(
        torch.cat, lambda x, p: ([*x, *p], 1), (X,), (normal(1, 2, 6),)
    ),
    "changed in place": Call(Tensor.add_, last, (X,), (normal(3, 4, 6),)),
    "numbers only": Call(torch.add, first, (normal(),), (normal(),)),
    "einsum of any dimensions": einsum("...i,io->...o", (3, 4, 6), (6, 5)),
    "einsum without a result": einsum("bti,io", (3, 4, 6), (6, 5)),
    "einsum over the examples": einsum("bti,io->to", (3, 4, 6), (6, 5)),
    "einsum with other rows": einsum("bti,io->bto", (6, 4, 6), (6, 5)),
    "einsum of different rows": einsum("bi,ci,i->bc", (3, 6), (3, 6), (6,), inputs=2),
    "einsum with rows for examples": einsum("bi,bi->bi", (3, 6), (3, 6)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_copies(name: str) -> None:
    call = REFUSED[name]
    assert plan(call) is None


def test_large_products_are_not_copied() -> None:
    call = Call(torch.matmul, last, (normal(3, 1400, 1),), (torch.zeros(1500, 1400),))
    assert plan(call) is None
