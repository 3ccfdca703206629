"""Unusual models through the whole engine: with 2, 5, 8 and 3 examples each against the loop.

The probe sees two examples only. What these models do is right for two by chance, or differs from
batch to batch, or goes past torch function calls.
"""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections import namedtuple
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_merge.curvature import CurvatureWarning, PerExampleFisher
from tests.oracle_nets import Case, Net, cross_entropy
from tests.references import squared_gradients_by_loop

Loss = Callable[[nn.Module, Any], Tensor]


def compare(case: Case, slow: str = "", loss: Loss = cross_entropy) -> None:
    """Compare the sums over batches of several sizes, and which parameters went one by one.

    Args:
        case: The network.
        slow: Patterns, separated by blanks, of the parameters that end up one by one.
        loss: The mean over a batch.
    """
    model = case.model()
    batches = [case.batch(size, seed) for seed, size in enumerate((2, 5, 8, 3, 8))]
    expected = squared_gradients_by_loop(model, batches, loss)
    estimator = PerExampleFisher(model, loss, labels="observed")
    one_by_one: set[str] = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CurvatureWarning)
        for batch in batches:
            estimator.update(batch)
    for warning in caught:
        one_by_one |= set(str(warning.message).partition(": computed")[0].split(", "))
    unexpected = {n for n in one_by_one if not any(fnmatchcase(n, p) for p in slow.split())}
    assert not unexpected, [str(w.message) for w in caught]
    assert bool(one_by_one) == bool(slow), "expected one by one"
    sums = estimator.sums()
    largest = max(float(squares.max()) for squares in expected.values() if squares.numel())
    assert largest > 0
    for name, squares in expected.items():
        torch.testing.assert_close(
            sums[name], squares, rtol=1e-8, atol=1e-9 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def linear(outputs: int = 6) -> nn.Linear:
    return nn.Linear(6, outputs)


def net(use: Callable[[Any, Tensor], Tensor], **parts: Any) -> Case:
    """A case with inputs [B, 4, 6]; modules are given as functions that make them."""

    def build() -> Net:
        made = {
            name: part if isinstance(part, (tuple, int)) else part() for name, part in parts.items()
        }
        return Net(use, **made)

    return Case(build)


# Rows chosen by the data.


def _by_index(m: Any, x: Tensor) -> Tensor:
    flat, result = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
    choice = (flat[:, 0] > 0).long()
    for number, expert in enumerate((m.first, m.second)):
        rows = (choice == number).nonzero()[:, 0]
        result = result.index_add(0, rows, expert(flat[rows]))
    return result.view_as(x)


def _by_mask(m: Any, x: Tensor) -> Tensor:
    mask, result = x[..., 0] > 0, torch.zeros_like(x)
    result[mask] = m.first(x[mask])
    return result


def _by_masked_select(m: Any, x: Tensor) -> Tensor:
    mask = (x[..., :1] > 0).expand_as(x)
    return x.masked_scatter(mask, m.first(x.masked_select(mask).view(-1, 6)))


def _by_index_select(m: Any, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    rows = (flat[:, 0] > 0).nonzero()[:, 0]
    made = m.first(flat.index_select(0, rows))
    return torch.zeros_like(flat).index_copy(0, rows, made).view_as(x)


def _by_gather(m: Any, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    places = flat[:, :1].argsort(0).expand(-1, 6)
    made = torch.zeros_like(flat).scatter(0, places, m.first(flat.gather(0, places)))
    return (made * m.first(flat)).view_as(x)


def _as_mixtral(m: Any, x: Tensor) -> Tensor:
    flat = x.view(-1, 6)
    shares, chosen = m.gate(flat).softmax(-1).topk(1, -1)
    mask, result = F.one_hot(chosen, 2).permute(2, 1, 0), torch.zeros_like(flat)
    for number, expert in enumerate((m.first, m.second)):
        slots, rows = torch.where(mask[number])
        own = flat[None, rows].reshape(-1, 6)
        result.index_add_(0, rows, expert(own) * shares[rows, slots, None])
    return result.view(x.shape)


def _sorted_by_expert(m: Any, x: Tensor) -> Tensor:
    flat = x.reshape(-1, 6)
    choice = (flat[:, 0] > 0).long()
    order = choice.argsort(stable=True)
    a, b = flat[order].split(torch.bincount(choice, minlength=2).tolist())
    made = torch.cat([m.first(a), m.second(b)])
    return torch.zeros_like(flat).index_copy(0, order, made).view(x.shape)


def _dispatched(product: str) -> Callable[[Any, Tensor], Tensor]:
    """Tokens sent to places of an expert by a product with zeros and ones."""

    def use(m: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 6)
        sent = (flat[:, 0] > 0).to(x.dtype)
        places = F.one_hot((sent.cumsum(0) - 1).clamp(0).long(), len(flat)) * sent[:, None]
        if product == "einsum":
            own = torch.einsum("td,tc->cd", flat, places)
            return torch.einsum("cd,tc->td", m.first(own).tanh(), places).view(x.shape)
        return (places @ m.first(places.T @ flat).tanh()).view(x.shape)

    return use


def _without_padding(m: Any, x: Tensor) -> Tensor:
    kept = (x[..., 0] > 0).nonzero()
    row, place = kept[:, 0], kept[:, 1]
    result = torch.zeros_like(x)
    result[row, place] = m.first(m.table(place) + x[row, place])
    return result


def _in_order_of_size(m: Any, x: Tensor) -> Tensor:
    order = x[:, 0, 0].argsort()
    return m.first(m.first(x).tanh()[order])[order.argsort()]


EXPERTS = {"first": linear, "second": linear}
CHOSEN = {
    "experts by index": (net(_by_index, **EXPERTS), "first.* second.*"),
    "tokens by mask": (net(_by_mask, first=linear), "first.*"),
    "masked_select": (net(_by_masked_select, first=linear), "first.*"),
    "index_select": (net(_by_index_select, first=linear), "first.*"),
    "gather": (net(_by_gather, first=linear), "first.*"),
    "experts of Mixtral": (
        net(_as_mixtral, gate=lambda: linear(2), **EXPERTS),
        "first.* second.*",
    ),
    "sorted by expert": (net(_sorted_by_expert, **EXPERTS), "first.* second.*"),
    "dispatch by einsum": (net(_dispatched("einsum"), first=linear), "first.*"),
    "dispatch by matmul": (net(_dispatched("matmul"), first=linear), "first.*"),
    "padding taken out": (
        net(_without_padding, first=linear, table=lambda: nn.Embedding(4, 6)),
        "first.* table.*",
    ),
    "examples sorted": (net(_in_order_of_size, first=linear), "first.*"),
    "one token of each": (
        net(lambda m, x: m.first(x[torch.arange(len(x)), x[..., 0].argmax(1)]), first=linear),
        "",
    ),
    "one token of each by mask": (
        net(
            lambda m, x: m.first(x[F.one_hot(x[..., 0].argmax(1), 4).bool()].view(len(x), 6)),
            first=linear,
        ),
        "",
    ),
    "tokens in another order": (
        net(
            lambda m, x: m.first(x.gather(1, x[..., :1].argsort(1).expand_as(x))).tanh(),
            first=linear,
        ),
        "",
    ),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_rows_that_the_data_chose(name: str) -> None:
    compare(*CHOSEN[name])


# Where the examples are.


def _examples_second(m: Any, x: Tensor) -> Tensor:
    return (m.first(x.transpose(0, 1)) + m.w).transpose(0, 1)


def _one_by_one(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.first(row) if row[0, 0] > 0 else m.second(row) for row in x])


def _pairs(m: Any, x: Tensor) -> Tensor:
    if len(x) % 2:
        return m.first(x) * m.w
    return m.first(x.view(-1, 2, 4, 6)).view(-1, 4, 6) * m.w


def _two_views(m: Any, x: Tensor) -> Tensor:
    one, other = m.first(torch.cat([x, x.cos()])).chunk(2)
    return one * other


PLACES = {
    "in the second dimension": (net(_examples_second, first=linear, w=(4, 1, 6)), "first.* w"),
    "one call for each": (net(_one_by_one, **EXPERTS), "first.* second.*"),
    "two in a row": (net(_pairs, first=linear, w=(6,)), "first.*"),
    "two views one after the other": (net(_two_views, first=linear), "first.*"),
    "in reverse": (net(lambda m, x: m.first(m.first(x).flip(0)).flip(0), first=linear), "first.*"),
    "windows": (
        net(
            lambda m, x: (m.first(x.reshape(-1, 2, 3)) + m.w).reshape(x.shape),
            first=lambda: nn.Linear(3, 3),
            w=(2, 3),
        ),
        "",
    ),
    "two calls": (net(lambda m, x: m.first(x) * m.first(x.flip(1)), first=linear), ""),
    "as many rows as examples": (
        net(lambda m, x: x @ torch.cat([m.w, m.w.sin()]).T, w=(5, 6)),
        "",
    ),
    "rows beside those of a parameter": (
        net(lambda m, x: torch.cat([x[:, 0], m.w])[: len(x)] + m.w.sum(0), w=(2, 6)),
        "w",
    ),
    "a number of the examples": (net(lambda m, x: x.sin() * m.w**2 + m.w, w=()), ""),
    "no tokens": (net(lambda m, x: torch.cat([m.first(x[:, :0]), x], 1), first=linear), ""),
    "no rows of a parameter": (
        net(lambda m, x: torch.cat([x[:, :0] + m.w[:0], x + m.w], 1), w=(4, 6)),
        "",
    ),
    "a parameter without elements": (
        net(lambda m, x: m.first(x) + m.w.sum(), first=linear, w=(0, 6)),
        "",
    ),
    "stretched activations": (
        net(lambda m, x: m.first(x[:, :1].expand(-1, 5, -1)).cos(), first=linear),
        "",
    ),
    "stretched gradients": (
        net(lambda m, x: (m.first(x) + m.w).sum((1, 2))[:, None], first=linear, w=(4, 6)),
        "",
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_where_the_examples_are(name: str) -> None:
    compare(*PLACES[name])


# What goes past, or between, torch function calls.


class Reversed(torch.autograd.Function):
    """The same, with the gradient turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -0.5 * gradients[0]


class Hidden(torch.autograd.Function):
    """x @ w, in a way that shows nothing of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (g,), (x, w) = gradients, ctx.saved_tensors
        return g @ w.mT, torch.einsum("...i,...o->io", x, g)


def _in_parts(m: Any, x: Tensor) -> Tensor:
    def part(y: Tensor) -> Tensor:
        made = F.linear(m.first(y) * m.w.exp().reshape(1, 1, -1), m.u @ m.v)
        return m.attention(made, y, y)[0] * m.w

    return checkpoint(
        lambda y: part(checkpoint(m.first, y, use_reentrant=False)), x, use_reentrant=False
    )


def _hooked(m: Any, x: Tensor) -> Tensor:
    y, large = m.first(x), x.detach()[:, :1, :1] > 1.2  # of few examples
    if y.requires_grad:
        y.register_hook(lambda g: torch.where(large, 3 * g, g))
    return y.tanh()


def _with_doubled_weights(m: Any, x: Tensor) -> Tensor:
    doubled = {name: 2 * p for name, p in m.first.named_parameters()}
    return torch.func.functional_call(m.first, doubled, (x,))


def _penalised(m: Any, x: Tensor) -> Tensor:
    x = x if x.requires_grad else x.requires_grad_()
    y = m.first(x).tanh()
    return y + torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def _rounded(m: Any, x: Tensor) -> Tensor:
    y, w = m.first(x), m.w + (m.w.round() - m.w).detach()
    return (y + (y.round() - y).detach()) * w


def _by_two_teachers(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        one = m.first(x)
    with torch.inference_mode():
        other = m.first(x.detach())
    return m.first(x) * one * other.clone()


PAST = {
    "checkpoints in each other": (
        net(
            _in_parts,
            first=linear,
            w=(6,),
            u=(6, 2),
            v=(2, 6),
            attention=lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        ),
        "",
    ),
    "hook on an activation": (net(_hooked, first=linear), ""),
    "gradient reversal": (net(lambda m, x: m.second(Reversed.apply(m.first(x))), **EXPERTS), ""),
    "gradient reversal of a parameter": (net(lambda m, x: x * Reversed.apply(m.w), w=(6,)), "w"),
    "a function that hides its weight": (
        net(lambda m, x: F.linear(Hidden.apply(x, m.w).tanh(), m.w), w=(6, 6)),
        "w",
    ),
    "vmap over examples": (net(lambda m, x: torch.func.vmap(m.first)(x), first=linear), "first.*"),
    "vmap over parameters": (
        net(lambda m, x: torch.func.vmap(lambda w: x @ w)(m.w).sum(0), w=(3, 6, 6)),
        "w",
    ),
    "a gradient inside": (
        net(lambda m, x: torch.func.grad(lambda z: m.first(z).tanh().sum())(x), first=linear),
        "first.*",
    ),
    "a gradient of torch inside": (net(_penalised, first=linear), "first.*"),
    "a copied layer": (
        net(lambda m, x: m.second(copy.deepcopy(m.first)(x)) + m.first(x), **EXPERTS),
        "",
    ),
    "other parameters for a layer": (net(_with_doubled_weights, first=linear), ""),
    "straight through": (net(_rounded, first=linear, w=(6,)), ""),
    "teachers": (net(_by_two_teachers, first=linear), ""),
    "a named tuple": (
        net(lambda m, x: x + torch.stack(Pair(m.w, m.w.sin())).sum(0), w=(4, 6)),
        "",
    ),
}
Pair = namedtuple("Pair", "one other")


@pytest.mark.parametrize("name", PAST)
def test_what_goes_past_torch_function_calls(name: str) -> None:
    compare(*PAST[name])


# What survives a forward or changes in it.


def _kept(m: Any, x: Tensor) -> Tensor:
    m.last = m.first(x)
    return m.last.tanh()


def _written(m: Any, x: Tensor) -> Tensor:
    """A buffer written from the examples: the mark of one forward must not count in the next."""
    if not hasattr(m, "seen"):
        m.seen = torch.ones(8, 6, dtype=x.dtype)
    product = m.seen.clone() * m.w  # 8 rows, also for 8 examples
    with torch.no_grad():
        m.seen.copy_(torch.ones(8, 6) + 0 * x.sum())
    return x @ product.T


def _limited(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.w.clamp_(-0.3, 0.3)
    m.first.weight.data.clamp_(-0.5, 0.5)
    return m.first(x) * m.w


def _put_in(m: Any, x: Tensor) -> Tensor:
    token = m.w.expand(len(x), -1, -1).clone()
    token += x
    return m.first(token)


KEPT = {
    "activations": (net(_kept, first=linear), ""),
    "a buffer": (net(_written, w=(6,)), ""),
    "parameters": (net(_limited, first=linear, w=(6,)), ""),
    "copies of a parameter": (net(_put_in, first=linear, w=(1, 4, 6)), "w"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_changed_in_place_or_kept(name: str) -> None:
    compare(*KEPT[name])


# Losses.


def _with_decay(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model, batch) + sum(0.1 * p.square().sum() for p in model.parameters())


def _with_two_forwards(model: nn.Module, batch: Any) -> Tensor:
    x, labels = batch
    one, other = model(x), model(1.1 * x)
    distance = F.kl_div(one.log_softmax(-1), other.softmax(-1), reduction="batchmean")
    return F.cross_entropy(one, labels) + distance


def _with_one_forward_of_both(model: nn.Module, batch: Any) -> Tensor:
    x, labels = batch
    one, other = model(torch.cat([x, 1.1 * x])).chunk(2)
    distance = F.kl_div(one.log_softmax(-1), other.softmax(-1), reduction="batchmean")
    return F.cross_entropy(one, labels) + distance


@pytest.mark.parametrize(
    ("loss", "slow"),
    [(_with_decay, "*"), (_with_two_forwards, ""), (_with_one_forward_of_both, "*")],
    ids=["decay", "two forwards", "one forward"],
)
def test_a_loss_that_is_more_than_cross_entropy(loss: Loss, slow: str) -> None:
    compare(net(lambda m, x: m.first(x), first=linear), slow, loss)


def test_a_model_in_data_parallel() -> None:
    compare(Case(lambda: nn.DataParallel(Net(lambda m, x: m.first(x), first=linear()))))


def test_a_scripted_part_goes_one_by_one() -> None:
    """Against the same layer unscripted: a copy of a scripted one gets no gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        case = net(lambda m, x: m.first(x).sin(), first=lambda: torch.jit.script(linear()))
        plain, scripted = net(lambda m, x: m.first(x).sin(), first=linear).model(), case.model()
    plain.load_state_dict(scripted.state_dict())
    expected = squared_gradients_by_loop(plain, [case.batch(5)], cross_entropy)
    estimator = PerExampleFisher(scripted, cross_entropy, labels="observed")
    with pytest.warns(CurvatureWarning, match=r"first\.weight, first\.bias"):
        estimator.update(case.batch(5))
    torch.testing.assert_close(estimator.sums(), expected, rtol=1e-9, atol=1e-20)


def test_hooks_of_the_user_on_modules_act_as_always() -> None:
    case = net(lambda m, x: m.second(m.first(x.sin()).tanh()), **EXPERTS)
    model = case.model()
    model.first.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    model.first.register_forward_hook(lambda module, inputs, output: 2 * output)
    model.second.register_full_backward_hook(
        lambda module, inputs, outputs: tuple(0.5 * g for g in inputs)
    )
    batches = [case.batch(2), case.batch(5, 1)]
    estimator = PerExampleFisher(model, cross_entropy, labels="observed")
    for batch in batches:
        estimator.update(batch)
    expected = squared_gradients_by_loop(model, batches, cross_entropy)
    torch.testing.assert_close(estimator.sums(), expected, rtol=1e-9, atol=1e-20)


# What is left behind.


def test_nothing_is_kept_after_a_batch() -> None:
    case = net(
        lambda m, x: m.first(x * m.w.exp()) @ (m.u.sin() @ m.u.T), first=linear, w=(6,), u=(6, 4)
    )
    model, batch = case.model(), case.batch(4)
    seen: list[weakref.ref[Tensor]] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = cross_entropy(model, batch)
        seen.append(weakref.ref(value))
        return value

    hook = model.first.register_forward_hook(lambda m, i, o: seen.append(weakref.ref(o)))
    estimator = PerExampleFisher(model, loss, labels="observed")
    estimator.update(batch)
    seen.clear()
    gc.collect()
    gc.disable()
    try:
        estimator.update(batch)
        assert len(seen) == 2
        assert [ref() for ref in seen] == [None, None]  # without the garbage collector
    finally:
        gc.enable()
        hook.remove()


def test_the_batch_can_be_copied_and_saved_afterwards() -> None:
    case = net(lambda m, x: m.first(x), first=linear)
    batch = case.batch(4)
    PerExampleFisher(case.model(), cross_entropy, labels="observed").update(batch)
    for again in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        torch.testing.assert_close(again, batch)
