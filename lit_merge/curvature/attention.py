"""The multi-head attention of torch, in steps of which each is a torch function call of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MULTI_HEAD_ATTENTION = F.multi_head_attention_forward


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """Return what ``F.multi_head_attention_forward`` returns for the same arguments.

    Without dropout. None for uncommon arguments (biases added to keys, zero attention, given keys),
    and for a single unbatched sequence.
    """
    uncommon = (bias_k, bias_v, static_k, static_v)
    if add_zero_attn or query.dim() != 3 or any(argument is not None for argument in uncommon):
        return None
    if training and dropout_p > 0:
        return None
    q, k, v = (t.transpose(0, 1) for t in (query, key, value))  # [B, T, E]
    if use_separate_proj_weight:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))
    elif query is key and key is value:
        assert in_proj_weight is not None
        q, k, v = F.linear(q, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        assert in_proj_weight is not None
        weights = in_proj_weight.chunk(3)
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))
    mask = _mask(attn_mask, key_padding_mask, q, num_heads)
    q, k, v = (x.view(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (q, k, v))
    if need_weights:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights = (scores if mask is None else scores + mask).softmax(-1)
        context = weights @ v
    else:
        weights = None
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    output = F.linear(context.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    return output.transpose(0, 1), weights


def _mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, num_heads: int
) -> Tensor | None:
    """Return what is added to the scores [B, H, T, S]."""
    masks = []
    if attn_mask is not None:
        heads = attn_mask.dim() == 3
        own = attn_mask.view(-1, num_heads, *attn_mask.shape[1:]) if heads else attn_mask
        masks.append(_additive(own, q))
    if key_padding_mask is not None:
        masks.append(_additive(key_padding_mask, q)[:, None, None])
    if not masks:
        return None
    return masks[0] if len(masks) == 1 else masks[0] + masks[1]


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
