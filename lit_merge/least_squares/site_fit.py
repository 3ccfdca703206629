"""The scales and shifts at one site, fitted to what the experts have there, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.correction.forward import channels_last, rows
from lit_merge.correction.site import Site
from lit_merge.correction.statistics import ChannelStatistics, require_finite
from lit_merge.correction.tact import match_statistics
from lit_merge.distributed import failing_together, sum_over_ranks
from lit_merge.least_squares.linear_layers import effective_affine
from lit_merge.least_squares.regression import PairedMoments, regress
from lit_merge.least_squares.settings import Scales

_PARTS = ("n", "y", "z", "yy", "yz", "zz")


@dataclass(frozen=True)
class SitePair:
    """One batch of one task at a site.

    Attributes:
        task: The task.
        merged: What the merged model has there: a module's output, or its arguments for a site
            before it.
        wanted: The same of the expert.
        lack: What the correction shall make up for; as ``wanted``, but one tensor.
        weights: Weight of each row that counts; None for ones.
        mask: The tokens that count.
    """

    task: int
    merged: Any
    wanted: Any
    lack: Tensor | None = None
    weights: Tensor | None = None
    mask: Tensor | None = None


@torch.no_grad()
def fit_site(
    site: Site, correction: nn.Module, pairs: Sequence[SitePair], num_tasks: int, scales: Scales
) -> None:
    """Set the scale and shift of every task at a site. Collective.

    Args:
        site: The site.
        correction: Its correction, with ``set_(task, scale, shift)``.
        pairs: This rank's batches; of every task at least one on some rank.
        num_tasks: Number of tasks over all ranks.
        scales: How: by "regression", or to meet the experts' "statistics".

    Raises:
        InputError: On every rank: activations are not finite, or do not fit the site.
    """
    sums: dict[str, Tensor] = {}
    with failing_together():
        for pair in pairs:
            for part, value in zip(_PARTS, _moments(site, pair).tensors(), strict=True):
                key = f"{pair.task}.{part}"
                sums[key] = sums[key] + value if key in sums else value
    sums = sum_over_ranks(sums, device=next(iter(sums.values())).device)
    settable: Any = correction
    for task in range(num_tasks):
        moments = PairedMoments(*(sums[f"{task}.{part}"] for part in _PARTS))
        reached = _statistics(moments.y, moments.yy, moments.total)
        goal = _statistics(moments.z, moments.zz, moments.total)
        for statistics in (reached, goal):
            require_finite(statistics, site=f"{site.name} (task {task})")
        if scales == "regression":
            settable.set_(task, *regress(moments))
        else:
            settable.set_(task, *match_statistics(reached, goal))


def before_norm(output: Tensor, expert_norm: nn.Module, merged_norm: nn.Module) -> Tensor:
    """Return what the merged model wants between a layer and the BatchNorm solved with it.

    There the merged layer puts out what the expert's norm does, less the offset that is all that
    the merged norm still adds.

    Args:
        output: The expert's layer's output, ``[B, C, ...]``.
        expert_norm: The expert's norm.
        merged_norm: The merged model's.
    """
    scale, shift = effective_affine(expert_norm)
    _, offset = effective_affine(merged_norm)
    shape = (-1, *(1,) * (output.ndim - 2))
    return output * scale.reshape(shape) + (shift - offset).reshape(shape)


def _moments(site: Site, pair: SitePair) -> PairedMoments:
    wanted = channels_last(pair.wanted, site)
    if pair.lack is not None:
        wanted = wanted + pair.lack.movedim(site.channel_dim, -1)
    merged = rows(channels_last(pair.merged, site), pair.mask)
    return PairedMoments.of(merged, rows(wanted, pair.mask), pair.weights)


def _statistics(total: Tensor, squares: Tensor, weight: Tensor) -> ChannelStatistics:
    """Return mean and variance of one side of the pairs, as if of one row."""
    mean = total / weight
    return ChannelStatistics(1, mean, (squares / weight - mean.square()).clamp_min(0))
