"""MagMax: of all task vectors, the entry of the largest magnitude wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_merge.methods.method import MergeMethod, ParameterSlice
from lit_merge.methods.settings import check_number


def largest_entries(vectors: Sequence[Tensor]) -> Tensor:
    """Return, entry by entry, the number of the largest magnitude.

    Args:
        vectors: At least one, of one shape and dtype.

    Returns:
        A new tensor. Of two opposite numbers of one magnitude it has the positive one, so that
        the order does not matter. A NaN in any vector makes the entry NaN.
    """
    most, least = vectors[0].clone(), vectors[0].clone()
    for vector in vectors[1:]:
        torch.maximum(most, vector, out=most)
        torch.minimum(least, vector, out=least)
    # The largest in magnitude is the largest or the smallest; all of these are exact.
    return torch.copysign(torch.maximum(most.abs(), least.abs()), most + least)


@dataclass(frozen=True)
class MagMax(MergeMethod):
    r"""The base plus, entry by entry, the task vector's entry of the largest magnitude.

    .. math:: θ = θ_0 + λ τ_{t^*}, \quad t^* = \arg\max_t |τ_t|

    Args:
        scale: :math:`λ`.

    Raises:
        InputError: The scale is not finite.

    References:
        Marczak et al. (2024), arXiv:2407.06322.

    Note:
        Where two entries of one magnitude differ in sign, the positive one wins; the authors' code
        takes the later task's.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    carries_nan: ClassVar[bool] = True
    linear_in_scale: ClassVar[bool] = True

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("MagMax.scale", self.scale)

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice."""
        base = p.require_base()
        if len(p.experts) == 1:  # bit for bit, which θ₀ + (θ₁ − θ₀) is not
            return torch.lerp(base, p.experts[0], self.scale)
        largest = largest_entries([expert - base for expert in p.experts])
        return torch.add(base, largest, alpha=self.scale)
