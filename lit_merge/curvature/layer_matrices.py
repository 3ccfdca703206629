"""What the estimators of a matrix per layer have in common: sums of products of rows.

Rows are what a linear layer's weight multiplies or what arrives at its output; see
:mod:`lit_merge.curvature.linear_calls`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.curvature.coverage import wanted_parameters
from lit_merge.errors import InputError

MaskOf = Callable[[Any], Tensor | None]

LARGEST = 16384
"""How many rows a matrix may have: 1 GB in float32."""

NOT_LINEAR = "no linear layer or convolution that counts multiplied by it as it is"


class LayerMatrices(ABC):
    """Sums of products over the positions of the examples given to :meth:`update`.

    Attributes:
        num_examples: How many examples the sums are over.
        totals: The raw sums, whose entries over parts of the data add up to those over all of it;
            not to be changed.
        refused: By name, why weights can have no matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        parameters: Collection[str] | None,
        mask: MaskOf | None,
        dtype: torch.dtype,
        largest: int,
    ) -> None:
        """See the subclasses."""
        wanted = wanted_parameters(model, parameters)
        self.num_examples = 0
        self.totals: dict[str, Tensor] = {}
        self.refused: dict[str, str] = {}
        self._weights = {name: value for name, value in wanted.items() if value.dim() > 1}
        self._mask_of = mask
        self._dtype = dtype
        self._largest = largest

    @abstractmethod
    def update(self, batch: Any, *, indices: Sequence[int] | None = None) -> None:
        """Add the examples of a batch.

        Args:
            batch: B examples, on the model's device.
            indices: [B], the index of each example in the data set; None counts on from the
                examples seen.
        """

    @abstractmethod
    def matrices(self, scale: float = 1.0) -> dict[str, Tensor]:
        """Return the matrices as an expert folder has them, symmetric and new.

        Args:
            scale: What sums over examples are multiplied by, where those seen stand for more.

        Raises:
            InputError: A matrix is not finite, or there is none at all.
        """

    @property
    @abstractmethod
    def found(self) -> tuple[str, ...]:
        """The names of the weights that have matrices."""

    @property
    def left_out(self) -> dict[str, str]:
        """By name, why weights that are wanted have no matrix so far."""
        found = self.found
        return {
            name: self.refused.get(name, NOT_LINEAR) for name in self._weights if name not in found
        }

    def replace(
        self, totals: Mapping[str, Tensor], *, num_examples: int, refused: Mapping[str, str]
    ) -> None:
        """Take in the place of these sums those that several processes have together.

        Args:
            totals: The sums of their ``totals``.
            num_examples: How many examples these are over.
            refused: Of all of them.
        """
        self.totals = dict(totals)
        self.num_examples = num_examples
        self.refused = dict(refused)

    def _add(self, key: str, rows: Tensor) -> None:
        """Add Σ x xᵀ over rows x [r, n] to a total [n, n], which begins with zeros."""
        rows = rows.to(torch.promote_types(rows.dtype, self._dtype))
        n = rows.shape[1]
        with torch.inference_mode(False), torch.autocast(rows.device.type, enabled=False):
            if key not in self.totals:
                self.totals[key] = torch.zeros(n, n, dtype=rows.dtype, device=rows.device)
            self.totals[key].addmm_(rows.mT, rows)

    def _refuses(self, name: str, size: int) -> bool:
        """Return whether a matrix of so many rows would be too large."""
        if size <= self._largest:
            return False
        self.refused[name] = f"its matrix would have {size} rows, more than {self._largest}"
        return True

    def _require_found(self) -> None:
        if not self.found:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(self.left_out.items())[:3])
            raise InputError(
                "parameters: must name the weight of at least one linear layer or convolution that "
                f"the model runs; got none ({reasons or 'no weight of two axes'}). Choose others."
            )


def finite_and_symmetric(name: str, matrix: Tensor, scale: float) -> Tensor:
    """Return a scaled matrix without what rounding has made of the symmetry of a sum of products.

    Raises:
        InputError: It is not finite.
    """
    result = (matrix + matrix.mT).mul_(scale / 2)
    if not result.isfinite().all():
        raise InputError(
            f"{name}: must have finite inputs and gradients; got NaN or infinity in their "
            "products. Check the weights and the examples, or use a wider precision."
        )
    return result
