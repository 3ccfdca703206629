r"""Curvature from the Hessian that IVON keeps anyway.

IVON (Shen et al. (2024), arXiv:2402.17641; package ``ivon-opt``) learns a Gaussian posterior with
the precision :math:`\text{ess}·(h + δ)`: h is a running mean of estimates of the diagonal Hessian
of the *mean* loss, δ the weight decay. What its settings do to the numbers:

* ``hess_init`` :math:`h_0` is where the running mean starts; after t steps
  :math:`β_2^t h_0` of it is left (with the default :math:`β_2 = 0.99999`, 90 % after 10 000 steps).
  It is taken out, as Adam's bias correction does:

  .. math:: H ≈ N · \max\Big(0, \frac{h_t - β_2^t h_0}{1 - β_2^t}\Big)

  What remains is the mean of few noisy estimates if there were few steps: its relative error is at
  least :math:`\sqrt{2/t}`. And IVON adds to :math:`h_0` in single precision: what is below
  :math:`6·10^{-8} h_0/(1-β_2)` (0.006 by default) is rounding. Train with a small ``hess_init``.
* ``beta2`` makes it an average along the path of training, not at the final weights.
* ``ess`` and δ set how far around the weights the Hessian is averaged (the posterior's variance);
  δ itself is not in h.
* IVON keeps h positive by a correction of second order, which makes it too large by about
  :math:`\tfrac12 (1-β_2)\,\text{ess}\,E[\bar g^2]`, with ḡ the gradient of a step.
* ``hess_approx="gradsq"`` estimates :math:`\text{ess}·\bar g^2` instead, which is the mean Fisher
  information times ess/B for steps of B examples; it is multiplied by B/ess.
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

_KEPT = frozenset({"hess", "hess_init", "beta2", "ess"})


class IvonHessian(CurvatureEstimator):
    """The sums of :func:`ivon_hessian` of an optimizer, at the time they are asked for."""

    name: ClassVar[str] = "ivon"
    exact: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    non_negative: ClassVar[bool] = True
    sharded: ClassVar[bool] = False

    def __init__(
        self,
        optimizer: Optimizer,
        names: Mapping[Parameter, str],
        *,
        num_examples: int,
        batch_size: int | None = None,
        steps: int | None = None,
    ) -> None:
        """Bind an optimizer; the arguments are those of :func:`ivon_hessian`."""
        require_count("num_examples", num_examples)
        self._optimizer = optimizer
        self._names = names
        self._num_examples = num_examples
        self._batch_size = batch_size
        self._steps = steps

    @property
    def num_examples(self) -> int:
        """N, examples in the training set."""
        return self._num_examples

    def sums(self) -> dict[str, Tensor]:
        """Return the estimate of the sums over the examples, by parameter name."""
        return ivon_hessian(
            self._optimizer,
            self._names,
            num_examples=self._num_examples,
            batch_size=self._batch_size,
            steps=self._steps,
        )


@torch.no_grad()
def ivon_hessian(
    optimizer: Optimizer,
    names: Mapping[Parameter, str],
    *,
    num_examples: int,
    batch_size: int | None = None,
    steps: int | None = None,
) -> dict[str, Tensor]:
    """Return the curvature that an IVON optimizer has gathered, for its trainable parameters.

    Args:
        optimizer: After at least one step, outside of its ``sampled_params``.
        names: The name of each parameter of the model. Parameters that this optimizer does not hold
            are left out (with several optimizers, call it for each).
        num_examples: N, examples in the training set.
        batch_size: B, examples in a step: micro-batch × accumulation × ranks. Only needed with
            ``hess_approx="gradsq"``.
        steps: t, steps since ``hess_init``. None takes the optimizer's own count, which is not in
            its state dict: after a run was resumed, give the true number.

    Returns:
        By parameter name, the estimate of the sum over the examples.

    Raises:
        InputError: A number is not positive or is missing, the optimizer is not IVON, or it has not
            made a step.
    """
    require_count("num_examples", num_examples)
    if not all(group.keys() >= _KEPT for group in optimizer.param_groups):
        raise InputError(
            "optimizer: must be IVON, of the package ivon-opt; got "
            f"{type(optimizer).__name__}. Use adam_second_moment for Adam, or the exact pass."
        )
    taken = int(getattr(optimizer, "current_step", 0)) if steps is None else steps
    if taken < 1:
        raise InputError(
            "steps: must be at least 1; got an optimizer that has made none. Read it after "
            "training, and give the number of steps if its state was loaded."
        )
    result = {}
    for group in optimizer.param_groups:
        hessian = _mean_hessian(optimizer, group, taken, batch_size) * num_examples
        parameters = [parameter for parameter in group["params"] if parameter is not None]
        parts = torch.split(hessian, [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            if parameter in names and parameter.requires_grad:
                result[names[parameter]] = part.view(parameter.shape).clone()
    return result


def _mean_hessian(
    optimizer: Optimizer, group: dict[str, Any], steps: int, batch_size: int | None
) -> Tensor:
    """Return the Hessian of the mean loss, flat, of the parameters of a group."""
    left = float(group["beta2"]) ** steps
    if left == 1:
        raise InputError(
            "optimizer: must have a beta2 below 1 for a Hessian to be learned; got "
            f"{group['beta2']}. Use the exact pass."
        )
    kept: Tensor = widen(group["hess"])
    learned: Tensor = ((kept - left * group["hess_init"]) / (1 - left)).clamp(min=0)
    if getattr(optimizer, "hess_approx", "price") != "gradsq":
        return learned
    if batch_size is None:
        raise InputError(
            'batch_size: must be given for IVON with hess_approx="gradsq"; got None. Give the '
            "number of examples of a step: micro-batch × accumulation × ranks."
        )
    require_count("batch_size", batch_size)
    unit = batch_size / float(group["ess"])
    return learned * unit
