r"""Holding trained weights to the merged mean, each as tightly as the merge is sure of it.

A merge is a Gaussian with mean m and precision H̄. Its negative logarithm, as a penalty on the
weights, costs little where the merge knows little:

.. math:: \frac{λ}{2} \sum_i \frac{\bar h_i}{mean(\bar h)} (θ_i - m_i)^2

The division takes the number of examples out of H̄. So λ is in units of the fit's loss (the mean
over examples) per squared change of a weight of average precision; for a constant H̄ the penalty is
plain weight decay toward the merged weights.

References:
    Kirkpatrick et al. (2017), arXiv:1612.00796 (elastic weight consolidation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.checkpoint import Checkpoint, aligned
from lit_merge.errors import InputError
from lit_merge.expert import open_expert


class ElasticPenalty:
    """The penalty of some weights for leaving the merged mean.

    Args:
        means: m by name.
        precisions: H̄ by the same names, not negative.
        strength: λ.

    Raises:
        InputError: If the precisions are not finite or all zero.
    """

    def __init__(
        self, means: Mapping[str, Tensor], precisions: Mapping[str, Tensor], *, strength: float
    ) -> None:
        total = sum(float(value.sum(dtype=torch.float64)) for value in precisions.values())
        average = total / max(1, sum(value.numel() for value in precisions.values()))
        if not 0 < average < float("inf"):
            raise InputError(
                f"elastic: must find a finite precision above 0 (hessian.safetensors); got an "
                f"average of {average}. Merge again with experts that have Hessians."
            )
        self.strength = strength
        self._means = dict(means)
        self._precisions = {name: value / average for name, value in precisions.items()}

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty of the weights, a scalar.

        Args:
            weights: θ by name; others than those of the means do not count.
        """
        parts = [
            (self._precisions[name] * (weights[name] - mean).square()).sum()
            for name, mean in self._means.items()
        ]
        return 0.5 * self.strength * torch.stack(parts).sum()


def read_elastic(
    source: str | Path | None, weights: Mapping[str, Tensor], *, strength: float
) -> ElasticPenalty:
    """Return the penalty of a merged folder.

    Args:
        source: What ``lit_merge.merge`` has written; None for a merge in memory.
        weights: The weights to hold, by the network's names; the penalty is where they are.
        strength: λ.

    Raises:
        InputError: If there is no folder, or it has no Hessian for one of the weights.
    """
    means, precisions = (
        {name: value.to(weights[name].device) for name, value in values.items()}
        for values in read_merged_gaussian(source, list(weights))
    )
    return ElasticPenalty(means, precisions, strength=strength)


def read_merged_gaussian(
    path: str | Path | None, names: Sequence[str], *, option: str = "elastic"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return means and precisions of a merged folder, float32.

    Args:
        path: What ``lit_merge.merge`` has written; None for a merge in memory.
        names: The weights in question, by the network's names.
        option: What they are for, for messages.

    Returns:
        The weights and the Hessian's diagonal by name.

    Raises:
        InputError: If there is no folder, or it has no Hessian for one of the weights.
    """
    if path is None:
        raise InputError(
            f"{option}: must come with merged, a folder with hessian.safetensors; got a merge in "
            'memory, which has none. Merge into a folder ("lit-merge merge"), or set it to 0.'
        )
    merged = open_expert(path)
    try:
        if merged.hessian is None:
            raise InputError(
                f"{path}: must hold hessian.safetensors for {option}; got none. Merge with a "
                f"method that has a Hessian (GradientMatching, FisherAverage), or set {option} to "
                "0."
            )
        return _read(merged.weights, names, option), _read(merged.hessian, names, option)
    finally:
        merged.close()


def _read(checkpoint: Checkpoint, names: Sequence[str], option: str) -> dict[str, Tensor]:
    named = aligned(checkpoint, names)
    missing = [name for name in names if name not in named]
    if missing:
        raise InputError(
            f"{checkpoint.path}: must hold every weight, for {option}; got none for "
            f"{missing[0]!r}. Merge all weights with one method, or set {option} to 0."
        )
    return {name: named.tensor(name).float().clone() for name in names}
