r"""TACT: give the merged model each task's expert activation statistics, in closed form.

At every site, per task and channel, with μ, σ² the mean and variance of the expert's activations
on the task's examples and m, v those of the merged model on the same task:

.. math:: \tilde z = σ \frac{z − m}{\sqrt v} + μ

so scale = σ/√v and shift = μ − scale·m. No labels and no gradients; a few dozen examples a task
are enough.

References:
    Sharma, Roy, Dziugaite (2024), arXiv:2410.12766.

Note:
    The paper adds a small ε to v. Here a channel whose variance in the merged model is at most
    ``eps`` times the average of its site, or lost in the rounding of its mean, counts as constant
    and gets scale 1, only its mean being corrected; all others get σ/√v as it is. So the statistics
    are met exactly, and a model that is its own expert gets the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.correction.corrections import Corrections
from lit_merge.correction.forward import (
    Forward,
    MaskOf,
    attention_mask_of,
    channels_last,
    evaluation_mode,
    module_at,
    rows,
    run_model,
)
from lit_merge.correction.routing import TaskContext
from lit_merge.correction.sites import Site
from lit_merge.correction.statistics import ChannelStatistics, require_finite
from lit_merge.errors import InputError


def match_statistics(
    merged: ChannelStatistics, expert: ChannelStatistics, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return the scale and shift that give the merged activations the expert's statistics.

    Args:
        merged: Statistics of the merged model on a task.
        expert: Statistics of the task's expert on it.
        eps: A channel with at most this share of its site's average variance is constant.

    Returns:
        Scale and shift, float64 ``[C]`` each.

    >>> merged = ChannelStatistics(4, torch.tensor([1.0]), torch.tensor([4.0]))
    >>> expert = ChannelStatistics(4, torch.tensor([5.0]), torch.tensor([36.0]))
    >>> [value.item() for value in match_statistics(merged, expert)]
    [3.0, 2.0]
    """
    variance = merged.variance
    rounding = (torch.finfo(torch.float32).eps * merged.mean).square()
    constant = variance <= torch.maximum(eps * variance.mean(), rounding)
    target = expert.std.to(variance.device)
    scale = target / torch.where(constant, torch.ones_like(variance), variance.sqrt())
    scale = torch.where(constant, torch.ones_like(scale), scale)
    return scale, expert.mean.to(variance.device) - scale * merged.mean


@torch.no_grad()
def fit_tact(
    model: nn.Module,
    corrections: Corrections,
    context: TaskContext,
    *,
    task: int,
    inputs: Any,
    expert_statistics: Mapping[str, ChannelStatistics],
    forward: Forward = run_model,
    mask: MaskOf = attention_mask_of,
    eps: float = 1e-5,
) -> None:
    """Fit one task's scale and shift at every site, in one forward.

    All calibration examples go through as ONE batch: when a site is reached, everything before it
    has been corrected on exactly these examples, so its merged statistics are final and it can be
    corrected at once. Several batches would need a pass per site, or would measure behind
    corrections that still change. Without gradients only the live activations take memory.

    Sites that the forward does not run keep what they have, as does everything after an error. The
    task's numbers are overwritten, those of other tasks are not touched.

    Args:
        model: The merged network, with the corrections attached; run in evaluation mode.
        corrections: The corrections to fit; every one needs ``set_(task, scale, shift)``, as
            :class:`~lit_merge.correction.rescale.RescaleShift` has.
        context: The one that the corrections and heads of the model use.
        task: Index of the task.
        inputs: The task's calibration examples, one batch.
        expert_statistics: The expert's statistics on the task by site name, best on the same
            examples.
        forward: Runs the model on the inputs; its result is not used.
        mask: Takes the inputs to the mask ``[B, T]`` of the tokens that count, or to None.
        eps: See :func:`match_statistics`.

    Raises:
        InputError: The corrections are not attached or cannot be set; a site has no expert
            statistics, ones of another width, runs twice in a forward, or yields NaN; no site ran.
    """
    if not corrections.attached or not corrections.enabled:
        raise InputError(
            "corrections: must be attached to the model and enabled; got corrections that are not. "
            "Call corrections.attach(model) first."
        )
    if not 0 <= task < corrections.num_tasks:
        raise InputError(
            f"task: must be the index of one of the {corrections.num_tasks} tasks; got {task}. "
            "Count from 0."
        )
    before = {name: value.clone() for name, value in corrections.state_dict().items()}
    token_mask = mask(inputs)
    fitted: set[str] = set()

    def fit(site: Site) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if site.name in fitted:
                raise InputError(
                    f"site {site.name!r}: must run once in a forward; got a second call (a shared "
                    "layer). Leave it out of the sites: its calls would need different scales."
                )
            expert = _expert_of(site, expert_statistics)
            merged = ChannelStatistics.empty(site.num_features)
            merged.update(rows(channels_last(output, site), token_mask))
            require_finite(merged, site=site.name)
            _settable(corrections.at(site), site)(task, *match_statistics(merged, expert, eps=eps))
            fitted.add(site.name)

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        for site in corrections.sites:
            # Before the correction's own hook, which then applies what has just been set.
            handle = module_at(model, site.name).register_forward_hook(fit(site), prepend=True)
            stack.callback(handle.remove)
        try:
            with context.using(task):
                forward(model, inputs)
            if not fitted:
                raise InputError(
                    f"inputs: must run at least one of the {len(corrections.sites)} sites; got "
                    "none that ran. Check that the corrections are attached to this model."
                )
        except Exception:
            corrections.load_state_dict(before)
            raise


def _expert_of(site: Site, statistics: Mapping[str, ChannelStatistics]) -> ChannelStatistics:
    if site.name not in statistics:
        raise InputError(
            f"expert_statistics: must have every site that runs; got none for {site.name!r}. "
            "Gather them from the expert at the same sites."
        )
    expert = statistics[site.name]
    if expert.num_features != site.num_features or not expert.count:
        raise InputError(
            f"expert_statistics: site {site.name!r} must have {site.num_features} channels and "
            f"examples; got {expert.num_features} channels of {expert.count} rows. Gather them "
            "from an expert of the same architecture."
        )
    require_finite(expert, site=site.name)
    return expert


def _settable(correction: nn.Module, site: Site) -> Any:
    if not hasattr(correction, "set_"):
        raise InputError(
            f"correction: the one of site {site.name!r} must have set_(task, scale, shift) for the "
            f"closed form; got a {type(correction).__name__}. Use RescaleShift, or learn it."
        )
    return correction.set_
