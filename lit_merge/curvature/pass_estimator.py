"""What the estimators that make a pass over the examples have in common: sums per parameter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.curvature.estimator import CurvatureEstimator, zeros_for


class PassEstimator(CurvatureEstimator):
    """An estimator that is shown batches of examples, and may be stopped and gone on with."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Begin with no examples.

        Args:
            parameters: Those to be summed over, by name.
        """
        self._parameters = parameters
        self._totals: dict[str, Tensor] = {}
        self._num_examples = 0

    @property
    def num_examples(self) -> int:
        """How many examples the sums are over."""
        return self._num_examples

    @property
    def sizes(self) -> dict[str, int]:
        """Number of elements of each parameter that is summed over, by name."""
        return {name: parameter.numel() for name, parameter in self._parameters.items()}

    @abstractmethod
    def update(self, batch: Any, *, indices: Sequence[int] | None = None) -> None:
        """Add the examples of a batch.

        Args:
            batch: B examples, on the model's device.
            indices: [B], the index of each example in the data set; None counts on from the
                examples seen.
        """

    def entries(self, positions: Mapping[str, Tensor]) -> Tensor:
        """Return some entries of the sums, one after the other: [k], float64, on the CPU.

        Args:
            positions: By parameter name, row-major positions of the entries.
        """
        self._allocate()
        found = [
            self._totals[name].take(chosen.to(self._totals[name].device)).cpu().double()
            for name, chosen in positions.items()
        ]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)

    def resume(self, sums: Mapping[str, Tensor], *, num_examples: int) -> None:
        """Go on with what :meth:`sums` returned after some examples, in an earlier process.

        Args:
            sums: By parameter name; of the same parameters, with all their negative entries.
            num_examples: How many examples they are over.
        """
        self._allocate()
        for name, total in self._totals.items():
            total.copy_(sums[name])
        self._num_examples = num_examples

    def _allocate(self) -> None:
        if not self._totals:  # not before a probe, which needs as much memory for a moment
            self._totals = {name: zeros_for(p) for name, p in self._parameters.items()}
