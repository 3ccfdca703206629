r"""The diagonal of the true Hessian of the loss, estimated by products with random signs.

For a vector v of independent signs, :math:`E[v ⊙ Hv]` is the diagonal of H, and its variance in
entry j is :math:`Σ_{k≠j} H_{jk}^2` (Hutchinson (1989), doi:10.1080/03610918908812806; Bekas,
Kokiopoulou and Saad (2007), doi:10.1016/j.apnum.2007.01.003, for the diagonal). Hv is the gradient
of :math:`v·∇ℓ`, a backward through the backward. Every batch has vectors of its own.

The Hessian of a network is not positive semi-definite, and its estimate has negative entries even
where the true ones are not. A merge takes its curvature for the precision of a Gaussian
distribution, so they are clamped to zero unless one wants to see them: an entry of zero says that
the loss does not mind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_merge.counter import combined, signs
from lit_merge.curvature.batches import (
    batch_size_of,
    outside_inference,
    take_examples,
    unlike_pair,
)
from lit_merge.curvature.coverage import wanted_parameters
from lit_merge.curvature.differentiation import differentiation, requiring_grad
from lit_merge.curvature.estimator import example_numbers, widen
from lit_merge.curvature.losses import Reduction
from lit_merge.curvature.objective import Objective
from lit_merge.curvature.pass_estimator import PassEstimator
from lit_merge.errors import InputError

Negative = Literal["clamp", "absolute", "keep"]


class HessianDiagonal(PassEstimator):
    """Σ_n ∂²ℓ_n/∂θ² over the examples of the batches given to :meth:`update`, estimated.

    Right in expectation, and exact where the Hessian is diagonal. The model runs in eval mode and
    is left as it was. It works inside ``no_grad`` and ``inference_mode``.

    Note:
        The loss must be twice differentiable by autograd: attention runs by its plain formula, not
        by a fused kernel, and the recurrent layers of cuDNN cannot be used.
    """

    name: ClassVar[str] = "hutchinson"
    exact: ClassVar[bool] = False
    additive: ClassVar[bool] = True
    non_negative: ClassVar[bool] = True
    sharded: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        samples: int = 1,
        negative: Negative = "clamp",
        reduction: Reduction = "loss",
        parameters: Collection[str] | None = None,
        seed: int = 0,
    ) -> None:
        """Choose what to differentiate.

        Args:
            model: Any module; not wrapped by DDP, which averages gradients over ranks.
            loss: Called as ``loss(model, batch)``; returns the mean over the batch's examples.
            samples: How many vectors per batch; each costs about two backwards.
            negative: What becomes of negative sums; see :func:`without_negatives`. To add the sums
                of several ranks, "keep" them, and apply that function to the total.
            reduction: How the terms of an example's loss are put together; see
                :mod:`lit_merge.curvature.losses`.
            parameters: Names or patterns of the parameters wanted, None for all trainable ones.
            seed: For the vectors; those of a batch depend on it and on which examples it has.

        Raises:
            InputError: No parameter is trainable, a name is unknown, or a setting is not one of its
                values.
        """
        if samples < 1:
            raise InputError(
                f"samples: must be at least 1; got {samples}. Give the number of vectors per batch."
            )
        _require_negative(negative)
        super().__init__(wanted_parameters(model, parameters))
        self._objective = Objective(model, loss, labels="observed", reduction=reduction, seed=seed)
        self._samples = samples
        self._negative: Negative = negative
        self._seed = seed
        self._checked = False

    @property
    def negative_share(self) -> float:
        """The share of the negative entries in the sum of the absolute values; 0 without any."""
        below = sum(float(total.clamp(max=0).double().sum()) for total in self._totals.values())
        size = sum(float(total.double().abs().sum()) for total in self._totals.values())
        return -below / size if size else 0.0

    def sums(self) -> dict[str, Tensor]:
        """Return a copy of the sums over the examples seen (zeros if none), by parameter name.

        Raises:
            InputError: A sum is not finite.
        """
        self._allocate()
        for name, total in self._totals.items():
            if not total.isfinite().all():
                raise InputError(
                    f"{name}: must have finite second derivatives; got NaN or Inf. Look for roots "
                    "and norms of zero in the model, and for overflow in half precision."
                )
        kept = {name: total.contiguous() for name, total in self._totals.items()}
        with torch.inference_mode(False):
            return without_negatives(kept, self._negative)

    def update(self, batch: Any, *, indices: Sequence[int] | None = None) -> None:
        """Add the examples of a batch.

        Args:
            batch: B examples, on the model's device.
            indices: [B], the index of each example in the data set, for the vectors; None counts on
                from the examples seen.

        Raises:
            InputError: The loss is not finite, is not a mean over the examples, cannot be
                differentiated twice or does not depend on the parameters, or indices do not match
                the batch.
        """
        numbers = example_numbers(indices, batch_size_of(batch), self._num_examples)
        with (
            differentiation(self._objective.model),
            requiring_grad(self._parameters.values()),
            sdpa_kernel(SDPBackend.MATH),
        ):
            batch = outside_inference(batch)
            if not self._checked:
                pair = unlike_pair(batch)
                self._objective.require_mean(take_examples(batch, pair), [numbers[i] for i in pair])
            self._allocate()
            self._add(self._objective(batch, numbers) * len(numbers), numbers)
        self._num_examples += len(numbers)

    def _add(self, loss: Tensor, numbers: Sequence[int]) -> None:
        """Add v ⊙ Hv of a loss."""
        parameters = [*self._parameters.values()]
        if not loss.requires_grad:
            raise InputError(
                "loss: must depend on the trainable parameters; got no gradient for any of them. "
                "Look for detach() and no_grad() between the model and the loss."
            )
        first = _derivatives(loss, parameters, create_graph=True)
        if not self._checked:
            _require_second_derivatives(first)
            self._checked = True
        for sample in range(self._samples):
            vectors = self._vectors(sample, numbers)
            terms = [
                (v * gradient).sum()
                for v, gradient in zip(vectors, first, strict=True)
                if gradient is not None and gradient.requires_grad
            ]
            if not terms:  # the loss is linear in the parameters
                return
            last = sample == self._samples - 1
            second = _derivatives(torch.stack(terms).sum(), parameters, retain_graph=not last)
            for total, v, product in zip(self._totals.values(), vectors, second, strict=True):
                if product is not None:
                    total.addcmul_(v.to(total.dtype), widen(product), value=1 / self._samples)

    def _vectors(self, sample: int, numbers: Sequence[int]) -> list[Tensor]:
        """Return the signs of every parameter, in its type."""
        examples = combined(numbers)
        return [
            signs(self._seed, sample, combined((examples, number)), p.numel(), p.device)
            .view(p.shape)
            .to(p.dtype)
            for number, p in enumerate(self._parameters.values())
        ]


def without_negatives(sums: Mapping[str, Tensor], negative: Negative) -> dict[str, Tensor]:
    """Return a curvature that can be taken for a precision.

    Args:
        sums: By parameter name.
        negative: "clamp" puts zero in the place of negative entries; "absolute" takes their size,
            so that a direction in which the loss curves downwards is held as firmly as one in which
            it curves upwards; "keep" copies them.

    Raises:
        InputError: ``negative`` is none of the three.
    """
    _require_negative(negative)
    if negative == "absolute":
        return {name: total.abs() for name, total in sums.items()}
    if negative == "clamp":
        return {name: total.clamp(min=0) for name, total in sums.items()}
    return {name: total.clone() for name, total in sums.items()}


def _require_negative(negative: str) -> None:
    if negative not in ("clamp", "absolute", "keep"):
        raise InputError(
            f'negative: must be "clamp", "absolute" or "keep"; got {negative!r}. A merge needs '
            '"clamp" or "absolute".'
        )


def _derivatives(
    value: Tensor,
    parameters: list[nn.Parameter],
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(
            value,
            parameters,
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _not_twice(str(error).partition("\n")[0]) from error


def _require_second_derivatives(gradients: Sequence[Tensor | None]) -> None:
    """Raise if a function in the graph of the gradients forbids to differentiate them.

    The node that torch puts there is not on the way to the parameters, so that it would be left
    out, and the product with the Hessian would silently be wrong.
    """
    nodes = [g.grad_fn for g in gradients if g is not None and g.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::Error":
            raise _not_twice("a function that is marked with once_differentiable")
        found = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= found
        nodes.extend(found)


def _not_twice(reason: str) -> InputError:
    return InputError(
        f"loss: must be twice differentiable by autograd; got: {reason}. Use another "
        "implementation of that layer (eager attention, no cuDNN recurrence, no reentrant "
        "checkpointing), or the exact pass, which needs first derivatives only."
    )
