r"""Curvature from the second moment that Adam keeps anyway.

Adam's ``exp_avg_sq`` is a running mean of squared step gradients, too small at first by
:math:`1-β_2^t`. A step gradient is the mean over B examples, so its expected square is the mean
per-example Fisher divided by B (see :mod:`lit_merge.curvature.batch_gradient`), and

.. math:: H ≈ N · B · v_t / (1 - β_2^t)

estimates the sum over the N training examples. It is as good as the last :math:`1/(1-β_2)` steps
are alike: an average along the end of the path, not at the final weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lit_merge.curvature.estimator import CurvatureEstimator, require_count, widen
from lit_merge.errors import InputError


class AdamSecondMoment(CurvatureEstimator):
    """The sums of :func:`adam_second_moment` of an optimizer, at the time they are asked for."""

    name: ClassVar[str] = "adam"
    exact: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    non_negative: ClassVar[bool] = True
    sharded: ClassVar[bool] = True

    def __init__(
        self,
        optimizer: Optimizer,
        names: Mapping[Parameter, str],
        *,
        num_examples: int,
        batch_size: int,
    ) -> None:
        """Bind an optimizer; the arguments are those of :func:`adam_second_moment`."""
        require_count("num_examples", num_examples)
        require_count("batch_size", batch_size)
        self._optimizer = optimizer
        self._names = names
        self._num_examples = num_examples
        self._batch_size = batch_size

    @property
    def num_examples(self) -> int:
        """N, examples in the training set."""
        return self._num_examples

    def sums(self) -> dict[str, Tensor]:
        """Return the estimate of the sums over the examples, by parameter name."""
        return adam_second_moment(
            self._optimizer,
            self._names,
            num_examples=self._num_examples,
            batch_size=self._batch_size,
        )


@torch.no_grad()
def adam_second_moment(
    optimizer: Optimizer,
    names: Mapping[Parameter, str],
    *,
    num_examples: int,
    batch_size: int,
) -> dict[str, Tensor]:
    """Return the curvature that an Adam optimizer has gathered, for its trainable parameters.

    Works for optimizers that keep ``exp_avg_sq`` with bias correction by ``betas``: Adam, AdamW,
    NAdam, RAdam, sharded or not.

    Args:
        optimizer: After at least one step.
        names: The name of each parameter of the model. Parameters that this optimizer does not hold
            are left out (with several optimizers, call it for each).
        num_examples: N, examples in the training set.
        batch_size: B, examples in a step: micro-batch × accumulation × ranks.

    Returns:
        By parameter name, the estimate of the sum over the examples.

    Raises:
        InputError: A number is not positive, or the optimizer does not have the second moment of a
            parameter.

    Note:
        The moment is of the gradients that the optimizer saw: with the weight decay of plain Adam
        (not AdamW) in them, and after clipping. A step whose gradient was clipped from the norm c·κ
        to the norm κ enters with 1/c² of its square, which cannot be undone, because the moment
        does not keep the norms: where most steps were clipped the numbers are too small, and those
        of the steps with the largest gradients the most. With ``amsgrad`` it is still the running
        mean, not its maximum, that is used.
    """
    require_count("num_examples", num_examples)
    require_count("batch_size", batch_size)
    result = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in names and parameter.requires_grad:
                mean = _unbiased(optimizer, group, parameter, names[parameter])
                result[names[parameter]] = mean * (num_examples * batch_size)
    return result


def _unbiased(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Parameter, name: str
) -> Tensor:
    """Return v_t / (1 − β₂ᵗ)."""
    state = optimizer.state.get(parameter, {})
    if "betas" not in group or "exp_avg_sq" not in state or "step" not in state:
        raise InputError(
            f"{name}: must have a second moment (exp_avg_sq) in the optimizer; got "
            f"{type(optimizer).__name__} with state {sorted(map(str, state)) or 'empty'}. "
            "Use Adam or AdamW and read it after a step in which the parameter had a gradient, or "
            "use the exact pass."
        )
    correction: float = 1 - group["betas"][1] ** float(state["step"])
    return widen(state["exp_avg_sq"]) / correction
