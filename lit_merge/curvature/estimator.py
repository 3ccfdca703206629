"""What every curvature estimator has in common.

A curvature estimator gathers, for every trainable parameter θ_j of a model, the SUM over the
examples n that it has seen of the squared gradient of their losses ℓ_n: the diagonal of the
(empirical or sampled-label) Fisher information,

    h_j = Σ_n (∂ℓ_n / ∂θ_j)².

Estimators differ in what they are fed (batches, or the gradients of training steps) and in how
exact they are; all give the same quantity on the same scale, keyed by parameter name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class CurvatureWarning(UserWarning):
    """The curvature is right, but something about how it is computed should be known."""


class CurvatureEstimator(ABC):
    """Something that gathers Σ_n (∂ℓ_n/∂θ)² over the examples that it is shown.

    Attributes:
        name: The estimator's name in ``expert.json``.
        exact: Whether the sums are exact, not only right in expectation.
        sharded: Whether the estimator is right when parameters are sharded over ranks.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
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
