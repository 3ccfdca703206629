"""Multi-head attention in steps against torch's own."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_merge.curvature.attention import multi_head_attention

B, T, S, E, H = 3, 4, 5, 6, 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def arguments(**changes: Any) -> dict[str, Any]:
    x = normal(T, B, E)
    return {
        "query": x,
        "key": x,
        "value": x,
        "embed_dim_to_check": E,
        "num_heads": H,
        "in_proj_weight": normal(3 * E, E, seed=1),
        "in_proj_bias": normal(3 * E, seed=2),
        "bias_k": None,
        "bias_v": None,
        "add_zero_attn": False,
        "dropout_p": 0.0,
        "out_proj_weight": normal(E, E, seed=3),
        "out_proj_bias": normal(E, seed=4),
        **changes,
    }


def assert_same(given: dict[str, Any]) -> None:
    found = multi_head_attention(**given)
    assert found is not None
    torch.testing.assert_close(
        found, F.multi_head_attention_forward(**given), rtol=1e-10, atol=1e-12
    )


def _mask(kind: str, *shape: int) -> Tensor | None:
    """A mask that leaves every query something to attend to."""
    if kind == "none":
        return None
    blocked = normal(*shape, seed=5) > 0.8
    blocked[..., 0] = False
    return blocked if kind == "bool" else normal(*shape, seed=6).masked_fill(blocked, -torch.inf)


@pytest.mark.parametrize("weights", ["none", "mean", "each"])
@pytest.mark.parametrize("given", ["same", "others", "widths"])
def test_it_equals_that_of_torch(given: str, weights: str) -> None:
    """Every mask: of one dimension or another, of truth values or numbers, with padding or not."""
    own: dict[str, Any] = {}
    if given != "same":
        own = {"key": normal(S, B, E, seed=7), "value": normal(S, B, E, seed=8)}
    if given == "widths":
        own |= {"key": normal(S, B, 3, seed=7), "value": normal(S, B, 5, seed=8)}
        own |= {"use_separate_proj_weight": True, "in_proj_weight": None}
        own |= {"q_proj_weight": normal(E, E, seed=9), "k_proj_weight": normal(E, 3, seed=10)}
        own |= {"v_proj_weight": normal(E, 5, seed=11)}
    own |= {"need_weights": weights != "none", "average_attn_weights": weights == "mean"}
    keys = T if given == "same" else S
    kinds = ("none", "bool", "float")
    for kind, heads, padding, bias in itertools.product(kinds, (1, B * H), kinds, (True, False)):
        shape = (T, keys) if heads == 1 else (heads, T, keys)
        if "none" not in (kind, padding) and kind != padding:
            continue  # torch refuses a mask of one kind and padding of the other
        changes = own | {"attn_mask": _mask(kind, *shape)}
        changes["key_padding_mask"] = _mask(padding, B, keys)
        if not bias:
            changes |= {"in_proj_bias": None, "out_proj_bias": None}
        assert_same(arguments(**changes))


def test_a_causal_mask_that_is_given_is_used() -> None:
    mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    for weights in (True, False):
        assert_same(arguments(attn_mask=mask, is_causal=True, need_weights=weights))


def test_a_mask_of_any_layout() -> None:
    mask = normal(T, B * H, T).transpose(0, 1)
    assert not mask.is_contiguous()
    assert_same(arguments(attn_mask=mask))


@pytest.mark.parametrize(
    "changes",
    [
        {"bias_k": normal(1, 1, E), "bias_v": normal(1, 1, E)},
        {"add_zero_attn": True},
        {"static_k": normal(B * H, S, E // H), "static_v": normal(B * H, S, E // H)},
        {"dropout_p": 0.1, "training": True},
        dict.fromkeys(("query", "key", "value"), normal(T, E)),
    ],
    ids=["biases of keys", "zero attention", "given keys", "dropout", "one sequence"],
)
def test_what_it_leaves_to_torch(changes: dict[str, Any]) -> None:
    assert multi_head_attention(**arguments(**changes)) is None


def test_dropout_in_eval_mode_is_none() -> None:
    assert_same(arguments(dropout_p=0.5, training=False))


def test_gradients_equal_those_of_torch() -> None:
    leaves = ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias", "query")
    gradients = []
    for function in (multi_head_attention, F.multi_head_attention_forward):
        given = arguments()
        for name in leaves:
            given[name] = given[name].clone().requires_grad_()
        given["key"] = given["value"] = given["query"]
        output = function(**given)
        assert output is not None
        total = output[0].sin().sum()
        gradients.append(torch.autograd.grad(total, [given[name] for name in leaves]))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
