"""Which evaluated models are one method at several scales, and what each scale has reached.

How a model was merged is known from the ``merge.json`` beside it, or from the same entries in the
evaluation's provenance. Models that differ in nothing but the method's setting ``scale`` are the
points of one curve; merges without a scale, such as an average, are levels beside the curves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_merge.evaluation import Evaluation, TableLine
from lit_merge.merge_record import MergeRecord

SCALE = "scale"


@dataclass(frozen=True)
class Merging:
    """How one evaluated model was merged.

    Attributes:
        method: The method's class, without its module.
        settings: All that tells it from other merges but the scale: the method's other settings,
            the experts, the base's Hessian, the overrides; JSON primitives.
        scale: The scale that all tasks have; None without one, or with different ones.
    """

    method: str
    settings: Mapping[str, Any]
    scale: float | None

    @property
    def key(self) -> str:
        """What the points of one curve have in common."""
        return json.dumps([self.method, self.settings], sort_keys=True, default=str)


@dataclass(frozen=True)
class Curve:
    """One method at its scales.

    Attributes:
        label: The method, with the settings that tell it from other curves of the same method.
        points: Scale and model, the scales ascending.
    """

    label: str
    points: tuple[tuple[float, TableLine], ...]

    def best(self, *, by_nll: bool) -> tuple[float, TableLine] | None:
        """Return the point of the lowest loss or the highest accuracy, over all tasks."""
        scored = [
            (line.nll if by_nll else None if line.accuracy is None else -line.accuracy, place)
            for place, (_, line) in enumerate(self.points)
        ]
        known = [(score, place) for score, place in scored if score is not None]
        return self.points[min(known)[1]] if known else None

    def at(self, scale: float) -> TableLine | None:
        """Return the model at a scale."""
        return next((line for own, line in self.points if own == scale), None)


@dataclass(frozen=True)
class Sweep:
    """All methods with several scales, and what stands beside them.

    Attributes:
        curves: The methods, in the order of the evaluation's models.
        levels: Merged models without a scale.
    """

    curves: tuple[Curve, ...]
    levels: tuple[TableLine, ...]


def merging_of(record: MergeRecord) -> Merging | None:
    """Return how a merge was made, or None where its record does not say it."""
    content = record.provenance
    method = content.get("method")
    if not isinstance(method, Mapping) or not isinstance(method.get("init_args"), Mapping):
        return None
    arguments = {name: value for name, value in method["init_args"].items() if name != SCALE}
    experts = content.get("experts")
    paths = (
        {t: e.get("path") for t, e in experts.items() if isinstance(e, Mapping)}
        if isinstance(experts, Mapping)
        else list(record.tasks)
    )
    settings = {
        **arguments,
        "experts": paths,
        "base_hessian": content.get("base_hessian"),
        "overrides": content.get("overrides") or None,
        "dtype": content.get("dtype"),
    }
    name = str(method.get("class_path", "")).rpartition(".")[2]
    return Merging(name, settings, _scale(method["init_args"].get(SCALE)))


def sweep_of(evaluation: Evaluation, mergings: Mapping[str, Merging]) -> Sweep | None:
    """Return the curves of an evaluation, or None where no method has two scales.

    Args:
        evaluation: What was measured.
        mergings: How its merged models were made, by model; those of others are left alone.
    """
    groups: dict[str, dict[float, TableLine]] = {}
    levels: list[TableLine] = []
    for line in evaluation.lines():
        merging = mergings.get(line.model)
        if line.kind != "merged" or merging is None:
            continue
        if merging.scale is None:
            levels.append(line)
        else:
            # The same merge under two names is one point.
            groups.setdefault(merging.key, {}).setdefault(merging.scale, line)
    if not any(len(points) > 1 for points in groups.values()):
        return None
    first = {m.key: m for m in reversed(list(mergings.values()))}
    labels = _labels([first[key] for key in groups])
    curves = tuple(
        Curve(label, tuple(sorted(points.items())))
        for label, points in zip(labels, groups.values(), strict=True)
    )
    return Sweep(curves, tuple(levels))


def _labels(mergings: Sequence[Merging]) -> list[str]:
    """Return the methods' names, with the settings in which those of one name differ."""
    labels: list[str] = []
    for merging in mergings:
        alike = [other.settings for other in mergings if other.method == merging.method]
        keys = dict.fromkeys(key for settings in alike for key in settings)
        differing = [key for key in keys if any(s.get(key) != alike[0].get(key) for s in alike)]
        told = ", ".join(f"{key}={_short(merging.settings.get(key))}" for key in differing)
        labels.append(f"{merging.method}({told})" if told else merging.method)
    return labels


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(map(str, value)) + "}"
    return str(value)


def _scale(value: object) -> float | None:
    if isinstance(value, Mapping):  # by task: one scale where all are alike
        scales = set(value.values())
        return _scale(scales.pop()) if len(scales) == 1 else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return None
