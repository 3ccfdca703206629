r"""The Gram matrices of the inputs of a model's linear layers, by a pass over the examples.

For a weight W [m, n] and the inputs :math:`x_p` [n] that it was multiplied with at the positions p
(tokens, pixels, calls) of all examples,

.. math:: G = Σ_p x_p x_p^⊤ \in R^{n × n}.

It is a SUM, of which nothing is divided by the number of positions. A convolution's weight
[m, c, *kernel] counts as [m, n] with n = c · |kernel|, its inputs as the patches under the kernel
in the same order. G is the curvature in every row of W of the layer's own squared error,
:math:`\frac12 Σ_p ‖W x_p - y_p‖^2`, and what RegMean averages with.

Left out, and given up to whatever a merge does with tensors without Grams: biases, grouped
convolutions (they have a matrix per group), transposed ones, transformers' ``Conv1D`` (its weight
is [n, m]), tables that rows are looked up in, even where a linear layer shares them, and weights
that something else is computed from first (weight norm).

References:
    Jin et al. (2023), arXiv:2212.09849 (RegMean).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.curvature.batches import batch_size_of
from lit_merge.curvature.differentiation import differentiation
from lit_merge.curvature.layer_matrices import (
    LARGEST,
    LayerMatrices,
    MaskOf,
    finite_and_symmetric,
)
from lit_merge.curvature.linear_calls import LinearCall, LinearCalls


class LayerGrams(LayerMatrices):
    """Σ x xᵀ over all positions of the examples given to :meth:`update`.

    The model runs in eval mode, without gradients, and is left exactly as it was.

    Note:
        On CUDA the products are made in the precision that ``torch.set_float32_matmul_precision``
        allows; "highest", the default of torch, is float32.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[nn.Module, Any], Any],
        *,
        parameters: Collection[str] | None = None,
        mask: MaskOf | None = None,
        dtype: torch.dtype = torch.float32,
        largest: int = LARGEST,
    ) -> None:
        """Choose what to watch.

        Args:
            model: Any module whose parameters are whole.
            forward: Called as ``forward(model, batch)``; what it returns is not used.
            parameters: Names or patterns of the weights wanted, None for all trainable ones.
            mask: Takes a batch to the [B, T] mask of the tokens that count, or to None; None counts
                all. Inputs of other shapes, such as pooled ones, count whole.
            dtype: What is summed in, float32 or float64; float64 inputs are summed in float64.
            largest: Weights with larger n are left out.

        Raises:
            InputError: No parameter is trainable, a name is unknown, or a parameter is sharded.
        """
        super().__init__(model, parameters=parameters, mask=mask, dtype=dtype, largest=largest)
        self._model = model
        self._forward = forward

    @property
    def found(self) -> tuple[str, ...]:
        """The names of the weights that have Grams."""
        return tuple(name for name in self.totals if name not in self.refused)

    def matrices(self, scale: float = 1.0) -> dict[str, Tensor]:
        """Return the Grams [n, n] by weight name; see :meth:`LayerMatrices.matrices`."""
        self._require_found()
        return {name: finite_and_symmetric(name, self.totals[name], scale) for name in self.found}

    def update(self, batch: Any, *, indices: Sequence[int] | None = None) -> None:
        """Add the examples of a batch; their indices do not matter."""
        size = batch_size_of(batch)
        mask = None if self._mask_of is None else self._mask_of(batch)

        def see(call: LinearCall, output: Tensor) -> None:
            if not self._refuses(call.name, self._weights[call.name][0].numel()):
                for rows in call.inputs(mask):
                    self._add(call.name, rows)

        calls = LinearCalls(self._weights, see)
        with differentiation(self._model), torch.no_grad(), calls:
            self._forward(self._model, batch)
        self.refused |= calls.left_out
        self.num_examples += size
