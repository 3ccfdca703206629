"""The planned tensors of a forecast, and its curve over scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lit_merge.forecast.gather import Increases, added, along_the_line, at_each
from lit_merge.forecast.quadratic import LineTerms, line_minimum
from lit_merge.forecast.result import ScaleForecast, sums_of, weighted_total
from lit_merge.forecast.scaled import ScaledMethod
from lit_merge.methods.method import LookAtAll

FLAT = 0.01
"""A curve whose totals differ by less than this share says nothing about the scale."""

TIE = 1e-3
"""Totals that differ by less than this share are equal: of their scales, that nearest to 1 is best.
"""


@dataclass(frozen=True)
class Measured:
    """What was found of the tensors that the planned method merges.

    Attributes:
        tensors: Their increases in the planned merge.
        scale: The planned scale.
        best: The forecast of the whole model at the best scale.
        curve: The forecast of the whole model over the scales.
        notes: What a user should know.
    """

    tensors: Mapping[str, Increases]
    scale: float | None = None
    best: ScaleForecast | None = None
    curve: tuple[ScaleForecast, ...] = ()
    notes: tuple[str, ...] = ()


def measure(
    look_at_all: LookAtAll | None,
    scaled: ScaledMethod,
    grid: Sequence[float],
    weights: Sequence[float],
    fixed: Increases,
) -> Measured:
    """Look at the tensors that the planned method merges.

    Args:
        look_at_all: Starts a pass over them; None where overrides leave it none.
        scaled: The planned method.
        grid: The scales of the curve, ascending.
        weights: What each task's summed loss counts.
        fixed: The increases of all other tensors, which are the same at every scale.

    Raises:
        InputError: A value cannot be used, or no Hessian says anything about the scale.
    """
    if look_at_all is None:
        return Measured({})
    if scaled.linear:
        return _on_the_line(look_at_all, scaled, grid, weights, fixed)
    if scaled.has_scale:
        return _over_the_grid(look_at_all, scaled, grid, weights, fixed)
    found = at_each(look_at_all, [scaled.method])
    return Measured({name: increases for name, (increases,) in found.items()})


def _on_the_line(
    look_at_all: LookAtAll,
    scaled: ScaledMethod,
    grid: Sequence[float],
    weights: Sequence[float],
    fixed: Increases,
) -> Measured:
    by_tensor = along_the_line(look_at_all, scaled.at(1.0))
    lines = [LineTerms()] * len(weights)
    for terms in by_tensor.values():
        lines = [a + b for a, b in zip(lines, terms, strict=True)]
    best = line_minimum(lines, weights)
    scale = best if scaled.scale is None else scaled.scale

    def at(alpha: float) -> ScaleForecast:
        return ScaleForecast(alpha, added(tuple(line.at(alpha) for line in lines), fixed))

    note = (
        f"the best scale is negative, {best:.3g}: by the curvature every step from the base costs "
        f"the tasks together more than it gains"
    )
    return Measured(
        tensors={n: tuple(line.at(scale) for line in terms) for n, terms in by_tensor.items()},
        scale=scale,
        best=at(best),
        curve=tuple(map(at, grid)),
        notes=(note,) if best < 0 else (),
    )


def _over_the_grid(
    look_at_all: LookAtAll,
    scaled: ScaledMethod,
    grid: Sequence[float],
    weights: Sequence[float],
    fixed: Increases,
) -> Measured:
    scales = sorted({*grid, *(() if scaled.scale is None else (scaled.scale,))})
    by_tensor = at_each(look_at_all, [scaled.at(scale) for scale in scales])
    curve = tuple(
        ScaleForecast(
            scale,
            added(sums_of((each[at] for each in by_tensor.values()), len(weights)), fixed),
        )
        for at, scale in enumerate(scales)
    )
    totals = [weighted_total(each.increases, weights) for each in curve]
    as_good = [at for at, total in enumerate(totals) if total <= (1 + TIE) * min(totals)]
    best = curve[min(as_good, key=lambda at: abs(scales[at] - 1))]
    scale = best.scale if scaled.scale is None else scaled.scale
    moving = [total for at, total in zip(scales, totals, strict=True) if at > 0]
    notes = []
    if moving and max(moving) - min(moving) <= FLAT * max(moving):
        notes.append(
            "the total hardly depends on the scale, as that of gradient matching with little "
            "damping: there the curvature decides between the experts, and the scale cancels"
        )
    elif best.scale in (scales[0], scales[-1]):
        notes.append(f"the total is least at the end of the scales, {best.scale:g}")
    return Measured(
        tensors={name: each[scales.index(scale)] for name, each in by_tensor.items()},
        scale=scale,
        best=best,
        curve=curve,
        notes=tuple(notes),
    )
