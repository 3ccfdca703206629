"""What every curvature estimator has in common.

A curvature estimator gathers, for every trainable parameter θ_j of a model, a SUM over the examples
n that it has seen: of the second derivatives of their losses ℓ_n, or of the squared first ones, the
diagonal of the (empirical or expected) Fisher information,

    h_j = Σ_n (∂ℓ_n / ∂θ_j)².

Estimators differ in what they are fed (batches, or the gradients of training steps, or an
optimizer) and in how exact they are; all give a quantity on the same scale, keyed by parameter
name, which a merge can use in the place of another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lit_merge.errors import InputError


class CurvatureWarning(UserWarning):
    """The curvature is right, but something about how it is computed should be known."""


class CurvatureEstimator(ABC):
    """Something that gathers the curvature of the loss over the examples that it is shown.

    Attributes:
        name: The estimator's name in ``expert.json``.
        exact: Whether the sums are exact, not only right in expectation.
        additive: Whether the sums over two parts of the data add up to the sums over both; else
            they are an average over training that was scaled to the size of the data.
        non_negative: Whether no sum is below zero, as constructed by default.
        sharded: Whether the estimator is right when parameters are sharded over ranks.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    additive: ClassVar[bool]
    non_negative: ClassVar[bool]
    sharded: ClassVar[bool]

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """How many examples the sums are over."""

    @abstractmethod
    def sums(self) -> dict[str, Tensor]:
        """Return a copy of the sums over the examples seen, by parameter name.

        Each has its parameter's shape and device, in float32 (float64 for float64 parameters).
        """


def widen(tensor: Tensor) -> Tensor:
    """Return the tensor in the precision of the sums: float32, or float64 if it has that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def zeros_for(parameter: Tensor) -> Tensor:
    """Return zeros to sum a parameter's squares in, of its shape and on its device.

    With three and more dimensions the memory has dimension 1 last (channels last), which is how the
    gradients of convolutions are computed.
    """
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    shape = parameter.shape
    with torch.inference_mode(False):  # else they could not be added to outside of the caller's
        if len(shape) < 3:
            return torch.zeros(shape, dtype=dtype, device=parameter.device)
        stored = (shape[0], *shape[2:], shape[1])
        return torch.zeros(stored, dtype=dtype, device=parameter.device).movedim(-1, 1)


def example_numbers(indices: Sequence[int] | None, size: int, first: int) -> tuple[int, ...]:
    """Return the number of each example of a batch in the data set.

    Args:
        indices: The numbers; None counts on.
        size: Examples in the batch.
        first: Where to count on.

    Raises:
        InputError: There are more or fewer indices than examples.
    """
    if indices is None:
        return tuple(range(first, first + size))
    if len(indices) != size:
        raise InputError(
            f"indices: must be one per example of the batch; got {len(indices)} for {size} "
            "examples. Give the examples' indices in the data set, or None."
        )
    return tuple(int(index) for index in indices)


def require_count(name: str, value: int) -> None:
    """Raise unless a number of examples is positive."""
    if value < 1:
        raise InputError(f"{name}: must be at least 1; got {value}. Give the number of examples.")
