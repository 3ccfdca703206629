"""What a forecast says: the increase of every task's loss, by tensor and by scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Weighting = Literal["mean", "sum"]
"""What a task counts: the increase of its mean loss, or of its loss summed over its examples."""


@dataclass(frozen=True)
class ScaleForecast:
    """The forecast at one scale.

    Attributes:
        scale: The scale.
        increases: The increase of each task's loss, summed over its examples, in the tasks' order.
    """

    scale: float
    increases: tuple[float, ...]


@dataclass(frozen=True)
class PartForecast:
    """The forecast of the planned merge for one tensor, or for the tensors of one module.

    Attributes:
        name: The tensor's name, or the part of it that the module's tensors begin with.
        increases: As in :class:`ScaleForecast`, of this part alone.
    """

    name: str
    increases: tuple[float, ...]


@dataclass(frozen=True)
class Forecast:
    """What a merge is expected to cost each task.

    A forecast of second order, from diagonal curvature at the experts' weights: a first guess for
    comparing scales, methods, tasks and layers of one set of experts. Its size is not to be relied
    upon: it is too small, often by orders of magnitude (:mod:`lit_merge.forecast` says why).

    Attributes:
        method: The method and its settings.
        tasks: The experts' names, in order.
        num_examples: The examples that each expert's Hessian is the sum over; None where unknown.
        weighting: What a task counts in a total.
        tensors: The planned merge, tensor by tensor, in the model's order.
        scale: The planned scale; None for a method without one.
        unit: What the method's scale is at ``scale`` 1, where it has one scale per task; the
            scales of this forecast multiply these. None where they are the method's own.
        best: The forecast at the scale of the smallest total; None for a method without a scale.
        closed_form: Whether that scale is the exact minimum of the forecast, as for methods that
            add one direction times their scale to the base; otherwise it is the best of ``curve``.
        curve: The forecast over scales, ascending; empty for a method without a scale.
        notes: What a user should know.
    """

    method: str
    tasks: tuple[str, ...]
    num_examples: tuple[int | None, ...]
    weighting: Weighting
    tensors: tuple[PartForecast, ...]
    scale: float | None = None
    unit: Mapping[str, float] | None = None
    best: ScaleForecast | None = None
    closed_form: bool = False
    curve: tuple[ScaleForecast, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def increases(self) -> tuple[float, ...]:
        """The increase of each task's summed loss in the planned merge."""
        return sums_of((tensor.increases for tensor in self.tensors), len(self.tasks))

    @property
    def weights(self) -> tuple[float, ...]:
        """What the increase of each task's summed loss is multiplied with in a total."""
        return task_weights(self.num_examples, self.weighting)

    def total(self, increases: Sequence[float]) -> float:
        """Return the weighted total of increases, one per task."""
        return weighted_total(increases, self.weights)

    def mean_increases(self, increases: Sequence[float]) -> tuple[float | None, ...]:
        """Return the increases of the mean losses; None where the examples were not counted."""
        return tuple(
            None if count is None else increase / count
            for increase, count in zip(increases, self.num_examples, strict=True)
        )

    def worst_tensors(self) -> tuple[PartForecast, ...]:
        """Return the tensors by their share of the total, the largest first."""
        return tuple(sorted(self.tensors, key=lambda part: -self.total(part.increases)))

    def worst_modules(self, module: Callable[[str], str] | None = None) -> tuple[PartForecast, ...]:
        """Return the sums over modules by their share of the total, the largest first.

        Args:
            module: Names the module of a tensor; :func:`block_of` when None.
        """
        named = module or block_of
        groups: dict[str, list[tuple[float, ...]]] = {}
        for tensor in self.tensors:
            groups.setdefault(named(tensor.name), []).append(tensor.increases)
        parts = [PartForecast(name, sums_of(g, len(self.tasks))) for name, g in groups.items()]
        return tuple(sorted(parts, key=lambda part: -self.total(part.increases)))

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``forecast.json``."""
        return {
            "method": self.method,
            "weighting": self.weighting,
            "num_examples": dict(zip(self.tasks, self.num_examples, strict=True)),
            "planned": {"scale": self.scale, **self._by_task(self.increases)},
            "unit": None if self.unit is None else dict(self.unit),
            "best": None
            if self.best is None
            else {
                "scale": self.best.scale,
                "closed_form": self.closed_form,
                **self._by_task(self.best.increases),
            },
            "curve": [{"scale": at.scale, **self._by_task(at.increases)} for at in self.curve],
            "tensors": {tensor.name: self._by_task(tensor.increases) for tensor in self.tensors},
            "modules": {
                module.name: self._by_task(module.increases) for module in self.worst_modules()
            },
            "notes": list(self.notes),
        }

    def _by_task(self, increases: Sequence[float]) -> dict[str, Any]:
        return {
            "total": self.total(increases),
            "mean_increase": dict(zip(self.tasks, self.mean_increases(increases), strict=True)),
            "sum_increase": dict(zip(self.tasks, increases, strict=True)),
        }


def task_weights(num_examples: Sequence[int | None], weighting: Weighting) -> tuple[float, ...]:
    """Return what each task's summed loss counts.

    Args:
        num_examples: One per task; must be known for ``"mean"``.
        weighting: ``"mean"`` divides by the number of examples, so that every task counts alike
            however much data it has; ``"sum"`` takes every example as one.

    Example:
        >>> task_weights([10, 1000], "mean"), task_weights([10, None], "sum")
        ((0.1, 0.001), (1.0, 1.0))
    """
    if weighting == "sum":
        return (1.0,) * len(num_examples)
    return tuple(1.0 / count for count in num_examples if count is not None)


def weighted_total(increases: Sequence[float], weights: Sequence[float]) -> float:
    """Return the total of increases, one per task, each times its weight."""
    return sum(w * increase for w, increase in zip(weights, increases, strict=True))


def block_of(name: str) -> str:
    """Return the module that a tensor is counted to: its numbered block, or else its own.

    A tensor that is neither a weight nor a bias stands for itself.

    >>> block_of("model.encoder.layer.3.attention.self.query.weight")
    'model.encoder.layer.3'
    >>> block_of("embeddings.word_embeddings.weight"), block_of("model.pos_embed")
    ('embeddings.word_embeddings', 'model.pos_embed')
    """
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    is_plain = len(parts) > 1 and parts[-1] in ("weight", "bias")
    return ".".join(parts[:-1]) if is_plain else name


def sums_of(increases: Iterable[Sequence[float]], num_tasks: int) -> tuple[float, ...]:
    """Return the sums over parts of the increases, one per task; in the parts' order."""
    total = [0.0] * num_tasks
    for each in increases:
        total = [a + b for a, b in zip(total, each, strict=True)]
    return tuple(total)
