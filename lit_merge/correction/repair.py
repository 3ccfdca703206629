r"""REPAIR: one scale and shift per channel for all tasks, the control beside TACT.

At every site the merged model gets the average of the experts' means and standard deviations:

.. math:: \tilde z = \bar σ \frac{z − m}{\sqrt v} + \bar μ, \quad
          \bar μ = \frac1T \sum_t μ_t, \quad \bar σ = \frac1T \sum_t σ_t

with m, v the merged model's mean and variance over the examples of all tasks together. What TACT
gains over it is what the numbers per task are worth.

References:
    Jordan, Sedghi, Saukh, Entezari, Neyshabur (2022), arXiv:2211.08403, where two networks of one
    task are interpolated; with T experts at equal weights the goal is the average.

Note:
    The paper resets the statistics of convolutions' outputs. Here the sites are the caller's, and a
    constant channel keeps its scale, as in :func:`~lit_merge.correction.tact.match_statistics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lit_merge.correction.corrections import Corrections
from lit_merge.correction.forward import Forward, MaskOf, attention_mask_of, run_model
from lit_merge.correction.routing import TaskContext
from lit_merge.correction.site import Site
from lit_merge.correction.statistics import ChannelStatistics
from lit_merge.correction.tact import ScaleShift, expert_at, fit_corrections, match_statistics


def average_statistics(experts: Sequence[ChannelStatistics]) -> ChannelStatistics:
    """Return statistics with the average of several means and of several standard deviations.

    Args:
        experts: At least one; all count the same, whatever their numbers of rows.

    >>> one = ChannelStatistics(1, torch.tensor([0.0]), torch.tensor([1.0]))
    >>> other = ChannelStatistics(4, torch.tensor([2.0]), torch.tensor([36.0]))
    >>> average_statistics([one, other]).std.item()
    2.0
    """
    count = sum(one.count for one in experts)
    mean = torch.stack([one.mean for one in experts]).mean(dim=0)
    std = torch.stack([one.std for one in experts]).mean(dim=0)
    return ChannelStatistics(count, mean, std.square() * count)


def fit_repair(
    model: nn.Module,
    corrections: Corrections,
    context: TaskContext,
    *,
    batches: Mapping[int, Iterable[Any]],
    expert_statistics: Mapping[int, Mapping[str, ChannelStatistics]],
    forward: Forward = run_model,
    mask: MaskOf = attention_mask_of,
    eps: float = 1e-5,
) -> None:
    """Set one scale and shift for all tasks at every site, in one forward per batch. Collective.

    Args:
        model: The merged network, with the corrections attached; run in evaluation mode.
        corrections: The corrections to fit; all of their tasks get the same numbers.
        context: The one that the corrections and heads of the model use.
        batches: Batches of each task's calibration examples, by task index; this rank's share.
        expert_statistics: For each of these tasks its expert's statistics by site name.
        forward: Runs the model on a batch; its result is not used.
        mask: Takes a batch to the mask ``[B, T]`` of the tokens that count, or to None.
        eps: See :func:`~lit_merge.correction.tact.match_statistics`.

    Raises:
        InputError: As :func:`~lit_merge.correction.tact.fit_tact`.
    """

    def fit(site: Site, merged: Mapping[int, ChannelStatistics]) -> dict[int, ScaleShift]:
        pooled = ChannelStatistics.empty(site.num_features)
        for of_task in merged.values():
            pooled.merge(of_task)
        goal = average_statistics([expert_at(site, expert_statistics[task]) for task in merged])
        numbers = match_statistics(pooled, goal, eps=eps)
        return dict.fromkeys(range(corrections.num_tasks), numbers)

    fit_corrections(
        model,
        corrections,
        context,
        fit,
        batches=batches,
        expert_statistics=expert_statistics,
        forward=forward,
        mask=mask,
    )
