r"""The losses of :mod:`torch.nn.functional` inside a user's loss function, intercepted.

Any ``training_step`` computes its loss by a few functions of torch. Within a
:class:`LossInterception` their calls can be given other targets
(:mod:`~lit_merge.curvature.labels`, :mod:`~lit_merge.curvature.expected`), and their terms can be
averaged in another way. The functions: ``cross_entropy``, ``nll_loss``, ``binary_cross_entropy``,
``binary_cross_entropy_with_logits`` and ``mse_loss``.

The curvature needs a mean over examples, but the mean over all tokens of some texts weighs long
texts more. With the terms :math:`ℓ_{nt}` of example n, :math:`T_n` in number,

========  =================================================================================
"loss"    the loss is taken as the user's function computes it
"mean"    :math:`\frac1B Σ_n \frac{1}{T_n} Σ_t ℓ_{nt}`: every sequence counts the same
"sum"     :math:`\frac1B Σ_n Σ_t ℓ_{nt}`: the log-likelihoods of whole sequences
========  =================================================================================

Under "sum" with sampled labels the scores of two tokens of a sequence are uncorrelated, so
:math:`E[(Σ_t g_{nt})^2] = Σ_t E[g_{nt}^2]`: the curvature that has every token for an example of
its own, the text before it given.

A mean with class weights is the weighted mean within each example, as torch's is. An example
without a single term has the loss zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lit_merge.errors import InputError

Reduction = Literal["loss", "mean", "sum"]
Loss = Callable[..., Tensor]

CLASSES = (F.cross_entropy, F.nll_loss)


class LossInterception(TorchFunctionMode):
    """Within this context losses of torch see other targets, and are reduced example by example.

    The base class leaves the targets as they are.

    Attributes:
        calls: How many losses were intercepted.
        factor: What their values are multiplied by.
    """

    def __init__(self, size: int, reduction: Reduction = "loss", *, factor: float = 1.0) -> None:
        """Set up one forward.

        Args:
            size: B, the number of examples.
            reduction: How the terms of an example are put together; see the module.
            factor: What the losses are multiplied by.
        """
        super().__init__()
        self.calls = 0
        self.factor = factor
        self._size = size
        self._reduction = reduction
        self._summed: list[Tensor] = []
        self._depends = False  # whether a loss depends on anything that requires a gradient

    def substitute(self, loss: Loss, arguments: dict[str, Any]) -> Tensor | None:
        """Change the arguments of a call in place.

        Args:
            loss: The function of torch.
            arguments: Its arguments by name.

        Returns:
            A weight for each of its terms, or None for 1.
        """
        return None

    def scaled_back(self, value: Tensor) -> Tensor:
        r"""Return the value that a loss function has made of the intercepted losses.

        A sum over terms is divided by their number afterwards, in a way that cannot be known (by
        ``num_items_in_batch`` in transformers). It has been replaced by the mean over examples R:
        whatever slope α the value has in R, the slope is made 1 by adding :math:`(1-α)R`.
        """
        for mean in self._summed:
            if value.requires_grad:
                (slope,) = torch.autograd.grad(value, mean, retain_graph=True, allow_unused=True)
                if slope is not None:
                    value = value + (1 - slope) * mean
        return value if self._depends or not self._summed else value.detach()

    def reduction_of(self, arguments: dict[str, Any]) -> str:
        """Return how the terms of an example are put together in a call."""
        if self._reduction == "loss":
            return str(arguments["reduction"])
        return self._reduction

    def count_of(self, like: Tensor) -> int:
        """Return how many entries of a tensor [rows, …] each example has.

        Raises:
            InputError: The rows are not a multiple of the examples.
        """
        rows = len(like) if like.dim() else 1
        if rows % self._size:
            raise InputError(
                "loss: must give torch's loss function the same number of rows for every example, "
                f"the examples one after the other; got {rows} rows for {self._size} examples. "
                "Mark rows to leave out by ignore_index, or use "
                'labels="observed" with reduction="loss".'
            )
        return like.numel() // self._size

    def __torch_function__(
        self,
        func: Loss,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a torch function, changed if it is a loss."""
        if func not in _SIGNATURES:
            return func(*args, **(kwargs or {}))
        bound = _SIGNATURES[func].bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        arguments = bound.arguments | _today(bound.arguments)
        with torch.no_grad():
            weights = self.substitute(func, arguments)
        self.calls += 1
        return self._reduced(func, arguments, weights)

    def _reduced(self, loss: Loss, arguments: dict[str, Any], weights: Tensor | None) -> Tensor:
        if weights is None and self._reduction == "loss":
            return self._scaled(loss(**arguments))
        reduction = arguments["reduction"]
        terms = loss(**{**arguments, "reduction": "none"})
        with torch.no_grad():
            parts = _parts(loss, arguments, terms)
        terms = self._scaled(terms if weights is None else terms * weights.view_as(terms))
        if self._reduction == "loss":
            total = terms.sum()
            return {"none": terms, "sum": total, "mean": total / parts.sum()}[reduction]
        if reduction == "none":
            raise InputError(
                f'reduction: must be "loss" for a loss function that reduces by itself; got '
                f'"{self._reduction}" and a call of torch\'s {loss.__name__} with '
                'reduction="none". Let torch reduce ("mean"), with ignore_index for terms to leave '
                "out."
            )
        self.count_of(terms)
        mean = self._mean_over_examples(terms, parts)
        self._depends |= mean.requires_grad
        if reduction == "sum":
            mean.requires_grad_()  # where nothing else does, for the slope in it
            self._summed.append(mean)
        return mean

    def _scaled(self, value: Tensor) -> Tensor:
        return value if self.factor == 1 else self.factor * value

    def _mean_over_examples(self, terms: Tensor, parts: Tensor) -> Tensor:
        losses = terms.reshape(self._size, -1).sum(1)
        if self._reduction == "mean":
            counts = parts.reshape(self._size, -1).sum(1)
            losses = losses / counts.where(counts > 0, 1)
        return losses.mean()


def _today(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the reduction for the two arguments that ``reduction`` has replaced in torch."""
    average, reduce = arguments["size_average"], arguments["reduce"]
    if average is None and reduce is None:
        return {}
    reduction = "none" if reduce is False else "sum" if average is False else "mean"
    return {"reduction": reduction, "size_average": None, "reduce": None}


def _parts(loss: Loss, arguments: dict[str, Any], terms: Tensor) -> Tensor:
    """Return the numbers by whose sum torch divides the sum of the terms for their mean."""
    target, weight = arguments["target"], arguments.get("weight")
    parts = torch.ones_like(terms)
    if loss in CLASSES and not target.is_floating_point():
        kept: Tensor = target != arguments["ignore_index"]
        if weight is not None:
            parts = parts * weight[target.where(kept, 0)].view_as(terms)
        return parts * kept.view_as(terms)
    if loss is F.mse_loss and weight is not None:
        parts = parts * weight
    return parts


_SIGNATURES: dict[Loss, inspect.Signature] = {
    func: inspect.signature(func)
    for func in (*CLASSES, F.binary_cross_entropy_with_logits, F.binary_cross_entropy, F.mse_loss)
}
