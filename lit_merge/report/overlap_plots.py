"""What experts have in common, as heat maps: curvature by layer, cosines and signs by pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lit_merge.overlap import Overlap, OverlapSums
from lit_merge.report.drawing import Panel
from lit_merge.report.heat_map import Cell, layer_map
from lit_merge.report.scale_plots import short_names
from lit_merge.terminal import MISSING

_ALL = "all layers"
_PAIRS = 15  # columns of a map of pairs: with more, layers are shown as means over the pairs


def overlap_panels(overlap: Overlap, *, name: str) -> tuple[Panel, ...]:
    """Draw the maps: curvature by layer, task vectors against one another, and both by layer.

    Args:
        overlap: What to draw.
        name: Prefix of the ids, unique in the page.
    """
    if not overlap.layers:
        return ()
    panels: list[Panel] = []
    layers = list(overlap.layers.values())
    names = short_names(list(overlap.layers))
    tasks = overlap.tasks
    curvature = [[_log10(one.mean_curvature(t)) for t in range(len(tasks))] for one in layers]
    known = [cell for row in curvature for cell in row if cell is not None]
    if known:
        panels.append(
            Panel(
                "Curvature: log₁₀ of the mean over a layer's weights",
                f"Logarithm of the mean Hessian in {len(layers)} layers for {', '.join(tasks)}: "
                f"from {min(known):.1f} to {max(known):.1f}.",
                layer_map(
                    curvature,
                    names,
                    tasks,
                    _one_decimal,
                    name=f"{name}-curvature",
                    signed=False,
                    floor=math.floor(min(known)),
                ),
            )
        )
    if layers[0].products is not None and len(tasks) > 1:
        panels += _pair_panels(overlap, names, name=name)
    return tuple(panels)


def _pair_panels(overlap: Overlap, names: Sequence[str], *, name: str) -> list[Panel]:
    tasks, total = overlap.tasks, overlap.total
    places = range(len(tasks))
    # An expert's cosine with itself would take the colours away from all others.
    cosines: list[list[Cell]] = [
        [None if a == b else total.cosine(a, b) for b in places] for a in places
    ]
    panels = [
        Panel(
            "Cosine of the task vectors, all layers",
            "Cosine of two experts' task vectors over all merged weights: "
            + ", ".join(
                f"{tasks[a]} and {tasks[b]} {_text(total.cosine(a, b))}" for a, b in overlap.pairs
            )
            + ".",
            layer_map(cosines, short_names(tasks), tasks, _two_decimals, name=f"{name}-cosine"),
        )
    ]
    if len(overlap.layers) == 1:
        return panels
    columns = [f"{tasks[a]} · {tasks[b]}" for a, b in overlap.pairs]
    layers = list(overlap.layers.values())
    for title, what, read, floor in (
        ("Cosine by layer", "cosine", OverlapSums.cosine, 0.0),
        ("Sign agreement by layer", "signs", OverlapSums.sign_agreement, 0.5),
    ):
        cells: list[list[Cell]] = [[read(one, a, b) for a, b in overlap.pairs] for one in layers]
        shown = columns
        if len(columns) > _PAIRS:
            cells, shown = [[_mean(row)] for row in cells], [f"mean of {len(columns)} pairs"]
        found = [cell for row in cells for cell in row if cell is not None]
        described = f"from {min(found):.2f} to {max(found):.2f}" if found else "nothing to compare"
        panels.append(
            Panel(
                title,
                f"{title} and pair of experts, {len(layers)} layers: {described}.",
                layer_map(cells, names, shown, _two_decimals, name=f"{name}-{what}", floor=floor),
            )
        )
    return panels


def overlap_table(overlap: Overlap) -> dict[str, Any]:
    """Return the numbers behind the maps: a line per layer, and one for all of them."""
    lines = [*overlap.layers.items()]
    if len(lines) > 1:
        lines.append((_ALL, overlap.total))
    return {
        "tasks": list(overlap.tasks),
        "pairs": [f"{overlap.tasks[a]} · {overlap.tasks[b]}" for a, b in overlap.pairs],
        "lines": [
            {
                "layer": layer,
                "numel": f"{sums.numel:,}",
                "curvature": [_text(sums.mean_curvature(t), "{:.3g}") for t in _of(overlap)],
                "size": [_text(sums.size(t), "{:.3g}") for t in _of(overlap)],
                "cosine": [_text(sums.cosine(a, b)) for a, b in overlap.pairs],
                "signs": [_text(sums.sign_agreement(a, b)) for a, b in overlap.pairs],
            }
            for layer, sums in lines
        ],
    }


def _of(overlap: Overlap) -> range:
    return range(len(overlap.tasks))


def _text(value: float | None, form: str = "{:.2f}") -> str:
    return MISSING if value is None else form.format(value)


def _two_decimals(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # no "-0.00"


def _one_decimal(value: float) -> str:
    return f"{value:.1f}"


def _log10(value: float | None) -> float | None:
    return math.log10(value) if value is not None and value > 0 else None


def _mean(row: Sequence[Cell]) -> Cell:
    known = [cell for cell in row if cell is not None]
    return sum(known) / len(known) if known else None
