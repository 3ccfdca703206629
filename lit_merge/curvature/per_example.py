r"""The exact diagonal Fisher information, :math:`h = Σ_n (∇ℓ_n)^2`, by a pass over the examples.

One batched forward and backward per batch, in which autograd's own weight gradients are replaced by
squared per-example ones; what that cannot cover exactly is computed one example at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_merge.curvature.batches import (
    batch_size_of,
    outside_inference,
    take_examples,
    unlike_pair,
)
from lit_merge.curvature.capture import Capture
from lit_merge.curvature.coverage import Coverage, owners_of, wanted_parameters
from lit_merge.curvature.differentiation import differentiation
from lit_merge.curvature.estimator import CurvatureEstimator, CurvatureWarning, zeros_for
from lit_merge.curvature.objective import Objective
from lit_merge.curvature.passes import Problem, add_at_once, add_one_by_one
from lit_merge.curvature.probe import ProbeReport, find_coverage
from lit_merge.errors import InputError

_NAMED = 20  # how many parameters a warning names; the probe's report names all


class PerExampleFisher(CurvatureEstimator):
    """Σ_n (∂ℓ_n/∂θ)² over the examples of the batches given to :meth:`update`.

    The model runs in eval mode and is left exactly as it was: training flags, requires_grad, .grad,
    hooks, random numbers. Parameters frozen from the start are left out of the result; parameters
    that the loss does not use have zeros. It works inside ``no_grad`` and ``inference_mode``.

    Note:
        The loss is differentiated in the precision it runs in. Under float16 autocast small
        gradients vanish without the scaler that training has; use bfloat16 or float32.
    """

    name: ClassVar[str] = "per-example"
    exact: ClassVar[bool] = True
    sharded: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        labels: Literal["sampled", "observed"] = "sampled",
        parameters: Collection[str] | None = None,
        seed: int = 0,
    ) -> None:
        """Choose what to differentiate.

        Args:
            model: Any module; not wrapped by DDP, which averages gradients over ranks.
            loss: Called as ``loss(model, batch)``; returns the mean over the batch's examples.
            labels: "sampled" draws each example's label from the model's prediction, which gives
                the Fisher information (see :mod:`lit_merge.curvature.labels`); "observed" takes
                the labels in the batch (the empirical Fisher).
            parameters: Names or patterns of the parameters wanted, None for all trainable ones.
            seed: For sampled labels; the label of an example depends on it and on the example's
                index only.

        Raises:
            InputError: No parameter is trainable, a name is unknown, a parameter is sharded, or
                ``labels`` is unknown.
        """
        wanted = wanted_parameters(model, parameters)
        objective = Objective(model, loss, labels=labels, seed=seed)
        self._problem = Problem(objective, wanted, owners_of(model, wanted))
        self._coverage = Coverage()
        self._probed_with = 0
        self._totals: dict[str, Tensor] = {}
        self._num_examples = 0

    @property
    def num_examples(self) -> int:
        """How many examples the sums are over."""
        return self._num_examples

    def sums(self) -> dict[str, Tensor]:
        """Return a copy of the sums over the examples seen (zeros if none), by parameter name.

        Raises:
            InputError: A sum is not finite.
        """
        self._allocate()
        for name, total in self._totals.items():
            if not total.isfinite().all():
                raise InputError(
                    f"{name}: must have finite squared gradients; got NaN or Inf. Look for "
                    "divisions by zero in the model, and for overflow in half precision."
                )
        with torch.inference_mode(False):
            return {
                name: total.clone(memory_format=torch.contiguous_format)
                for name, total in self._totals.items()
            }

    def probe(self, two_examples: Any) -> ProbeReport:
        """Compare both ways of computing on two examples, and choose for every parameter.

        :meth:`update` does this by itself with its first batch. Parameters that must be computed
        one example at a time are named in a :class:`CurvatureWarning`.

        Args:
            two_examples: A batch of two examples, the more different the better. Of a larger batch,
                two are taken.

        Raises:
            InputError: The loss is not the mean over the examples, is not finite, or does not
                depend on the parameters.
        """
        pair = unlike_pair(two_examples)
        return self._probe(take_examples(two_examples, pair), pair)

    def update(self, batch: Any, *, indices: Sequence[int] | None = None) -> None:
        """Add the examples of a batch.

        Args:
            batch: B examples, on the model's device.
            indices: [B], the index of each example in the data set, for the sampled labels; None
                counts on from the examples seen.

        Raises:
            InputError: The loss is not finite, indices do not match the batch, or what
                :meth:`probe` raises.
        """
        size = batch_size_of(batch)
        numbers = self._numbers(size, indices)
        if self._probed_with < min(size, 2):
            pair = unlike_pair(batch)
            self._probe(take_examples(batch, pair), [numbers[i] for i in pair])
        self._allocate()
        coverage, problem = self._coverage, self._problem
        capture = Capture(coverage.sites, self._totals, size)
        with differentiation(problem.objective.model):
            batch = outside_inference(batch)
            problem.objective.forget()
            if coverage.at_once or coverage.unused:
                add_at_once(problem, coverage, capture, batch, numbers)
            rest = {*coverage.one_by_one, *capture.failed}
            if rest:
                add_one_by_one(problem, rest, self._totals, batch, numbers)
        self._num_examples += size
        if capture.failed:
            self._coverage = coverage.moved(capture.failed)
            _warn(capture.failed)

    def _probe(self, examples: Any, indices: Sequence[int]) -> ProbeReport:
        with differentiation(self._problem.objective.model):
            self._problem.objective.forget()
            self._coverage, report = find_coverage(
                self._problem, outside_inference(examples), indices
            )
        self._probed_with = len(indices)
        _warn(report.one_by_one)
        return report

    def _numbers(self, size: int, indices: Sequence[int] | None) -> tuple[int, ...]:
        if indices is None:
            return tuple(range(self._num_examples, self._num_examples + size))
        if len(indices) != size:
            raise InputError(
                f"indices: must be one per example of the batch; got {len(indices)} for {size} "
                "examples. Give the examples' indices in the data set, or None."
            )
        return tuple(int(index) for index in indices)

    def _allocate(self) -> None:
        if not self._totals:  # not before the probe, which needs as much memory for a moment
            self._totals = {name: zeros_for(p) for name, p in self._problem.parameters.items()}


def _warn(reasons: Mapping[str, str]) -> None:
    """Name the parameters that are computed one example at a time."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        warnings.warn(
            f"{', '.join(names[:_NAMED])}{more}: computed one example at a time, because {reason}. "
            "The curvature is exact, but every example costs a forward and a backward of its own.",
            CurvatureWarning,
            stacklevel=4,
        )
