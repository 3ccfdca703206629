"""What the methods that merge whole weight matrices share: which tensors those are, and the rest.

A weight of two dimensions, [outputs, inputs], is a matrix; biases, normalisations and, unless they
are asked for, convolutions are merged in a plain way. Embeddings are matrices by their shape: where
they should not count as one, give them another method by their name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods.method import MergeMethod, ParameterSlice
from lit_merge.methods.settings import check_choice, check_number


def task_vector(base: Tensor, expert: Tensor) -> Tensor:
    """Return θ_t − θ₀ in float64."""
    return expert.double() - base.double()


def sum_of_task_vectors(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """Return Σ (θ_t − θ₀) in float64."""
    total = task_vector(base, experts[0])
    for expert in experts[1:]:
        total += expert
        total -= base
    return total


@dataclass(frozen=True)
class MatrixMethod(MergeMethod):
    """A method that merges the task vectors of whole weight matrices.

    Args:
        scale: What the merged task vector is multiplied with before it is added to the base.
        others: What becomes of tensors that are no matrices: the mean of their task vectors, the
            sum, or nothing (``"base"``).
        convolutions: Whether tensors of more than two dimensions count as matrices of shape
            [outputs, everything else] (``"matrix"``) or are among the others.

    Raises:
        InputError: The scale is not finite or a word unknown.
    """

    elementwise: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    linear_in_scale: ClassVar[bool] = True

    scale: float = 1.0
    others: Literal["mean", "sum", "base"] = "mean"
    convolutions: Literal["others", "matrix"] = "others"

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_number(f"{name}.scale", self.scale)
        check_choice(f"{name}.others", self.others, ("mean", "sum", "base"))
        check_choice(f"{name}.convolutions", self.convolutions, ("others", "matrix"))

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one whole tensor.

        Raises:
            InputError: The slice has no base, or a matrix holds NaN or infinity.
        """
        base = p.require_base()
        dimensions = len(base.shape)
        if base.numel() == 0:
            return base.clone()
        if dimensions == 2 or (dimensions > 2 and self.convolutions == "matrix"):
            self._refuse_non_finite(p)
            vector = self.merge_matrices(
                base.flatten(1), [expert.flatten(1) for expert in p.experts]
            ).view(base.shape)
        elif self.others == "base":
            return base.clone()
        else:
            vector = sum_of_task_vectors(base, p.experts)
            if self.others == "mean":
                vector /= len(p.experts)
        # One rounding, at the size of the weights.
        return vector.mul_(self.scale).add_(base).to(base.dtype)

    @abstractmethod
    def merge_matrices(self, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """Return the merged task vector of one weight, unscaled.

        Args:
            base: θ₀ of shape [m, n].
            experts: θ_t, one per task, of the same shape and dtype.

        Returns:
            A new tensor of that shape, in float64.
        """

    def _refuse_non_finite(self, p: ParameterSlice) -> None:
        sources = zip(("base", *p.tasks), (p.require_base(), *p.experts), strict=True)
        for source, tensor in sources:
            if not torch.isfinite(tensor).all():
                owner = source if source == "base" else f"expert '{source}'"
                raise InputError(
                    f"{p.name}: must be finite for {type(self).__name__}, which merges whole "
                    f"matrices; got NaN or infinity in the {owner}. Repair that model, or keep the "
                    f"tensor out of the merge."
                )
