"""What is known of tensors in a forward, and derivatives of what comes from parameters alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_merge.curvature.capture import Capture
from lit_merge.curvature.following import Following, in_place, tensors_in

EXAMPLES = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def squares_by_loop(use: Callable[..., Tensor], w: Tensor, v: Tensor, x: Tensor) -> list[Tensor]:
    sums = [torch.zeros_like(w), torch.zeros_like(v)]
    for row in x.split(1):
        leaves = [w.clone().requires_grad_(), v.clone().requires_grad_()]
        loss = use(*leaves, row).sin().sum()
        for total, gradient in zip(
            sums, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True
        ):
            total += 0 if gradient is None else gradient.square()
    return sums


def in_place_derivation(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    t = w.clone()
    t.mul_(2)
    t[0] = 1.0
    t[1] += v
    t[2:].add_(v)
    return x @ t


def through_a_view(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    t = w.sin()
    t[1].mul_(v)
    return x @ t


def into_a_constant(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    t = torch.ones(4, 4, dtype=w.dtype)
    t[1:3, :] = w[:2]
    t += v
    return x @ t


def without_gradient_in_part(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        limit = w.abs().max()
    return x @ (w / limit * v.detach())


def lookup_used_otherwise(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    rows = w[torch.tensor([2, 0, 2, -1])]
    return (x + rows[0]) @ rows.T + F.embedding(torch.tensor([1, 3, 3, 0]), w).sum(1) * v


def split(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    first, second = w.chunk(2)
    for row in v.view(2, 2):
        x = x * row.repeat(2)
    return F.linear(x, torch.cat([second, first]))


DERIVATIONS: dict[str, Callable[..., Tensor]] = {
    "in place": in_place_derivation,
    "through a view": through_a_view,
    "into a constant": into_a_constant,
    "without gradient in part": without_gradient_in_part,
    "lookup used otherwise": lookup_used_otherwise,
    "split": split,
    "transposed": lambda w, v, x: x @ w.T + x @ w.mT.T,
    "a converted copy": lambda w, v, x: F.linear(x, w.float().double(), v.to(torch.float64)),
    "itself by to": lambda w, v, x: F.linear(x, w.to(w.dtype).contiguous()) + F.linear(x, w, v),
    "of two parameters": lambda w, v, x: x @ (w * v.exp()) + x * v,
    "normalised": lambda w, v, x: F.linear(F.normalize(x), F.normalize(w)) * v.norm(),
    "decomposed": lambda w, v, x: x @ torch.linalg.qr(w)[0] + v.cumsum(0),
    "complex": lambda w, v, x: x * torch.view_as_complex(w.view(4, 2, 2)).abs()[0, 0],
    "lists": lambda w, v, x: x @ torch.stack([v, v.cos(), w[0], w[1]]),
    "settings by name": lambda w, v, x: torch.addmm(input=v, mat1=x, mat2=w.exp()),
    "shapes of the examples": lambda w, v, x: x * v.expand_as(x) + w[0].view(1, 4).type_as(x),
}  # fmt: skip


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", DERIVATIONS)
def test_derivatives_of_what_comes_from_parameters(name: str, frozen: bool) -> None:
    use, factor = DERIVATIONS[name], 1.0 if frozen else 0.5
    w, v, x = normal(4, 4), normal(4, seed=1), normal(EXAMPLES, 4, seed=2)
    parameters = {"w": w.clone(), "v": v.clone()}
    if not frozen:
        for parameter in parameters.values():
            parameter.requires_grad_()
    totals = {name: torch.zeros_like(p) for name, p in (("w", w), ("v", v))}
    with Capture(parameters, totals, EXAMPLES, factor=factor) as capture:
        capture.mark([x])
        loss = use(*parameters.values(), x).sin().sum() / factor
        capture.end_forward()
        loss.backward()
        capture.end_backward()
    assert not capture.failed
    expected = squares_by_loop(use, w, v, x)
    torch.testing.assert_close(list(totals.values()), expected, rtol=1e-9, atol=1e-12)


def test_random_numbers_beside_training_are_unsound() -> None:
    """The derivative is taken of a second computation, which would draw others."""
    parameters = {"w": normal(4, 4).requires_grad_(), "v": normal(4).requires_grad_()}
    following = Following(parameters, EXAMPLES)
    following.derive(F.dropout, (parameters["w"], 0.5, True), {})
    following.derive(torch.exp, (parameters["v"],), {})
    assert following.unsound == {"w"}


def test_marks_hold_for_one_forward() -> None:
    first, second = (Following({}, EXAMPLES) for _ in range(2))
    x = normal(EXAMPLES, 4)
    first.mark([x])
    assert first.is_of_examples(x)
    assert not second.is_of_examples(x)


def test_what_is_changed_in_place_by_examples_is_of_the_examples() -> None:
    w, x = normal(4), normal(EXAMPLES, 4)
    following = Following({"w": w}, EXAMPLES)
    following.mark([x])
    derived = following.derive(Tensor.repeat, (w, EXAMPLES, 1), {})
    assert following.is_of_parameters(derived)
    following.mark_result(Tensor.add_, (derived, x), {}, derived.add_(x))
    assert following.is_of_examples(derived)
    assert not following.is_of_parameters(derived)
    assert following.is_of_parameters(w)


def test_rows_are_chosen_until_they_are_put_back() -> None:
    x, rows = normal(EXAMPLES, 2, 4).flatten(0, 1), torch.tensor([0, 1, 4])
    following = Following({}, EXAMPLES)
    following.mark([x, rows])

    def run(func: Callable[..., Any], *args: Any) -> Any:
        result = func(*args)
        following.mark_result(func, args, {}, result)
        return result

    taken = run(Tensor.__getitem__, x, rows)
    assert following.has_chosen_rows(taken)
    made = run(torch.exp, taken)
    assert following.has_chosen_rows(made)
    result = torch.zeros_like(x)
    assert not following.has_chosen_rows(run(Tensor.index_add_, result, 0, rows, made))
    assert following.is_of_examples(result)
    assert not following.has_chosen_rows(run(Tensor.__getitem__, x, rows.new_tensor([0, 3, 5])))


def test_tensors_are_found_in_lists() -> None:
    a, b, c = normal(1), normal(2), normal(3)
    assert [len(t) for t in tensors_in((a, [1, (b,)]), {"out": c})] == [1, 2, 3]


def test_names_of_functions_in_place() -> None:
    changing = (Tensor.add_, Tensor.__iadd__, Tensor.__setitem__, Tensor.index_add_)
    assert all(map(in_place, changing))
    others = (torch.add, Tensor.__add__, Tensor.__getitem__, Tensor.__invert__, Tensor.__index__)
    assert not any(map(in_place, others))
