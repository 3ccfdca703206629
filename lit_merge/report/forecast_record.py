"""Reading ``forecast.json``, and setting what it expected against what was measured.

The file is written by ``lit-merge forecast``; see
:class:`~lit_merge.forecast.result.Forecast.as_dict`. A forecast is of one method, as planned and at
other scales. Its counterpart is every evaluated model that this method has merged at one of them:
the increase of a task's negative log-likelihood over that of its expert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_merge.errors import InputError
from lit_merge.evaluation import Evaluation
from lit_merge.evaluation.file import read_json_object
from lit_merge.merge_record import MergeRecord

_SCALE = re.compile(r"\bscale=([-+.\deE]+)(?:, )?")


@dataclass(frozen=True)
class ForecastRecord:
    """What ``forecast.json`` says.

    Attributes:
        name: What to call it: its file.
        method: The method with its settings, as one would write it in Python.
        tasks: Names of the experts.
        planned: The planned scale; None for a method without one.
        best: The scale of the smallest total; None for a method without one.
        increases: By scale the expected increase of each task's mean loss, in the tasks' order;
            None where the examples were not counted. The key None is a method without a scale.
        modules: By module, the largest first, each task's increase summed over its examples.
        notes: What the forecast noted.
    """

    name: str
    method: str
    tasks: tuple[str, ...]
    planned: float | None
    best: float | None
    increases: Mapping[float | None, tuple[float | None, ...]]
    modules: Mapping[str, tuple[float, ...]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """One task of one evaluated model.

    Attributes:
        model: The model's name.
        task: The task.
        scale: The scale it was merged with; None without one.
        forecast: The expected increase of the mean loss.
        measured: The increase of the test examples' negative log-likelihood over the expert's.
    """

    model: str
    task: str
    scale: float | None
    forecast: float
    measured: float


def read_forecast(path: str | Path) -> ForecastRecord:
    """Read and check a ``forecast.json``.

    Raises:
        InputError: If the file is missing, no JSON, or an entry is wrong.
    """
    content = read_json_object(path)
    try:
        tasks = tuple(str(task) for task in content["num_examples"])
        planned, best = content["planned"], content["best"]
        points = [*content["curve"], *([best] if best else []), planned]
        return ForecastRecord(
            name=str(path),
            method=str(content["method"]),
            tasks=tasks,
            planned=_number(planned["scale"]),
            best=_number(best["scale"]) if best else None,
            increases={
                _number(point["scale"]): tuple(_number(point["mean_increase"][t]) for t in tasks)
                for point in points
            },
            modules={
                str(name): tuple(float(module["sum_increase"][task]) for task in tasks)
                for name, module in content["modules"].items()
            },
            notes=tuple(str(note) for note in content["notes"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: must hold a forecast; got a damaged one ({type(error).__name__}: {error}). "
            'Forecast again: "lit-merge forecast --output forecast.json".'
        ) from error


def comparisons(
    forecast: ForecastRecord, evaluation: Evaluation, merged: Mapping[str, MergeRecord]
) -> tuple[Comparison, ...]:
    """Return what can be compared: models that the forecast's method merged at one of its scales.

    Args:
        forecast: What was expected.
        evaluation: What was measured; tasks without an expert or a loss are left out.
        merged: How the evaluated models were merged, by model.
    """
    method, _ = _apart(forecast.method)
    scales = {None if s is None else round(s, 9): s for s in forecast.increases}
    found: list[Comparison] = []
    for row in evaluation.rows:
        record, expert = merged.get(row.model), evaluation.expert(row.task)
        if record is None or row.kind != "merged" or row.task not in forecast.tasks:
            continue
        if expert is None or expert.nll is None or row.nll is None:
            continue
        own, scale = _apart(record.method)
        at = None if scale is None else round(scale, 9)
        if own != method or set(record.tasks) != set(forecast.tasks) or at not in scales:
            continue
        expected = forecast.increases[scales[at]][forecast.tasks.index(row.task)]
        if expected is not None:
            increase = row.nll - expert.nll
            found.append(Comparison(row.model, row.task, scale, expected, increase))
    return tuple(found)


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's rank correlation; None of fewer than three pairs, or of equal numbers.

    References:
        Spearman (1904), American Journal of Psychology 15, 72-101. Equal numbers share their mean
        rank.

    >>> rank_correlation([(1.0, 10.0), (2.0, 30.0), (3.0, 20.0)])
    0.5
    """
    if len(pairs) < 3:
        return None
    ours, theirs = (_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    middle = (len(pairs) + 1) / 2
    products = sum((a - middle) * (b - middle) for a, b in zip(ours, theirs, strict=True))
    squares = [sum((rank - middle) ** 2 for rank in ranks) for ranks in (ours, theirs)]
    return products / math.sqrt(squares[0] * squares[1]) if all(squares) else None


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(ordered, 1)))}
    return [first[value] + (ordered.count(value) - 1) / 2 for value in values]


def _apart(method: str) -> tuple[str, float | None]:
    """Return a method's text without its scale, and the scale.

    >>> _apart("GradientMatching(scale=0.5, base_scale=1.0)")
    ('GradientMatching(base_scale=1.0)', 0.5)
    """
    found = _SCALE.search(method)
    if found is None:
        return method, None
    return method.replace(found[0], "", 1).replace(", )", ")"), float(found[1])


def _number(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no finite number")
    return number
