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

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lit_merge.correction.corrections import Corrections
from lit_merge.correction.forward import Forward, MaskOf, attention_mask_of, run_model
from lit_merge.correction.routing import TaskContext
from lit_merge.correction.site import Site
from lit_merge.correction.site_pass import visit_sites
from lit_merge.correction.statistics import ChannelStatistics, require_finite
from lit_merge.errors import InputError

ScaleShift: TypeAlias = tuple[Tensor, Tensor]


def match_statistics(
    merged: ChannelStatistics, expert: ChannelStatistics, *, eps: float = 1e-5
) -> ScaleShift:
    """Return the scale and shift that give the merged activations the expert's statistics.

    Args:
        merged: Statistics of the merged model on a task.
        expert: Statistics of the task's expert on it.
        eps: A channel with at most this share of its site's average variance is constant.

    Returns:
        Scale and shift, float64 ``[C]`` each.

    Example:
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


def fit_tact(
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
    """Fit the scale and shift of tasks at every site, in one forward per batch. Collective.

    All batches go through in step: when a site is reached, everything before it has been corrected
    on exactly these examples, so its merged statistics are final and it is corrected at once. The
    numbers are those of one batch of all examples, however these are split over batches and ranks.

    Sites that the forward does not run keep what they have, as does everything after an error. The
    numbers of the given tasks are overwritten, those of other tasks are not touched.

    Args:
        model: The merged network, with the corrections attached; run in evaluation mode.
        corrections: The corrections to fit; every one needs ``set_(task, scale, shift)``, as
            :class:`~lit_merge.correction.rescale.RescaleShift` has.
        context: The one that the corrections and heads of the model use.
        batches: Batches of each task's calibration examples, by task index; this rank's share.
        expert_statistics: For each of these tasks its expert's statistics by site name, best on the
            same examples (all ranks'); the same on every rank.
        forward: Runs the model on a batch; its result is not used.
        mask: Takes a batch to the mask ``[B, T]`` of the tokens that count, or to None.
        eps: See :func:`match_statistics`.

    Raises:
        InputError: The corrections are not attached or cannot be set; a task is unknown or has no
            examples; a site has no expert statistics, ones of another width, runs twice in a
            forward, or yields NaN; no site ran.
    """

    def fit(site: Site, merged: Mapping[int, ChannelStatistics]) -> dict[int, ScaleShift]:
        return {
            task: match_statistics(of_task, expert_at(site, expert_statistics[task]), eps=eps)
            for task, of_task in merged.items()
        }

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


@torch.no_grad()
def fit_corrections(
    model: nn.Module,
    corrections: Corrections,
    context: TaskContext,
    fit: Callable[[Site, Mapping[int, ChannelStatistics]], Mapping[int, ScaleShift]],
    *,
    batches: Mapping[int, Iterable[Any]],
    expert_statistics: Mapping[int, Mapping[str, ChannelStatistics]],
    forward: Forward = run_model,
    mask: MaskOf = attention_mask_of,
) -> None:
    """Set scales and shifts at every site, in forward order, from the merged model's statistics.

    Args:
        model: The merged network, with the corrections attached.
        corrections: The corrections to fit.
        context: The one that the corrections and heads of the model use.
        fit: Takes a site and the merged model's statistics there by task to the scale and shift by
            task, ``[C]`` each.
        batches: See :func:`fit_tact`.
        expert_statistics: See :func:`fit_tact`; only looked through for missing tasks.
        forward: See :func:`fit_tact`.
        mask: See :func:`fit_tact`.

    Raises:
        InputError: As :func:`fit_tact`.
    """
    if not corrections.attached or not corrections.enabled:
        raise InputError(
            "corrections: must be attached to the model and enabled; got corrections that are not. "
            "Call corrections.attach(model) first."
        )
    for task in (*batches, *expert_statistics):
        if not 0 <= task < corrections.num_tasks:
            raise InputError(
                f"task: must be the index of one of the {corrections.num_tasks} tasks; got {task}. "
                "Count from 0."
            )
    for task in batches:
        if task not in expert_statistics:
            raise InputError(
                f"expert_statistics: must have those of every task with batches; got none of task "
                f"{task}. Gather them from its expert."
            )
    before = {name: value.clone() for name, value in corrections.state_dict().items()}

    def set_site(site: Site, merged: Mapping[int, ChannelStatistics]) -> None:
        set_task = _settable(corrections.at(site), site)
        for task, (scale, shift) in fit(site, merged).items():
            set_task(task, scale, shift)

    try:
        ran = visit_sites(
            model,
            corrections.sites,
            batches,
            set_site,
            context=context,
            forward=forward,
            mask=mask,
        )
        if not ran:
            raise InputError(
                f"batches: must run at least one of the {len(corrections.sites)} sites; got none "
                "that ran. Check that the corrections are attached to this model."
            )
    except Exception:
        corrections.load_state_dict(before)
        raise


def expert_at(site: Site, statistics: Mapping[str, ChannelStatistics]) -> ChannelStatistics:
    """Return an expert's statistics at a site.

    Raises:
        InputError: There are none, or none that fit the site.
    """
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
