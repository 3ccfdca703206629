"""What the weight and bias of a call of a torch function get from it.

An :class:`Operation` describes one call, such as ``F.linear(x, weight, bias)``, and turns the
gradient g of its output into contributions to the per-example gradients of weight and bias.

Shapes: dimension 0 of x, y and g is k·B with the examples outermost (windows of an image, flattened
tokens). "Channels last" functions have the channels in the last dimension, the others in
dimension 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_merge.curvature.convolution import Convolution, TransposedConvolution
from lit_merge.curvature.estimator import widen
from lit_merge.curvature.kernels import Contribution, Outer, PerExample, Rows
from lit_merge.curvature.norms import NORMS
from lit_merge.curvature.operation import Operation, sum_but_channels


class Linear(Operation):
    """y = x Wᵀ + b."""

    channels_last = True

    def fits(self, y: Tensor, batch_size: int) -> bool:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        return self.weight is not None and self.weight.dim() == 2 and super().fits(y, batch_size)

    def weight_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        inputs, outputs = _places(self.x, batch_size), _places(g, batch_size)
        return Outer(outputs, lambda start, stop: inputs[start:stop])


class Product(Operation):
    """y = x W + b."""

    channels_last = True

    def fits(self, y: Tensor, batch_size: int) -> bool:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        return self.weight is not None and self.weight.dim() == 2 and super().fits(y, batch_size)

    def weight_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        inputs, outputs = _places(self.x, batch_size), _places(g, batch_size)
        return Outer(inputs, lambda start, stop: outputs[start:stop])


class Lookup(Operation):
    """Rows of a table at the indices x [k·B, …]."""

    channels_last = True
    smallest = 1

    def __init__(self, x: Tensor, weight: Tensor, padding_idx: int | None = None) -> None:
        super().__init__(x, weight)
        self.padding_idx = _row(padding_idx, weight)

    def fits(self, y: Tensor, batch_size: int) -> bool:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        assert self.weight is not None
        return self.weight.dim() == 2 and super().fits(y, batch_size)

    def weight_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        return self.rows(g, torch.arange(batch_size, device=g.device))

    def rows(self, g: Tensor, examples: Tensor) -> Rows:
        """Return the rows, where as many consecutive ones belong to each of the examples [B].

        Args:
            g: The gradient of the output, for the same indices, or for them B times.
            examples: [B].
        """
        values = g.reshape(-1, g.shape[-1])
        indices = self.x.flatten().repeat(len(values) // max(1, self.x.numel()))
        examples = examples.repeat_interleave(len(values) // len(examples))
        if self.padding_idx is not None:  # torch gives this row no gradient
            kept = indices != self.padding_idx
            examples, indices, values = examples[kept], indices[kept], values[kept]
        return Rows(examples, indices.long(), values)


class Bags(Operation):
    """Sums or means of rows of a table (``embedding_bag``), one bag [L] for each row of x."""

    channels_last = True

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        mean: bool,
        per_sample_weights: Tensor | None,
        padding_idx: int | None,
    ) -> None:
        super().__init__(x, weight)
        self.mean = mean
        self.shares = None if per_sample_weights is None else per_sample_weights.detach()
        self.padding_idx = _row(padding_idx, weight)

    def weight_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        kept = torch.ones_like(self.x, dtype=torch.bool)
        if self.padding_idx is not None:
            kept = self.x.ne(self.padding_idx)
        wide = widen(g)
        shares = kept.to(wide.dtype) if self.shares is None else self.shares * kept
        if self.mean:
            shares = shares / kept.sum(1, keepdim=True).clamp(min=1)
        values = wide[:, None] * shares[..., None]
        examples = torch.arange(batch_size, device=g.device)
        examples = examples.repeat_interleave(self.x.numel() // batch_size).view_as(self.x)
        return Rows(examples[kept], self.x[kept].long(), values[kept])


class PReLU(Operation):
    """y = max(x, 0) + w min(x, 0), with one w or one per channel in dimension 1."""

    def weight_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """See :class:`~lit_merge.curvature.operation.Operation`."""
        assert self.weight is not None
        products = widen(self.x).clamp(max=0).mul_(widen(g))
        if self.weight.numel() == 1:
            return PerExample(products.reshape(batch_size, -1).sum(1, keepdim=True))
        return PerExample(sum_but_channels(products, batch_size))


def _row(index: int | None, table: Tensor) -> int | None:
    """Return a row's number counted from the first."""
    return index if index is None or index >= 0 else index + len(table)


def _places(values: Tensor, batch_size: int) -> Tensor:
    """Return [B, 1, T, D]."""
    return values.reshape(batch_size, 1, -1, values.shape[-1])


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Operation:
    return Linear(input, weight, bias)


def _matmul(input: Tensor, other: Tensor) -> Operation:
    return Product(input, other)


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Operation | None:
    return Product(mat1, mat2, input) if alpha == beta == 1 and input.dim() == 1 else None


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Operation | None:
    # max_norm changes the weight during the forward, scale_grad_by_freq mixes the examples
    return (
        None if max_norm is not None or scale_grad_by_freq else Lookup(input, weight, padding_idx)
    )


def _getitem(table: Tensor, index: Any) -> Operation | None:
    """A table indexed by a tensor of row numbers."""
    if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) and index.dim():
        return Lookup(index.remainder(len(table)), table)  # they may count from the end
    return None


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Operation | None:
    if max_norm is not None or scale_grad_by_freq or mode == "max" or input.dim() != 2:
        return None
    return Bags(
        input,
        weight,
        mean=mode == "mean",
        per_sample_weights=per_sample_weights,
        padding_idx=padding_idx,
    )


def _prelu(input: Tensor, weight: Tensor) -> Operation:
    return PReLU(input, weight)


DESCRIPTIONS: dict[Callable[..., Any], Callable[..., Operation | None]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    Tensor.__getitem__: _getitem,
    F.prelu: _prelu,
    Tensor.prelu: _prelu,
    **NORMS,
    **Convolution.descriptions(),
    **TransposedConvolution.descriptions(),
}
"""By torch function, what describes a call of it from the same arguments; None if it cannot."""
