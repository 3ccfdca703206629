"""Mixup: the fit learns from blends of two examples of a task, for which its expert is asked.

A few hundred unlabelled examples are soon known by heart where all weights learn. Between any two
of them lie others, for which nobody has a label, but the expert has an answer; so every step shows
new ones. The experts stay in memory for that and run at every step, each on its own examples.

References:
    Zhang, Cissé, Dauphin, Lopez-Paz (2018), arXiv:1710.09412; with a teacher's answers instead of
    blended labels: Beyer et al. (2022), arXiv:2106.05237.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_merge.errors import InputError


@dataclass(frozen=True)
class Mixup:
    """Blends the examples of a batch, each with another of its task, and asks the experts.

    Attributes:
        experts: For each task, in the order of their indices, what takes batches of inputs to the
            expert's logits ``[n, C]`` on all of them, and its final features or None.
        alpha: The share of the first example is drawn from Beta(alpha, alpha): 1 draws it evenly
            from [0, 1], less keeps nearer to the examples.
        seed: Seed of shares and partners, which also depend on step and rank.
    """

    experts: Sequence[Callable[[Sequence[Any]], tuple[Tensor, Tensor | None]]]
    alpha: float
    seed: int

    def blend(self, inputs: Any, task: Tensor, *, step: int, rank: int) -> Any:
        """Return inputs of the same form, each blended with another of its task.

        Args:
            inputs: ``[B, ...]``, or a mapping of them; floating-point.
            task: Task of each example, int64 ``[B]``.
            step: The optimizer step.
            rank: This rank.
        """
        random = np.random.default_rng((self.seed, step, rank))
        own = task.cpu().numpy()
        share = random.beta(self.alpha, self.alpha, size=len(own))
        partner = np.arange(len(own))
        for index in np.unique(own):
            rows = np.flatnonzero(own == index)
            partner[rows] = random.permutation(rows)
        return _blended(inputs, torch.from_numpy(partner), torch.from_numpy(share))

    def answers(self, inputs: Any, task: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what each example's expert says to it.

        Args:
            inputs: ``[B, ...]``, or a mapping of them.
            task: Task of each example, int64 ``[B]``.

        Returns:
            Logits, float32 ``[B, W]`` with W the most classes that are asked for and −inf where a
            task has less, and the final features, ``[B, ...]``; None where the experts give none.

        Raises:
            InputError: If an answer is not finite.
        """
        parts = []
        for index in sorted(set(task.tolist())):
            rows = (task == index).nonzero()[:, 0]
            own = _each(inputs, itemgetter(rows))
            parts.append((rows, *self.experts[index]([own])))
        width = max(logits.shape[1] for _, logits, _ in parts)
        together = parts[0][1].new_full((len(task), width), -torch.inf)
        read = None
        for rows, logits, features in parts:
            together[rows, : logits.shape[1]] = logits
            if features is not None:
                read = features.new_empty(len(task), *features.shape[1:]) if read is None else read
                read[rows] = features
        return together, read


def require_blendable(inputs: Any) -> None:
    """Check that inputs can be blended.

    Raises:
        InputError: If one is no tensor of floating-point numbers.
    """
    for value in inputs.values() if isinstance(inputs, Mapping) else (inputs,):
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            got = f"{value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"mixup: must meet inputs of floating-point numbers, as images are; got {got}. Set "
                "it to 0."
            )


def _blended(inputs: Any, partner: Tensor, share: Tensor) -> Any:
    def blend(value: Tensor) -> Tensor:
        own = share.to(value).view(-1, *[1] * (value.ndim - 1))
        return value * own + value[partner.to(value.device)] * (1 - own)

    return _each(inputs, blend)


def _each(inputs: Any, change: Callable[[Any], Tensor]) -> Any:
    if isinstance(inputs, Mapping):
        return {name: change(value) for name, value in inputs.items()}
    return change(inputs)
