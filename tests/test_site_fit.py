"""Scales and shifts at a site: against fits by lstsq, channel by channel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_merge.correction.rescale import RescaleShift
from lit_merge.correction.site import Site
from lit_merge.errors import InputError
from lit_merge.least_squares.regression import PairedMoments, regress
from lit_merge.least_squares.site_fit import SitePair, before_norm, fit_site


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def line(y: Tensor, z: Tensor, v: Tensor) -> Tensor:
    """Scale and shift of one channel."""
    left = torch.stack([y, torch.ones_like(y)], 1) * v.sqrt()[:, None]
    return torch.linalg.lstsq(left, (z * v.sqrt())[:, None]).solution[:, 0]


def test_the_regression_is_the_weighted_line_of_every_channel() -> None:
    y, z, v = rows(0, 20, 3) + 2, rows(1, 20, 3), rows(2, 20).square()
    scale, shift = regress(
        PairedMoments.of(y[:8], z[:8], v[:8]) + PairedMoments.of(y[8:], z[8:], v[8:])
    )
    for channel in range(3):
        expected = line(y[:, channel], z[:, channel], v)
        torch.testing.assert_close(torch.stack([scale[channel], shift[channel]]), expected)


def test_a_constant_channel_is_only_shifted() -> None:
    y, z = rows(0, 20, 2), rows(1, 20, 2)
    y[:, 1] = 3.0
    scale, shift = regress(PairedMoments.of(y, z))
    assert scale[1] == 1
    torch.testing.assert_close(shift[1], z[:, 1].mean() - 3)


@pytest.mark.parametrize("dim", [-1, 1])
def test_a_site_is_fitted_per_task_over_all_batches_with_mask_and_lack(dim: int) -> None:
    site = Site("layer", 3, dim)
    correction = RescaleShift(2, 3)
    y, z, lack = ([rows(10 * k + n, 4, 5, 3) for n in range(3)] for k in (1, 2, 3))
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2])[:, None]
    tasks = (0, 1, 0)
    pairs = [
        SitePair(
            task,
            y[n].movedim(-1, dim),
            (z[n].movedim(-1, dim), "more"),
            lack=lack[n].movedim(-1, dim),
            mask=mask,
        )
        for n, task in enumerate(tasks)
    ]
    fit_site(site, correction, pairs, 2, "regression")
    for task in (0, 1):
        own = [n for n, of in enumerate(tasks) if of == task]
        reached = torch.cat([y[n][mask] for n in own])
        wanted = torch.cat([(z[n] + lack[n])[mask] for n in own])
        for channel in range(3):
            scale, shift = line(
                reached[:, channel], wanted[:, channel], torch.ones(len(reached)).double()
            )
            assert correction.weight[task, channel].item() == pytest.approx(scale.item(), rel=1e-5)
            assert correction.bias[task, channel].item() == pytest.approx(shift.item(), rel=1e-5)


def test_statistics_are_met() -> None:
    site, correction = Site("layer:input", 3, -1), RescaleShift(1, 3)
    y, z, v = rows(0, 20, 3), 2 * rows(1, 20, 3) + 1, rows(2, 20).square()
    fit_site(site, correction, [SitePair(0, (y,), (z,), weights=v)], 1, "statistics")
    found = (correction.weight[0] * y + correction.bias[0]).detach()
    share = (v / v.sum())[:, None]
    mean, wanted = (share * found).sum(0), (share * z).sum(0)
    torch.testing.assert_close(mean, wanted, rtol=1e-5, atol=1e-6)
    variance = (share * (found - mean).square()).sum(0)
    goal = (share * (z - wanted).square()).sum(0)
    torch.testing.assert_close(variance, goal, rtol=1e-5, atol=1e-6)


def test_what_is_wanted_before_a_norm_is_the_experts_norm_less_the_offset() -> None:
    torch.manual_seed(0)
    theirs, ours = nn.BatchNorm2d(3).double().eval(), nn.BatchNorm2d(3).double().eval()
    for norm in (theirs, ours):
        norm.bias.data.normal_()
    theirs.weight.data.uniform_(0.5, 2)
    theirs.running_mean = torch.randn(3).double()
    theirs.running_var = torch.rand(3).double() + 0.5
    ours.running_var = torch.full((3,), 1 - ours.eps).double()
    output = torch.randn(2, 3, 4, 4).double()
    torch.testing.assert_close(ours(before_norm(output, theirs, ours)), theirs(output))


def test_activations_that_are_not_finite_are_named() -> None:
    y: Any = rows(0, 5, 3)
    z = y.clone()
    z[2, 1] = float("nan")
    with pytest.raises(InputError, match=r"site 'layer \(task 0\)': activations must be finite"):
        fit_site(Site("layer", 3, -1), RescaleShift(1, 3), [SitePair(0, y, z)], 1, "regression")
