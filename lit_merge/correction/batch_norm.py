r"""Batch norms of a merged model: running statistics measured anew.

A merge averages running means and variances as if they were weights, but they belong to activations
that the merged weights no longer produce. Here each batch norm is given the mean and variance of
what reaches it, in forward order: behind a batch norm, inputs are those that its new statistics
give. Over T tasks with means m_t and variances v_t the mixture has

.. math:: m = \sum_t p_t m_t, \quad v = \sum_t p_t (v_t + (m_t − m)^2)

with p_t equal for all tasks, or each task's share of the values.

:func:`anchor_batch_norm` does it the other way round: it gives a batch norm the statistics of what
reaches it and changes its affine part so that it computes what it did. Training then begins from
the same function, whether it normalises by running statistics or by those of a batch.

Note:
    Means are exact over all examples, not PyTorch's exponential averages, and variances divide by n
    as normalisation does in training, not by n − 1 as PyTorch's running variances do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_merge.correction.forward import Forward, MaskOf, attention_mask_of, run_model
from lit_merge.correction.routing import TaskContext
from lit_merge.correction.site import Site, input_of
from lit_merge.correction.site_pass import StatisticsOfTasks, visit_sites
from lit_merge.correction.statistics import ChannelStatistics
from lit_merge.correction.wrappers import named_bare_modules
from lit_merge.errors import InputError

Weighting: TypeAlias = Literal["task", "example"]


def batch_norms(model: nn.Module, *, affine: bool = False) -> dict[str, _BatchNorm]:
    """Return the batch norms of a model that have running statistics, by name.

    Args:
        model: The network, wrapped or not.
        affine: Whether to leave out those without scale and shift.
    """
    return {
        name: module
        for name, module in named_bare_modules(model)
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and (module.affine or not affine)
    }


def mix_statistics(
    statistics: Iterable[ChannelStatistics], *, weighting: Weighting = "task"
) -> ChannelStatistics:
    """Return the statistics of the mixture of several sets of rows.

    Args:
        statistics: Of each task, each with at least one row.
        weighting: "task" counts all tasks the same, "example" every row.

    >>> one = ChannelStatistics(1, torch.tensor([0.0]), torch.tensor([0.0]))
    >>> other = ChannelStatistics(3, torch.tensor([4.0]), torch.tensor([0.0]))
    >>> mix_statistics([one, other]).mean.item()
    2.0
    >>> mix_statistics([one, other], weighting="example").mean.item()
    3.0
    """
    of_tasks = list(statistics)
    mixed = ChannelStatistics.empty(of_tasks[0].num_features)
    longest = max(one.count for one in of_tasks)
    for one in of_tasks:
        # As if every task had as many rows as the largest.
        count = longest if weighting == "task" else one.count
        mixed.merge(ChannelStatistics(count, one.mean, one.variance * count))
    return mixed


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module,
    batches: Mapping[int, Iterable[Any]],
    *,
    context: TaskContext | None = None,
    weighting: Weighting = "task",
    required: bool = True,
    forward: Forward = run_model,
    mask: MaskOf = attention_mask_of,
) -> tuple[str, ...]:
    """Overwrite the running statistics of a model's batch norms, in one forward per batch.

    Collective; the examples may be split over batches and ranks in any way. Do it before a
    correction behind the batch norms is fitted. Counters of batches stay as they are.

    Args:
        model: The network; its running means and variances are changed, in their own precision.
        batches: Batches of each task's examples, by task index; this rank's share.
        context: Told the task of each batch; None for a model without per-task parts.
        weighting: "task" counts all tasks the same, "example" every value.
        required: Whether a model without batch norms is an error; if not, nothing happens to it.
        forward: Runs the model on a batch; its result is not used.
        mask: Takes a batch to the mask ``[B, T]`` of the tokens that count, or to None.

    Returns:
        The names of the batch norms in the order in which they ran.

    Raises:
        InputError: There is no batch norm, or as
            :func:`~lit_merge.correction.site_pass.visit_sites`; the model is then as it was.
    """
    if weighting not in ("task", "example"):
        raise InputError(f"weighting: must be task or example; got {weighting!r}. Choose one.")
    norms = batch_norms(model)
    if not norms:
        if not required:
            return ()
        raise InputError(
            f"model: must have batch norms with running statistics; got a {type(model).__name__} "
            "without. Leave the re-estimation out."
        )

    def set_statistics(norm: _BatchNorm, mixed: ChannelStatistics) -> None:
        _set(norm, mixed.mean, mixed.variance)

    return _visit(
        model,
        norms,
        batches,
        set_statistics,
        context=context,
        weighting=weighting,
        forward=forward,
        mask=mask,
    )


@torch.no_grad()
def anchor_batch_norm(
    model: nn.Module,
    norms: Mapping[str, _BatchNorm],
    batches: Mapping[int, Iterable[Any]],
    *,
    context: TaskContext | None = None,
    forward: Forward = run_model,
    mask: MaskOf = attention_mask_of,
) -> tuple[str, ...]:
    r"""Give batch norms the statistics of their inputs without changing what they compute.

    With m and v from the calibration examples, all tasks counting the same, scale and shift become

    .. math:: γ' = γ \sqrt{(v + ε) / (v_0 + ε)}, \quad β' = β + γ (m - m_0) / \sqrt{v_0 + ε}

    where m₀ and v₀ are the running statistics before. Least squares leave batch norms that only add
    an offset (m₀ = 0, v₀ + ε = 1): this makes real ones of them. Collective.

    Args:
        model: The network; run in evaluation mode.
        norms: Those of its batch norms to change, from :func:`batch_norms` with ``affine``.
        batches: Batches of each task's examples, by task index; this rank's share.
        context: Told the task of each batch; None for a model without per-task parts.
        forward: Runs the model on a batch; its result is not used.
        mask: Takes a batch to the mask ``[B, T]`` of the tokens that count, or to None.

    Returns:
        The names of the batch norms in the order in which they ran.

    Raises:
        InputError: As :func:`~lit_merge.correction.site_pass.visit_sites`; the model is then as it
            was.
    """

    def anchor(norm: _BatchNorm, mixed: ChannelStatistics) -> None:
        (mean, variance), eps = _statistics_of(norm), norm.eps
        unit = norm.weight.double() / (variance.double() + eps).sqrt()
        norm.bias.add_(unit * (mixed.mean - mean))
        norm.weight.copy_(unit * (mixed.variance + eps).sqrt())
        _set(norm, mixed.mean, mixed.variance)

    return _visit(
        model, norms, batches, anchor, context=context, weighting="task", forward=forward, mask=mask
    )


def _visit(
    model: nn.Module,
    norms: Mapping[str, _BatchNorm],
    batches: Mapping[int, Iterable[Any]],
    change: Callable[[_BatchNorm, ChannelStatistics], None],
    *,
    context: TaskContext | None,
    weighting: Weighting,
    forward: Forward,
    mask: MaskOf,
) -> tuple[str, ...]:
    """Change batch norms one after the other by what reaches them; undo all if one fails."""
    sites = [Site(input_of(name), norm.num_features, 1) for name, norm in norms.items()]
    before = {
        name: {key: value.clone() for key, value in norm.state_dict().items()}
        for name, norm in norms.items()
    }

    def visit(site: Site, of_tasks: StatisticsOfTasks) -> None:
        change(norms[site.module], mix_statistics(of_tasks.values(), weighting=weighting))

    try:
        ran = visit_sites(model, sites, batches, visit, context=context, forward=forward, mask=mask)
    except Exception:
        for name, state in before.items():
            norms[name].load_state_dict(state)
        raise
    return tuple(name.removesuffix(input_of("")) for name in ran)


def _statistics_of(norm: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _set(norm: _BatchNorm, mean: torch.Tensor, variance: torch.Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
