r"""The exact diagonal Fisher information, :math:`h = Σ_n (∇ℓ_n)^2`, by a pass over the examples.

One batched forward and backward per batch, in which autograd's own weight gradients are replaced by
squared per-example ones; what that cannot cover exactly is computed one example at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_merge.curvature.batches import (
    batch_size_of,
    outside_inference,
    take_examples,
    unlike_pair,
)
from lit_merge.curvature.capture import Capture
from lit_merge.curvature.coverage import Coverage, wanted_parameters
from lit_merge.curvature.differentiation import differentiation
from lit_merge.curvature.estimator import CurvatureWarning, example_numbers
from lit_merge.curvature.losses import Reduction
from lit_merge.curvature.objective import Labels, Objective
from lit_merge.curvature.pass_estimator import PassEstimator
from lit_merge.curvature.passes import Problem, add_at_once, add_one_by_one
from lit_merge.curvature.probe import ProbeReport, find_coverage
from lit_merge.errors import InputError

_NAMED = 20  # how many parameters a warning names; the probe's report names all


class PerExampleFisher(PassEstimator):
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
    additive: ClassVar[bool] = True
    non_negative: ClassVar[bool] = True
    sharded: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        labels: Labels = "sampled",
        samples: int = 1,
        reduction: Reduction = "loss",
        parameters: Collection[str] | None = None,
        seed: int = 0,
    ) -> None:
        """Choose what to differentiate.

        Args:
            model: Any module; not wrapped by DDP, which averages gradients over ranks.
            loss: Called as ``loss(model, batch)``; returns the mean over the batch's examples.
            labels: "sampled" draws each example's label from the model's prediction, which gives
                the Fisher information in expectation (see :mod:`lit_merge.curvature.labels`);
                "expected" is that expectation, the diagonal of the generalised Gauss-Newton matrix,
                at the cost of a pass per output (see :mod:`lit_merge.curvature.expected`);
                "observed" takes the labels in the batch (the empirical Fisher).
            samples: How many labels are drawn per example, each at the cost of a pass; the sums are
                the mean over the draws.
            reduction: "loss" takes the loss as it is. "mean" and "sum" make every sequence an
                example of its own, whatever its length, by the mean or the sum of its own terms
                (see :mod:`lit_merge.curvature.losses`); "sum" with sampled labels is the curvature
                per token.
            parameters: Names or patterns of the parameters wanted, None for all trainable ones.
            seed: For sampled labels; the label of an example depends on it and on the example's
                index only.

        Raises:
            InputError: No parameter is trainable, a name is unknown, a parameter is sharded, or
                ``labels``, ``samples`` or ``reduction`` is not one of its values.
        """
        wanted = self._wanted(model, parameters)
        objective = self._objective(
            model, loss, labels=labels, samples=samples, reduction=reduction, seed=seed
        )
        super().__init__(wanted)
        self._problem = Problem(objective, wanted)
        self._coverage = Coverage()
        self._probed_with = 0

    def sums(self) -> dict[str, Tensor]:
        """Return a copy of the sums over the examples seen (zeros if none), by parameter name.

        Raises:
            InputError: A sum is not finite.
        """
        self._allocate()
        require_finite(self._totals)
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
        numbers = example_numbers(indices, size, self._num_examples)
        if self._probed_with < min(size, 2):
            pair = unlike_pair(batch)
            self._probe(take_examples(batch, pair), [numbers[i] for i in pair])
        self._allocate()
        objective = self._problem.objective
        with differentiation(objective.model):
            batch = outside_inference(batch)
            objective.forget()
            for round_objective in objective.rounds():
                self._add(replace(self._problem, objective=round_objective), batch, numbers)
        self._num_examples += size

    def _wanted(
        self, model: nn.Module, selection: Collection[str] | None
    ) -> dict[str, nn.Parameter]:
        return wanted_parameters(model, selection)

    def _objective(
        self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], **settings: Any
    ) -> Objective:
        return Objective(model, loss, **settings)

    def _add(self, problem: Problem, batch: Any, numbers: Sequence[int]) -> None:
        """Add the squared gradients of one objective."""
        coverage = self._coverage
        at_once = {name: problem.parameters[name] for name in coverage.at_once}
        capture = Capture(at_once, self._totals, len(numbers))
        if coverage.at_once or coverage.unused:
            add_at_once(problem, coverage, capture, batch, numbers)
        rest = {*coverage.one_by_one, *capture.failed}
        if rest:
            add_one_by_one(problem, rest, self._totals, batch, numbers)
        if capture.failed:
            self._coverage = coverage.moved(capture.failed)
            warn_of_loops(capture.failed)

    def _probe(self, examples: Any, indices: Sequence[int]) -> ProbeReport:
        objective = self._problem.objective
        with differentiation(objective.model):
            examples = outside_inference(examples)
            objective.forget()
            objective.require_expectation(examples, indices)
            self._coverage, report = find_coverage(self._problem, examples, indices)
        self._probed_with = len(indices)
        warn_of_loops(report.one_by_one)
        return report


def require_finite(sums: Mapping[str, Tensor]) -> None:
    """Raise unless all sums are finite."""
    for name, total in sums.items():
        if not total.isfinite().all():
            raise InputError(
                f"{name}: must have finite squared gradients; got NaN or Inf. Look for "
                "divisions by zero in the model, and for overflow in half precision."
            )


def warn_of_loops(reasons: Mapping[str, str]) -> None:
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
