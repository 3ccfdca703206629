"""Before a pass: two examples, at once and one by one, on the user's own model.

Fast per-example gradients rest on assumptions about the model: that the examples are in the first
dimension, that a weight is used only by its own module, that a bare parameter is broadcast in a
certain way. None of them can be read off a module's type. The probe compares the squared gradients
of every parameter with those of a plain loop, and moves each parameter that differs to the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_merge.curvature.backward import require_seen_forward
from lit_merge.curvature.batches import split_batch
from lit_merge.curvature.capture import Arrival, Capture
from lit_merge.curvature.coverage import Coverage
from lit_merge.curvature.differentiation import requiring_grad
from lit_merge.curvature.estimator import widen, zeros_for
from lit_merge.curvature.kernels import PerExample
from lit_merge.curvature.objective import CAUSES_OF_NO_MEAN
from lit_merge.curvature.passes import Problem, add_at_once, add_one_by_one
from lit_merge.errors import InputError


@dataclass(frozen=True)
class ProbeReport:
    """What the probe found.

    Attributes:
        num_examples: How many examples it compared (2, or 1 if there was no second).
        at_once: Parameters computed for all examples of a batch at once.
        one_by_one: Parameters computed one example at a time, with the reason.
        unused: Parameters without a gradient; their curvature is zero.
    """

    num_examples: int
    at_once: tuple[str, ...]
    one_by_one: Mapping[str, str]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        """Return the counts."""
        return (
            f"{len(self.at_once)} parameters at once, {len(self.one_by_one)} one example at a "
            f"time, {len(self.unused)} unused"
        )


class _Tolerance(NamedTuple):
    """How far two computations in one precision may be apart.

    Attributes:
        loss: Share of the loss.
        square: Share of a parameter's largest square.
        rounding: Share of the sum of the absolute values that a bias' gradient is the sum of: the
            true gradient of the bias of attention keys is zero, and only rounding is left of it.
    """

    loss: float
    square: float
    rounding: float


_DOUBLE = _Tolerance(1e-6, 1e-5, 1e-6)  # models may compute norms and losses in float32
_SINGLE = _Tolerance(1e-3, 1e-2, 1e-5)  # also with the reduced precision (TF32) of GPUs
_HALF = _Tolerance(3e-2, 1e-1, 1e-1)


def find_coverage(
    problem: Problem,
    batch: Any,
    indices: Sequence[int],
    make_trial: Callable[[Problem, Any, Sequence[int]], Trial] | None = None,
) -> tuple[Coverage, ProbeReport]:
    """Find the fastest way that is right for every parameter.

    Must be called inside :func:`~lit_merge.curvature.differentiation.differentiation`.

    Args:
        problem: Loss and parameters.
        batch: Two examples, or one if there are no more.
        indices: Their indices in the data set.
        make_trial: Makes the comparison; None for one within this process.

    Raises:
        InputError: The loss is not the mean over the examples, has a gradient that is not finite,
            or does not depend on the parameters.
    """
    with requiring_grad(problem.parameters.values()):
        # What is wrong with the loss itself is raised as it is.
        require_seen_forward(problem.objective(batch, indices))
    make_trial = make_trial or Trial
    surer = _surer_trial(problem, batch, indices, make_trial)
    trial = surer or make_trial(problem, batch, indices)
    coverage = trial.first_guess
    while wrong := trial.wrong(coverage):
        coverage = coverage.moved(wrong)
    trial.require_mean(problem)
    names = problem.parameters
    report = ProbeReport(
        len(indices),
        tuple(name for name in names if name in coverage.at_once),
        {name: coverage.one_by_one[name] for name in names if name in coverage.one_by_one},
        tuple(name for name in names if name in coverage.unused),
    )
    return coverage, report


def _surer_trial(
    problem: Problem,
    batch: Any,
    indices: Sequence[int],
    make_trial: Callable[[Problem, Any, Sequence[int]], Trial],
) -> Trial | None:
    """Return the trial with labels that make large gradients, if the loss takes others."""
    any_labels = replace(problem, objective=problem.objective.with_any_labels())
    try:
        trial = make_trial(any_labels, batch, indices)
        trial.wrong(trial.first_guess)  # for the precision of the gradients
        trial.require_mean(any_labels)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a loss that only works with its own labels is judged with those
        return None
    return trial


class Trial:
    """The examples of the probe with their true squared gradients."""

    def __init__(self, problem: Problem, batch: Any, indices: Sequence[int]) -> None:
        self._problem = problem
        self._batch = batch
        self._indices = indices
        self._dtypes = {p.dtype for p in problem.parameters.values()}
        self._last: tuple[Coverage, dict[str, str]] | None = None
        self._squares = {name: self._zeros(name) for name in problem.parameters}
        try:
            losses, reached = self._one_by_one(self._squares)
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise InputError(
                "loss: must have derivatives on a batch of one example; got "
                f"{type(error).__name__}: {error}. {CAUSES_OF_NO_MEAN}"
            ) from error
        self._mean = torch.stack(losses).mean()
        self._reached = reached
        self.unused = frozenset(problem.parameters) - reached
        if not reached:
            raise InputError(
                "loss: must depend on the trainable parameters; got no gradient for any of them. "
                "Look for detach() and no_grad() between the model and the loss."
            )
        self._largest = self._largest_of(self._squares)
        for name, largest in self._largest.items():
            if not math.isfinite(largest):
                raise InputError(
                    f"{name}: must have a finite gradient; got NaN or Inf on the examples of the "
                    "probe. Look for divisions by zero, and for overflow in half precision."
                )

    @property
    def first_guess(self) -> Coverage:
        """All parameters that got a gradient at once."""
        return Coverage(frozenset(self._reached), unused=self.unused)

    def require_mean(self, problem: Problem) -> None:
        """Raise unless a loss of the examples together is the mean of their losses.

        Args:
            problem: The same, with whatever labels.
        """
        with requiring_grad(problem.parameters.values()):
            together = problem.objective(self._batch, self._indices).detach()
            parts = [
                problem.objective(example, [index]).detach()
                for index, example in zip(self._indices, split_batch(self._batch), strict=True)
            ]
        mean = torch.stack(parts).mean()
        if not self._are_close(together, mean):
            raise InputError(
                "loss: must be the mean over the examples of losses that do not depend on each "
                f"other; got {float(together):.8g} for two examples whose mean is "
                f"{float(mean):.8g}. {CAUSES_OF_NO_MEAN}"
            )

    def wrong(self, coverage: Coverage) -> dict[str, str]:
        """Return which parameters the coverage gets wrong at once, and why."""
        if self._last is None or self._last[0] != coverage:
            self._last = coverage, self._agreed(self._compare(coverage))
        return self._last[1]

    def _compare(self, coverage: Coverage) -> dict[str, str]:
        totals = {name: self._zeros(name) for name in coverage.at_once}
        try:
            loss, capture = self._at_once(coverage, totals)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # anything may come from a model that gets other shapes
            line = str(error).partition("\n")[0]
            return dict.fromkeys(coverage.at_once, f"the model fails otherwise ({line})")
        self._dtypes |= {loss.dtype, *capture.dtypes}
        if not self._are_close(loss, self._mean):
            return dict.fromkeys(coverage.at_once, "the loss changes otherwise")
        wrong = {name: why for name, why in capture.failed.items() if name in totals}
        for name, total in totals.items():
            found = (name in capture.reached) == (name in self._reached)
            if not found or not self._agrees(name, total, capture.cancelled.get(name, 0.0)):
                wrong.setdefault(name, "its fast form gives something else than the loop")
        return wrong

    def _zeros(self, name: str) -> Tensor:
        """Return zeros for the squares of a parameter."""
        return zeros_for(self._problem.parameters[name])

    def _one_by_one(self, totals: dict[str, Tensor]) -> tuple[list[Tensor], set[str]]:
        """Add the squares by the loop; return the losses, and which parameters got a gradient."""
        return add_one_by_one(
            self._problem, self._problem.parameters, totals, self._batch, self._indices
        )

    def _at_once(
        self, coverage: Coverage, totals: dict[str, Tensor]
    ) -> tuple[Tensor, MeasuringCapture]:
        """Add the squares by a coverage; return the loss, and what was seen on the way."""
        at_once = {name: self._problem.parameters[name] for name in totals}
        capture = MeasuringCapture(at_once, totals, len(self._indices))
        loss = add_at_once(self._problem, coverage, capture, self._batch, self._indices)
        return loss, capture

    def _largest_of(self, squares: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the largest square of every parameter."""
        return {name: _largest(value) for name, value in squares.items()}

    def _agreed(self, wrong: dict[str, str]) -> dict[str, str]:
        """Return which parameters are wrong anywhere."""
        return wrong

    def _agrees(self, name: str, squares: Tensor, cancelled: float) -> bool:
        tolerance = self._tolerance()
        # Where the derivative is truly zero, rounding is judged by what is added up, or else by the
        # other parameters of the same module.
        module = name.rpartition(".")[0]
        siblings = (v for n, v in self._largest.items() if n.rpartition(".")[0] == module)
        rounding = tolerance.rounding**2 * max(cancelled, *siblings)
        allowed = tolerance.square * self._largest[name] + rounding
        return self._difference(squares, self._squares[name]) <= allowed  # NaN does not agree

    def _difference(self, one: Tensor, other: Tensor) -> float:
        if one.numel() == 0:
            return 0.0
        return float(torch.linalg.vector_norm(one - other, torch.inf))

    def _are_close(self, loss: Tensor, mean: Tensor) -> bool:
        allowed = self._tolerance().loss * (1e-3 + float(mean.abs()))
        return abs(float(loss) - float(mean)) <= allowed

    def _tolerance(self) -> _Tolerance:
        if self._dtypes & {torch.float16, torch.bfloat16}:
            return _HALF
        return _DOUBLE if self._dtypes == {torch.float64} else _SINGLE


class MeasuringCapture(Capture):
    """Measures beside everything else how much is added up, and may cancel, in each vector.

    Attributes:
        cancelled: By parameter name, the largest square of a sum of absolute values.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], totals: dict[str, Tensor], batch_size: int
    ) -> None:
        super().__init__(parameters, totals, batch_size)
        self.cancelled: dict[str, float] = {}

    def _add(self, key: str | int, arrival: Arrival, g: Tensor) -> None:
        super()._add(key, arrival, g)
        contribution = arrival(g.abs())
        if isinstance(contribution, PerExample):
            square = _largest(widen(contribution.values).square().sum(0))
            for name in self._following.names_of(key):
                self.cancelled[name] = self.cancelled.get(name, 0.0) + square


def _largest(squares: Tensor) -> float:
    return float(squares.max()) if squares.numel() else 0.0
