r"""Curvature from the squared gradients of training steps: cheap, and right in expectation.

The gradient of a step is the mean of B per-example gradients, :math:`\bar g = \frac1B Σ_n g_n`. If
these are independent with mean zero, then :math:`E[\bar g^2] = \frac{1}{B^2} Σ_n E[g_n^2]`, so

.. math:: B^2 \bar g^2

is an unbiased estimate of Σ_n F_n over the B examples. With labels sampled from the model's own
predictions the mean is zero at any weights; with observed labels it is zero where the training
loss is at its optimum, and elsewhere the estimate is too large by :math:`B(B-1) E[\bar g]^2`.
Squaring without the factor is too small by B². Summed over an epoch of N/B steps this is N·B times
the mean of the squared step gradients, the same factor as for Adam's second moment.

B counts all examples in a step: micro-batch × accumulation × ranks.

A step is checked as a whole before any of it is added, because sums that a NaN was added to cannot
be put right again. An update therefore reads the gradients twice and the sums once, at the speed of
the memory, and costs nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lit_merge.curvature.estimator import CurvatureEstimator, require_count, widen
from lit_merge.errors import InputError


class SquaredBatchGradient(CurvatureEstimator):
    """Σ over steps of B² ḡ²; with sharded gradients every rank keeps its own shard of the sums."""

    name: ClassVar[str] = "squared-batch-gradient"
    exact: ClassVar[bool] = False
    additive: ClassVar[bool] = True
    non_negative: ClassVar[bool] = True
    sharded: ClassVar[bool] = True

    def __init__(self, *, agree: Callable[[bool], bool] = bool) -> None:
        """Begin at zero.

        Args:
            agree: Makes of "my gradients are finite" whether all ranks' are, where each is given
                its own shards of them; the default is for gradients that all ranks have alike.
        """
        self._agree = agree
        self._totals: dict[str, Tensor] = {}
        self._examples: dict[str, int] = {}
        self._skipped_steps = 0

    @property
    def num_examples(self) -> int:
        """How many examples the sums are over: those of the parameter that saw the most."""
        return max(self._examples.values(), default=0)

    @property
    def skipped_steps(self) -> int:
        """How many updates were left out because a gradient was not finite."""
        return self._skipped_steps

    def sums(self) -> dict[str, Tensor]:
        """Return a copy of the sums over the examples seen, by parameter name."""
        return {name: total.clone() for name, total in self._totals.items()}

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor], *, num_examples: int) -> None:
        """Add one step.

        A step in which any gradient is NaN or Inf is skipped and counted: mixed precision's scaler
        skips it too.

        Args:
            gradients: By parameter name, the unscaled, unclipped gradient of the mean loss; dense.
            num_examples: B, the examples that the mean is over.

        Raises:
            InputError: There are no gradients, or ``num_examples`` is not positive.
        """
        require_count("num_examples", num_examples)
        if not gradients:
            raise InputError(
                "gradients: must hold the gradient of at least one parameter; got none. Call it "
                "after the backward."
            )
        wide = [widen(gradient.detach()) for gradient in gradients.values()]
        if not self._agree(_all_finite(wide)):
            self._skipped_steps += 1
            return
        for name, gradient in zip(gradients, wide, strict=True):
            if name not in self._totals:
                self._totals[name] = torch.zeros_like(gradient)
            self._examples[name] = self._examples.get(name, 0) + num_examples
        totals = [self._totals[name] for name in gradients]
        torch._foreach_addcmul_(totals, wide, wide, value=float(num_examples) ** 2)

    def resume(
        self, sums: Mapping[str, Tensor], *, num_examples: int, skipped_steps: int = 0
    ) -> None:
        """Add the sums of an interrupted run, so that it continues as if it had not stopped.

        Args:
            sums: What :meth:`sums` gave.
            num_examples: Of these sums.
            skipped_steps: Of that run.
        """
        for name, total in sums.items():
            if name in self._totals:
                self._totals[name] += total
            else:
                self._totals[name] = widen(total).clone()
            self._examples[name] = self._examples.get(name, 0) + num_examples
        self._skipped_steps += skipped_steps


def _all_finite(tensors: list[Tensor]) -> bool:
    """Whether all entries on all shards are finite: one pass, one number to wait for."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for norm in torch._foreach_norm(tensors):
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        alike.setdefault((whole.device, whole.dtype), []).append(whole)
    return all(bool(torch.stack(norms).isfinite().all()) for norms in alike.values())
