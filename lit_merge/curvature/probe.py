"""Before a pass: two examples, at once and one by one, on the user's own model.

Fast per-example gradients rest on assumptions about the model: that the examples are in the first
dimension, that a weight is used only by its own module, that a bare parameter is broadcast in a
certain way. None of them can be read off a module's type. The probe compares the squared gradients
of every parameter with those of a plain loop, and moves each parameter that differs to the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_merge.curvature.capture import Capture, Site, Use
from lit_merge.curvature.copies import layouts
from lit_merge.curvature.coverage import Coverage, supported_coverage
from lit_merge.curvature.differentiation import requiring_grad
from lit_merge.curvature.estimator import zeros_for
from lit_merge.curvature.kernels import PerExample
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
    problem: Problem, batch: Any, indices: Sequence[int]
) -> tuple[Coverage, ProbeReport]:
    """Find the fastest way that is right for every parameter.

    Must be called inside :func:`~lit_merge.curvature.differentiation.differentiation`.

    Args:
        problem: Loss and parameters.
        batch: Two examples, or one if there are no more.
        indices: Their indices in the data set.

    Raises:
        InputError: The loss is not the mean over the examples, has a gradient that is not finite,
            or does not depend on the parameters.
    """
    known = supported_coverage(problem.owners)
    trial = _Trial(problem, batch, indices)
    coverage = known.resting(trial.unused)
    trial.wrong(coverage)  # for the precision of the gradients
    trial.require_mean()
    trial = _surer_trial(problem, coverage, batch, indices) or trial
    while wrong := trial.wrong(coverage):
        coverage = coverage.moved(wrong)
    for alternatives in _alternatives(problem, known, coverage):
        for alternative in alternatives:
            candidate = alternative(coverage)
            if not trial.wrong(candidate):
                coverage = candidate
                break
    names = problem.parameters
    report = ProbeReport(
        len(indices),
        tuple(name for name in names if name in coverage.at_once),
        {name: coverage.one_by_one[name] for name in names if name in coverage.one_by_one},
        tuple(name for name in names if name in coverage.unused),
    )
    return coverage, report


def _surer_trial(
    problem: Problem, coverage: Coverage, batch: Any, indices: Sequence[int]
) -> _Trial | None:
    """Return the trial with labels that make large gradients, if the loss takes others."""
    any_labels = replace(problem, objective=problem.objective.with_any_labels())
    try:
        trial = _Trial(any_labels, batch, indices)
        trial.wrong(coverage)
        trial.require_mean()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a loss that only works with its own labels is judged with those
        return None
    return trial


def _alternatives(
    problem: Problem, known: Coverage, coverage: Coverage
) -> Iterator[list[Callable[[Coverage], Coverage]]]:
    """Yield other ways for parameters that are computed one by one, several to a group of them."""
    for site in known.sites:
        if site.layer.kind == "rows" and site.weight in coverage.one_by_one:
            batchless = replace(site, bias=None, without_examples=True)
            yield [partial(Coverage.with_site, site=batchless)]
    groups: dict[tuple[type, str, torch.Size], list[str]] = {}
    for name in known.one_by_one:
        if name in coverage.one_by_one:
            module, attribute = problem.owners[name][0]
            key = (type(module), attribute, problem.parameters[name].shape)
            groups.setdefault(key, []).append(name)
    for names in groups.values():
        guesses = layouts(problem.parameters[names[0]])
        yield [partial(Coverage.with_copies, names=names, layout=layout) for layout in guesses]


class _Trial:
    """The examples of the probe with their true squared gradients."""

    def __init__(self, problem: Problem, batch: Any, indices: Sequence[int]) -> None:
        self._problem = problem
        self._batch = batch
        self._indices = indices
        self._dtypes = {p.dtype for p in problem.parameters.values()}
        with requiring_grad(problem.parameters.values()):
            self._loss = problem.objective(batch, indices).detach()
        self._squares = {name: zeros_for(p) for name, p in problem.parameters.items()}
        try:
            losses, reached = add_one_by_one(
                problem, problem.parameters, self._squares, batch, indices
            )
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise InputError(
                "loss: must have derivatives on a batch of one example; got "
                f"{type(error).__name__}: {error}. {_CAUSES}"
            ) from error
        self._mean = torch.stack(losses).mean()
        self._reached = reached
        self.unused = frozenset(problem.parameters) - reached
        if not reached:
            raise InputError(
                "loss: must depend on the trainable parameters; got no gradient for any of them. "
                "Look for detach() and no_grad() between the model and the loss."
            )
        for name, squares in self._squares.items():
            if not squares.isfinite().all():
                raise InputError(
                    f"{name}: must have a finite gradient; got NaN or Inf on the examples of the "
                    "probe. Look for divisions by zero, and for overflow in half precision."
                )

    def require_mean(self) -> None:
        """Raise unless the loss of the examples together is the mean of their losses."""
        if not self._is_mean(self._loss):
            raise InputError(
                "loss: must be the mean over the examples of losses that do not depend on each "
                f"other; got {float(self._loss):.8g} for two examples whose mean is "
                f"{float(self._mean):.8g}. {_CAUSES}"
            )

    def wrong(self, coverage: Coverage) -> dict[str, str]:
        """Return which parameters the coverage gets wrong at once, and why."""
        totals = {name: zeros_for(self._problem.parameters[name]) for name in coverage.at_once}
        capture = _MeasuringCapture(coverage.sites, totals, len(self._indices))
        try:
            loss = add_at_once(self._problem, coverage, capture, self._batch, self._indices)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # anything may come from a model that gets other shapes
            line = str(error).partition("\n")[0]
            return _blamed(coverage, capture, f"the model fails otherwise ({line})")
        self._dtypes |= {loss.dtype, *capture.dtypes}
        if not self._is_mean(loss):
            return _blamed(coverage, capture, "the loss changes otherwise")
        wrong = {name: why for name, why in capture.failed.items() if name in totals}
        for name, total in totals.items():
            found = (name in capture.reached) == (name in self._reached)
            if not found or not self._agrees(name, total, capture.cancelled.get(name, 0.0)):
                wrong.setdefault(name, "it is used in another way than by calls of its module")
        return wrong

    def _agrees(self, name: str, squares: Tensor, cancelled: float) -> bool:
        true = self._squares[name]
        tolerance = self._tolerance()
        allowed = tolerance.square * float(true.max()) + tolerance.rounding**2 * cancelled
        return bool(((squares - true).abs() <= allowed).all())  # NaN does not agree

    def _is_mean(self, loss: Tensor) -> bool:
        size = 1e-3 + float(self._mean.abs())
        return abs(float(loss) - float(self._mean)) <= self._tolerance().loss * size

    def _tolerance(self) -> _Tolerance:
        if self._dtypes & {torch.float16, torch.bfloat16}:
            return _HALF
        return _DOUBLE if self._dtypes == {torch.float64} else _SINGLE


class _MeasuringCapture(Capture):
    """Measures beside everything else how much is added up, and may cancel, in each bias.

    Attributes:
        cancelled: By the biases' names, the largest square of a sum of absolute values.
    """

    def __init__(self, sites: Sequence[Site], totals: dict[str, Tensor], batch_size: int) -> None:
        super().__init__(sites, totals, batch_size)
        self.cancelled: dict[str, float] = {}

    @torch.no_grad()
    def _arrive(self, use: Use, g: Tensor) -> None:
        super()._arrive(use, g)
        name = use.site.bias
        if name is not None and name not in self.failed:
            sums = use.site.layer.bias(g.abs(), self._size)
            assert isinstance(sums, PerExample)
            square = float(sums.values.square().sum(0).max())
            self.cancelled[name] = self.cancelled.get(name, 0.0) + square


def _blamed(coverage: Coverage, capture: Capture, reason: str) -> dict[str, str]:
    """Blame those whose shape was changed when everything goes wrong, or else everything."""
    return dict.fromkeys((capture.broadcast & coverage.at_once) or coverage.at_once, reason)


_CAUSES = (
    "Usual causes: a sum instead of a mean, a mean over tokens of texts of different lengths, "
    "batch statistics (BatchNorm without running statistics), a loss between examples "
    "(contrastive), random numbers in the forward, reentrant checkpointing."
)
