r"""The exact expectation over the labels that a model predicts, one output at a time.

The expectation of a squared gradient over labels from the model's own prediction is a sum of
squares over the outputs o of an example:

.. math:: E_y[(∂ℓ/∂θ_j)^2] = Σ_o w_o \Big(\frac{∂ℓ(y_o)}{∂θ_j}\Big)^2

=====================================  ==================  ========================================
loss                                   label :math:`y_o`   weight :math:`w_o`
=====================================  ==================  ========================================
``cross_entropy``, ``nll_loss``        class o             its probability
binary cross-entropies, ``mse_loss``   the mean, but one   1
                                       deviation off it
                                       in element o
=====================================  ==================  ========================================

For them it equals the diagonal :math:`(J^⊤ H J)_{jj}` of the generalised Gauss-Newton matrix, J the
Jacobian of the outputs and H the loss's Hessian in them, with one exception: of a binary
cross-entropy *averaged* over D elements of an example it is 1/D of that diagonal, because the
likelihood of an average of D terms is not their average likelihood (``reduction="sum"`` has no such
factor; a squared loss chooses its Gaussian accordingly).

Each output takes one forward and backward, in which every example's loss is weighted by
:math:`\sqrt{w_o}`. Of several losses in one forward the labels are independent, so each is taken
while the others have a gradient of zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_merge.curvature.estimator import widen
from lit_merge.curvature.labels import (
    bernoulli_logits,
    gaussian_of,
    replace_classes,
    without_classes,
)
from lit_merge.curvature.losses import CLASSES, Loss, LossInterception, Reduction
from lit_merge.errors import InputError

_MOST_OUTPUTS = 128  # passes over a batch, above which a few samples are the better bargain


class ExpectedLabels(LossInterception):
    """Within this context the losses of ``torch.nn.functional`` see one possible label.

    Attributes:
        outputs: How many outputs an example has in the losses intercepted so far.
    """

    def __init__(
        self, output: int, size: int, reduction: Reduction = "loss", *, factor: float = 1.0
    ) -> None:
        """Set up one of the forwards.

        Args:
            output: Which output, counted on over the losses of the forward.
            size: B, the number of examples.
            reduction: See :mod:`lit_merge.curvature.losses`.
            factor: What the losses are multiplied by.
        """
        super().__init__(size, reduction, factor=factor)
        self.outputs = 0
        self._output = output

    def substitute(self, loss: Loss, arguments: dict[str, Any]) -> Tensor | None:
        """Put the label of the output in the place of the targets, and return its weights."""
        if loss in CLASSES:
            return self._class(arguments)
        if loss is F.mse_loss:
            mean, deviation, replaced = gaussian_of(arguments, self)
            arguments[replaced] = self._deviated(mean, torch.full_like(mean, deviation))
            return None
        logits = bernoulli_logits(loss, arguments)
        p = widen(logits).sigmoid()
        deviation_of_p = (p * (1 - p)).sqrt()
        target = self._deviated(p, deviation_of_p.where(p < 0.5, -deviation_of_p))  # in [0, 1]
        same_type = loss is F.binary_cross_entropy
        arguments["target"] = target.to(logits.dtype) if same_type else target
        return None

    def _class(self, arguments: dict[str, Any]) -> Tensor:
        """Put the class in, and return the square root of its probability for every example."""
        logits: Tensor = arguments["input"].detach()
        like = without_classes(logits)
        if self.count_of(like) != 1:
            raise InputError(
                'labels: must be "sampled" where an example has several labels; got "expected" and '
                f'{self.count_of(like)} rows per example. Use labels="sampled" with several '
                "samples."
            )
        dim = min(1, logits.dim() - 1)
        own = self._next(logits.shape[dim])
        replace_classes(arguments, torch.full_like(like, own or 0, dtype=torch.int64))
        if own is None:
            return torch.zeros_like(like)
        return widen(logits).softmax(dim).select(dim, own).sqrt()

    def _deviated(self, mean: Tensor, deviation: Tensor) -> Tensor:
        """Return the mean with the deviation added in one element of every example."""
        count = self.count_of(mean)
        target = mean.reshape(self._size, count).clone()
        own = self._next(count)
        if own is not None:
            target[:, own] += deviation.reshape(self._size, count)[:, own]
        return target.view_as(mean)

    def _next(self, outputs: int) -> int | None:
        """Count the outputs of a call; return which of them is the one, if it is among them."""
        own = self._output - self.outputs
        self.outputs += outputs
        if self.outputs > _MOST_OUTPUTS:
            raise InputError(
                f'labels: must not be "expected" for more than {_MOST_OUTPUTS} outputs of an '
                f"example, each of which takes a forward and a backward; got {self.outputs}. Use "
                'labels="sampled" with several samples.'
            )
        return own if 0 <= own < outputs else None
