"""A Hessian read once: its trace by tensor, its zeros, and what a Hessian cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lit_merge.checkpoint import Checkpoint
from lit_merge.expert import ExpertInfo
from lit_merge.expert.contents import listed
from lit_merge.inspection.contents import CurvatureSummary
from lit_merge.inspection.values import Reading, num_not_finite

_QUALITY = {"relative_error", "rank_correlation", "num_examples", "worst"}
_FIX = 'Run "lit-merge curvature" on these weights.'


@dataclass(frozen=True)
class HessianValues:
    """What the values of a Hessian show.

    Attributes:
        traces: Sum of the finite entries by tensor.
        num_zeros: Number of entries that are zero.
        num_elements: Number of entries.
        warnings: What is wrong with it.
    """

    traces: dict[str, float]
    num_zeros: int
    num_elements: int
    warnings: tuple[str, ...]


def read_hessian(hessian: Checkpoint, reading: Reading) -> HessianValues:
    """Read a Hessian in chunks."""
    zeros = 0
    traces: dict[str, float] = {}
    not_finite: list[str] = []
    negative: list[str] = []
    for name in hessian:
        trace, bad, below = 0.0, 0, 0
        for values in reading.chunks(hessian, name):
            not_finite_here = num_not_finite(values)
            finite = values[torch.isfinite(values)] if not_finite_here else values
            bad += not_finite_here
            trace += float(finite.sum(dtype=torch.float64))
            zeros += int((finite == 0).sum())
            below += int((finite < 0).sum())
        traces[name] = trace
        if bad:
            not_finite.append(name)
        if below:
            negative.append(name)
    num_elements = sum(info.numel for info in hessian.infos.values())
    warnings = []
    if not_finite:
        warnings.append(f"{hessian.path}: holds NaN or infinity in {listed(not_finite)}. {_FIX}")
    if negative:
        warnings.append(
            f"{hessian.path}: is negative in {listed(negative)}; a sum of squares cannot be. {_FIX}"
        )
    if num_elements and zeros == num_elements:
        warnings.append(
            f"{hessian.path}: is zero throughout, so that it says nothing. Check that the training "
            "examples reached the loss."
        )
    half = [name for name, info in hessian.infos.items() if info.dtype == torch.float16]
    if half:
        warnings.append(
            f"{hessian.path}: is float16 in {listed(half)}, which holds nothing above 65504 "
            f"and rounds squares below 6e-8 to zero. Store it as float32."
        )
    return HessianValues(traces, zeros, num_elements, tuple(warnings))


def summary_of(info: ExpertInfo, found: HessianValues) -> CurvatureSummary:
    """Return the summary of a Hessian.

    Args:
        info: What is known about its expert; all defaults for a Hessian alone.
        found: Its values.
    """
    trace = sum(found.traces.values())
    top = sorted(found.traces, key=lambda name: -found.traces[name])[:5]
    return CurvatureSummary(
        trace=trace,
        mean_trace=trace / info.num_examples if info.num_examples else None,
        num_examples=info.num_examples,
        estimator=info.estimator,
        labels=info.labels,
        zero_share=found.num_zeros / found.num_elements if found.num_elements else 0.0,
        largest={name: found.traces[name] / trace for name in top if trace > 0},
        quality=quality_of(info),
    )


def quality_of(info: ExpertInfo) -> Mapping[str, Any] | None:
    """Return how far two halves of the examples were apart, where ``expert.json`` says so."""
    curvature = info.details.get("curvature")
    found = curvature.get("quality") if isinstance(curvature, Mapping) else None
    known = isinstance(found, Mapping) and found.keys() >= _QUALITY
    return found if known else None
