"""What operations have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from lit_merge.curvature.estimator import widen
from lit_merge.curvature.kernels import Contribution, PerExample


class Operation(ABC):
    """One call of a torch function with weights.

    Attributes:
        x: The input, detached.
        weight: What the input is combined with.
        bias: What is added to the output, one value per channel.
        channels_last: Whether the channels are in the last dimension, not in dimension 1.
        smallest: How many dimensions the input has at least.
    """

    channels_last: ClassVar[bool] = False
    smallest: ClassVar[int] = 2

    def __init__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> None:
        """Take the arguments of the call."""
        self.x = x.detach()
        self.weight = weight
        self.bias = bias

    def fits(self, y: Tensor, batch_size: int) -> bool:
        """Return whether input and output have the examples in dimension 0."""
        x = self.x
        return x.dim() >= self.smallest and len(x) == len(y) and len(x) % batch_size == 0

    @abstractmethod
    def weight_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """Return what the call contributes to the weight.

        Args:
            g: The gradient of the output.
            batch_size: B.
        """

    def bias_gradient(self, g: Tensor, batch_size: int) -> Contribution:
        """Return what the call contributes to the bias; arguments as above."""
        if self.channels_last:
            return PerExample(widen(g).reshape(batch_size, -1, g.shape[-1]).sum(1))
        return PerExample(sum_but_channels(widen(g), batch_size))


def sum_but_channels(values: Tensor, batch_size: int) -> Tensor:
    """Sum [k·B, C, …] to [B, C]."""
    places = math.prod(values.shape[2:])
    return values.reshape(batch_size, -1, values.shape[1], places).sum((1, 3))
