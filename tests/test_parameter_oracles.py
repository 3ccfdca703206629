"""Every use of a parameter outside its own layer against a loop over single examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle_nets import Case, Net, assert_exact


def _class_token(net: Any, x: Tensor) -> Tensor:
    return torch.cat([net.w.expand(len(x), -1, -1), x], 1).softmax(1) @ net.w[0].T


def _relative_positions(net: Any, x: Tensor) -> Tensor:
    """Swin: a table [7, heads] looked up at [T, T], permuted, added to scores [B, heads, T, T]."""
    heads = x.unflatten(-1, (2, 3)).transpose(1, 2)
    places = torch.arange(4)[:, None] - torch.arange(4) + 3
    bias = net.w[places.flatten()].view(4, 4, 2).permute(2, 0, 1).contiguous().unsqueeze(0)
    return (heads @ heads.mT + bias).softmax(-1) @ heads


def _t5_positions(net: Any, x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, 3)).transpose(1, 2)
    places = torch.arange(4)[:, None] - torch.arange(4) + 3
    bias = net.table(places).permute(2, 0, 1).unsqueeze(0)
    return (heads @ heads.mT + bias).softmax(-1) @ heads


def _talking_heads(net: Any, x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, 3)).transpose(1, 2)
    return torch.einsum("bhqk,hg->bgqk", heads @ heads.mT, net.w).softmax(-1) @ heads


def _temperature(net: Any, x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, 3)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads * net.w.clamp(max=0.5).exp(), heads, heads)


def _masked_tokens(net: Any, x: Tensor) -> Tensor:
    return torch.where((x[..., :1] > 0).expand_as(x), x, net.w)


def _resized_positions(net: Any, x: Tensor) -> Tensor:
    """Position embeddings resized to the input: [1, 6, 2, 2] to [B, 6, 4, 5]."""
    return x.movedim(-1, 1) + F.interpolate(net.w, size=x.shape[1:3], mode="bicubic")


def _global_filter(net: Any, x: Tensor) -> Tensor:
    """GFNet: a complex filter over frequencies, its real and imaginary part last."""
    return torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.view_as_complex(net.w), n=4, dim=1)


def _decay(net: Any, x: Tensor) -> Tensor:
    """Mamba: a state [B, 6, 3] with the decay exp(−exp(w)), one step after the other."""
    state = x.new_zeros(len(x), 6, 3)
    for t in range(x.shape[1]):
        state = state * (-net.w.exp()).exp() + x[:, t, :, None]
    return state


BARE = {
    "class token": Case(
        lambda: Net(
            lambda m, x: torch.cat([m.w.expand(len(x), -1, -1), x], 1).tanh().mean(1), w=(1, 1, 6)
        )
    ),
    "class token in two places": Case(lambda: Net(_class_token, w=(1, 1, 6))),
    "class token by repeat": Case(
        lambda: Net(lambda m, x: torch.cat([m.w.repeat(len(x), 1, 1), x], 1), w=(1, 2, 6)),
    ),
    "positions added": Case(lambda: Net(lambda m, x: x + m.w, w=(1, 4, 6))),
    "positions without a batch": Case(lambda: Net(lambda m, x: x + m.w, w=(4, 6))),
    "positions cut": Case(lambda: Net(lambda m, x: x + m.w[:, : x.shape[1]], w=(1, 9, 6))),
    "positions resized": Case(lambda: Net(_resized_positions, w=(1, 6, 2, 2)), (4, 5, 6)),
    "layer scale": Case(lambda: Net(lambda m, x: (x * m.w).cos(), w=(6,))),
    "layer scale in place": Case(lambda: Net(lambda m, x: x.sin().mul_(m.w), w=(6,))),
    "layer scale of maps": Case(
        lambda: Net(lambda m, x: x * m.w.reshape(1, -1, 1, 1), w=(4,)), (4, 5, 6)
    ),
    "layer scale with its dimensions": Case(
        lambda: Net(lambda m, x: x * m.w, w=(4, 1, 1)), (4, 5, 6)
    ),
    "number": Case(lambda: Net(lambda m, x: x * m.w.tanh(), w=())),
    "number in a vector": Case(lambda: Net(lambda m, x: x * m.w, w=(1,))),
    "logit scale": Case(lambda: Net(lambda m, x: m.w.exp() * F.normalize(x, dim=-1), w=())),
    "relative positions": Case(lambda: Net(_relative_positions, w=(7, 2))),
    "relative positions by embedding": Case(lambda: Net(_t5_positions, table=nn.Embedding(7, 2))),
    "mask token": Case(lambda: Net(_masked_tokens, w=(1, 1, 6))),
    "mask token of one dimension": Case(lambda: Net(_masked_tokens, w=(6,))),
    "temperature of heads": Case(lambda: Net(_temperature, w=(2, 1, 1))),
    "talking heads": Case(lambda: Net(_talking_heads, w=(2, 2))),
    "complex filter": Case(lambda: Net(_global_filter, w=(3, 6, 2))),
    "decay over time": Case(lambda: Net(_decay, w=(6, 3))),
    "minimum": Case(lambda: Net(lambda m, x: torch.minimum(x, m.w), w=(6,))),
    "detached elsewhere": Case(lambda: Net(lambda m, x: x * m.w.detach().exp() + m.w, w=(6,))),
}


def _without_gradient(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = net.layer(x)
    return net.layer(x) * teacher + net.layer(x.cos())


def _concatenated(net: Any, x: Tensor) -> Tensor:
    return F.linear(x, torch.cat([net.q, net.k]), torch.cat([net.b, torch.zeros_like(net.b)]))


def _low_rank(net: Any, x: Tensor) -> Tensor:
    return F.linear(x, net.layer.weight + net.u @ net.v, net.layer.bias)


def _masked(net: Any, x: Tensor) -> Tensor:
    return F.linear(x, net.w * torch.ones(5, 6).tril())


PRODUCTS = {
    "x @ w": Case(lambda: Net(lambda m, x: x @ m.w, w=(6, 5))),
    "x @ w.t()": Case(lambda: Net(lambda m, x: x @ m.w.t(), w=(5, 6))),
    "x @ w of rows": Case(lambda: Net(lambda m, x: x @ m.w, w=(6, 5)), (6,)),
    "w @ x": Case(lambda: Net(lambda m, x: m.w @ x, w=(5, 4))),
    "vector": Case(lambda: Net(lambda m, x: x @ m.w, w=(6,)), one_by_one=("w",)),
    "matmul with three dimensions": Case(
        lambda: Net(lambda m, x: torch.matmul(x[:, :, None], m.w), w=(4, 6, 3))
    ),
    "F.linear": Case(lambda: Net(lambda m, x: F.linear(x, m.w, m.b), w=(5, 6), b=(5,))),
    "F.linear of concatenated weights": Case(
        lambda: Net(_concatenated, q=(3, 6), k=(3, 6), b=(3,))
    ),
    "F.linear of a masked weight": Case(lambda: Net(_masked, w=(5, 6))),
    "F.linear of a low-rank sum": Case(
        lambda: Net(_low_rank, layer=nn.Linear(6, 5), u=(5, 2), v=(2, 6)),
    ),
    "F.conv2d": Case(
        lambda: Net(lambda m, x: F.conv2d(x, m.w, groups=2), w=(4, 2, 3, 3)), (4, 5, 6)
    ),
    "F.layer_norm": Case(
        lambda: Net(lambda m, x: F.layer_norm(x, (6,), m.w, m.b), w=(6,), b=(6,)),
    ),
    "F.embedding": Case(
        lambda: Net(lambda m, x: F.embedding(x, m.w), stem=0, w=(9, 5)), (4,), tokens=9
    ),
    "addmm": Case(lambda: Net(lambda m, x: torch.addmm(m.b, x, m.w), w=(6, 5), b=(5,)), (6,)),
    "baddbmm": Case(
        lambda: Net(
            lambda m, x: torch.baddbmm(m.b, x, m.w.expand(len(x), -1, -1)), w=(6, 5), b=(1, 4, 5)
        )
    ),
    "einsum": Case(lambda: Net(lambda m, x: torch.einsum("btf,fhd->bthd", x, m.w), w=(6, 2, 3))),
    "einsum over experts": Case(
        lambda: Net(
            lambda m, x: torch.einsum("bte,btf,efd->btd", x[..., :3].softmax(-1), x, m.w),
            w=(3, 6, 4),
        ),
    ),
}


def _tied_head(net: Any, x: Tensor) -> Tensor:
    return F.linear(net.table(x).tanh(), net.table.weight)


def _tied(**settings: Any) -> Net:
    net = Net(
        lambda m, x: m.head(m.table(x).tanh()),
        stem=0,
        table=nn.Embedding(9, 5, **settings),
        head=nn.Linear(5, 9),
    )
    net.head.weight = net.table.weight
    return net


def _shared(net: Net) -> Net:
    net.second.weight = net.first.weight
    return net


def _chosen_experts(net: Any, x: Tensor) -> Tensor:
    """Mixture of experts: rows of several examples, gathered and put back."""
    flat, result = x.flatten(0, 1), torch.zeros(x.numel() // 6, 5, dtype=x.dtype)
    chosen = (flat[:, 0] > 0).long()
    for number, expert in enumerate((net.first, net.second)):
        rows = (chosen == number).nonzero()[:, 0]
        result = result.index_add(0, rows, expert(flat[rows]))
    return result.view(len(x), -1, 5)


SHARED = {
    "embedding and head": Case(_tied, (4,), tokens=9),
    "embedding with padding and head": Case(lambda: _tied(padding_idx=0), (4,), tokens=9),
    "embedding and F.linear": Case(
        lambda: Net(_tied_head, stem=0, table=nn.Embedding(9, 5)),
        (4,),
        tokens=9,
    ),
    "two linears": Case(
        lambda: _shared(
            Net(
                lambda m, x: m.second(m.first(x).tanh()),
                first=nn.Linear(6, 6),
                second=nn.Linear(6, 6),
            )
        )
    ),
    "linear and its transpose": Case(
        lambda: Net(
            lambda m, x: F.linear(m.layer(x).tanh(), m.layer.weight.t()), layer=nn.Linear(6, 5)
        ),
    ),
    "layer and bare bias": Case(
        lambda: Net(lambda m, x: m.layer(x).tanh() - m.layer.bias, layer=nn.Linear(6, 5)),
    ),
    "penalty on a weight": Case(
        lambda: Net(lambda m, x: m.layer(x) * m.layer.weight.norm(), layer=nn.Linear(6, 5)),
    ),
    "a use without gradient": Case(lambda: Net(_without_gradient, layer=nn.Linear(6, 5))),
    "experts chosen by token": Case(
        lambda: Net(_chosen_experts, first=nn.Linear(6, 5), second=nn.Linear(6, 5)),
        one_by_one=("first.*", "second.*"),
    ),
    "unused": Case(lambda: Net(lambda m, x: m.layer(x), layer=nn.Linear(6, 5), w=(3,))),
}

CASES = {
    f"{group}: {name}": case
    for group, cases in {"bare": BARE, "product": PRODUCTS, "shared": SHARED}.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_use_of_a_parameter_equals_the_loop(name: str) -> None:
    case = CASES[name]
    model = case.model()
    report = assert_exact(model, case.batches(), one_by_one=case.one_by_one, rtol=case.rtol)
    assert report.unused == (("w",) if name == "shared: unused" else ())


def test_a_model_that_is_sure_of_its_classes_is_probed_too() -> None:
    def use(net: Any, x: Tensor) -> Tensor:
        return 1e4 * net.layer(x.transpose(0, 1)).transpose(0, 1)

    case = Case(lambda: Net(use, layer=nn.Linear(6, 5)))
    assert_exact(case.model(), [case.batch(4)], one_by_one=("layer.*",))
