r"""Kronecker factors of the Fisher information of a model's linear layers (K-FAC), by a pass.

For a weight W [m, n] (of a convolution [m, c, *kernel] flattened), with inputs :math:`x_p` [n] and
gradients :math:`g_p` [m] of the example's own loss at the layer's output, at the P positions p
(tokens, pixels, calls) of N examples:

=========  ======================================  ==============================================
input      :math:`A = Σ_p x_p x_p^⊤`               [n, n], a sum over all positions
output     :math:`B = \frac1P Σ_p g_p g_p^⊤`       [m, m], a mean over all positions
=========  ======================================  ==============================================

:math:`B ⊗ A` stands for the Hessian of the loss SUMMED over the N examples in the row-major
flattened W: :math:`H\,\mathrm{vec}(V) = \mathrm{vec}(B V A)`. This is K-FAC "expand": every
position counts as an example of its own, products between positions of an example are dropped, and
the mean of products is taken for the product of means. It is exact

* for N = P = 1 (a product of one :math:`g g^⊤` and one :math:`x x^⊤`);
* where :math:`g g^⊤` is the same at all positions: for a linear model with squared loss and
  ``labels="expected"``, :math:`B ⊗ A` is the Hessian.

Its trace is not that of the exact diagonal, in which positions are summed before squaring.

References:
    Martens, Grosse (2015), arXiv:1503.05671.
    Grosse, Martens (2016), arXiv:1602.01407 (convolutions).
    Eschenhagen et al. (2023), arXiv:2311.00636 (weight sharing: expand and reduce).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.curvature.backward import gradients, require_seen_forward
from lit_merge.curvature.batches import (
    batch_size_of,
    outside_inference,
    take_examples,
    unlike_pair,
)
from lit_merge.curvature.differentiation import differentiation
from lit_merge.curvature.estimator import example_numbers
from lit_merge.curvature.layer_matrices import (
    LARGEST,
    LayerMatrices,
    MaskOf,
    finite_and_symmetric,
)
from lit_merge.curvature.linear_calls import LinearCall, LinearCalls, gradient_rows
from lit_merge.curvature.losses import Reduction
from lit_merge.curvature.objective import Labels, Objective


class KroneckerFisher(LayerMatrices):
    """The Kronecker factors of the weights over the examples given to :meth:`update`.

    The model runs in eval mode and is left exactly as it was. The tensors left out are those that
    :class:`~lit_merge.curvature.input_grams.LayerGrams` leaves out, and those with one large side:
    the weight of a head over a large vocabulary.

    Note:
        The loss is differentiated in the precision it runs in. Under float16 autocast small
        gradients vanish; use bfloat16 or float32.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        labels: Labels = "sampled",
        samples: int = 1,
        reduction: Reduction = "loss",
        parameters: Collection[str] | None = None,
        mask: MaskOf | None = None,
        dtype: torch.dtype = torch.float32,
        largest: int = LARGEST,
        seed: int = 0,
    ) -> None:
        """Choose what to differentiate.

        Args:
            model: Any module whose parameters are whole; not wrapped by DDP.
            loss: Called as ``loss(model, batch)``; returns the mean over the batch's examples.
            labels: "sampled", "expected" or "observed"; see
                :class:`~lit_merge.curvature.PerExampleFisher`.
            samples: How many labels are drawn per example, each at the cost of a pass.
            reduction: How the terms of an example are put together; see
                :mod:`lit_merge.curvature.losses`.
            parameters: Names or patterns of the weights wanted, None for all trainable ones.
            mask: Takes a batch to the [B, T] mask of the tokens that count, or to None; None counts
                all. Positions that do not count are in neither factor.
            dtype: What is summed in, float32 or float64; float64 values are summed in float64.
            largest: Weights with larger n or m are left out.
            seed: For sampled labels.

        Raises:
            InputError: No parameter is trainable, a name is unknown, a parameter is sharded, or a
                setting is not one of its values.
        """
        super().__init__(model, parameters=parameters, mask=mask, dtype=dtype, largest=largest)
        self._objective = Objective(
            model, loss, labels=labels, samples=samples, reduction=reduction, seed=seed
        )
        self._checked = 0

    @property
    def found(self) -> tuple[str, ...]:
        """The names of the weights that have factors."""
        outputs = (key.removesuffix(".output") for key in self.totals if key.endswith(".output"))
        return tuple(name for name in outputs if name not in self.refused)

    def matrices(self, scale: float = 1.0) -> dict[str, Tensor]:
        """Return ``<weight>.input`` and ``<weight>.output``; see :meth:`LayerMatrices.matrices`."""
        self._require_found()
        factors = {}
        for name in self.found:
            positions = max(1, int(self.totals[f"{name}.positions"]))
            for key, factor in ((f"{name}.input", scale), (f"{name}.output", 1 / positions)):
                factors[key] = finite_and_symmetric(key, self.totals[key], factor)
        return factors

    def update(self, batch: Any, *, indices: Sequence[int] | None = None) -> None:
        """Add the examples of a batch.

        Args:
            batch: B examples, on the model's device.
            indices: [B], the index of each example in the data set, for the sampled labels; None
                counts on from the examples seen.

        Raises:
            InputError: The loss is not finite or not the mean over the examples, or indices do not
                match the batch.
        """
        size = batch_size_of(batch)
        numbers = example_numbers(indices, size, self.num_examples)
        mask = None if self._mask_of is None else self._mask_of(batch)
        with differentiation(self._objective.model):
            batch = outside_inference(batch)
            self._objective.forget()
            if self._checked < min(size, 2):
                self._check(batch, numbers)
            for number, objective in enumerate(self._objective.rounds()):
                self._differentiate(objective, batch, numbers, mask, inputs=number == 0)
        self.num_examples += size

    def _check(self, batch: Any, numbers: Sequence[int]) -> None:
        """Raise unless the loss of two unlike examples is the mean of theirs."""
        pair = unlike_pair(batch)
        few, indices = take_examples(batch, pair), [numbers[i] for i in pair]
        self._objective.require_expectation(few, indices)
        self._objective.require_mean(few, indices)
        self._checked = len(pair)

    def _differentiate(
        self,
        objective: Objective,
        batch: Any,
        numbers: Sequence[int],
        mask: Tensor | None,
        *,
        inputs: bool,
    ) -> None:
        """Add the gradients of one objective, and the inputs if they are not there yet."""

        def see(call: LinearCall, y: Tensor) -> None:
            weight = self._weights[call.name]
            if y.grad_fn is None:  # computed where gradients are switched off
                return
            if self._refuses(call.name, max(len(weight), weight[0].numel())):
                return
            if inputs:
                self._add_inputs(call, mask)
            # of the node, not of the tensor: hooks of the user on the tensor come before
            arrive = partial(self._arrive, call.name, call.places, mask, y.output_nr)
            y.grad_fn.register_prehook(arrive)

        anchor = torch.zeros((), requires_grad=True)
        with LinearCalls(self._weights, see, anchor=anchor) as calls:
            loss = objective(batch, numbers)
            calls.recording = False
            if loss.requires_grad:
                require_seen_forward(loss)
                gradients(loss * len(numbers), [anchor])  # ℓ_n, not the mean Σ_n ℓ_n / B
        self.refused |= calls.left_out

    def _add_inputs(self, call: LinearCall, mask: Tensor | None) -> None:
        key = f"{call.name}.positions"
        for rows in call.inputs(mask):
            self._add(f"{call.name}.input", rows)
            seen = self.totals.get(key, torch.zeros((), dtype=torch.int64))
            self.totals[key] = seen + len(rows)

    @torch.no_grad()
    def _arrive(
        self,
        name: str,
        places: torch.Size,
        mask: Tensor | None,
        output: int,
        arrived: Sequence[Tensor | None],
    ) -> None:
        """Take the gradient of the output of a call."""
        g = arrived[output]
        if g is not None:
            with torch._C.DisableTorchFunction():
                self._add(f"{name}.output", gradient_rows(g, places, mask))
