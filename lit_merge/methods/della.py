"""DELLA: drop entries of the task vectors at random, small ones more often, then elect signs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lit_merge.counter import key_of, uniforms_from
from lit_merge.methods.election import Divide, Sign, Weigh, elected_task_vector
from lit_merge.methods.method import MergeMethod, ParameterSlice
from lit_merge.methods.settings import check_choice, check_number, check_scale, per_task

_BLOCK = 1 << 20  # entries that are ranked at once, whole rows of them


def keep_probabilities(vectors: Tensor, density: float, window: float) -> Tensor:
    r"""Return the probability of each entry to stay, linear in the rank of its magnitude.

    .. math:: p = ρ - ε + 2ε \frac{r - 1}{n - 1}

    with r = 1 for the smallest of the n entries of a row.

    Args:
        vectors: [rows, n].
        density: :math:`ρ`, the mean.
        window: :math:`ε`, how far the smallest and the largest are from it.

    Returns:
        [rows, n]. Of entries of one magnitude the later one has the higher probability.
    """
    size = vectors.shape[1]
    by_rank = torch.linspace(
        density - window, density + window, size, dtype=vectors.dtype, device=vectors.device
    )
    if size == 1:
        by_rank.fill_(density)
    blocks = []
    for block in torch.split(vectors, max(_BLOCK // max(size, 1), 1)):
        order = block.abs().argsort(dim=1, stable=True)
        blocks.append(torch.empty_like(block).scatter_(1, order, by_rank.expand_as(block)))
    return torch.cat(blocks)


@dataclass(frozen=True)
class DELLA(MergeMethod):
    r"""Drop at random by the rank of the magnitude, scale up, elect sign, and merge.

    Args:
        density: :math:`ρ`, the mean probability with which an entry is kept.
        window: :math:`ε`: the smallest entry of a row is kept with :math:`ρ - ε`, the largest with
            :math:`ρ + ε`; both must lie between 0 (exclusive) and 1.
        scale: What the merged task vector is multiplied with, or one weight per task name.
        seed: Of the random numbers, which belong to seed, task, tensor and position.
        ranks: Whether entries are ranked among those of the first axis' same index, which are the
            weights of one unit (``"row"``, as in the paper), or of the whole tensor
            (``"tensor"``). A vector is one row.
        rescale: Whether kept entries are divided by their own probability (``"probability"``, as
            in the paper), multiplied so that the tensor keeps its :math:`\sum |τ_t|` (``"norm"``),
            or left (``"none"``).
        combine: Whether what stays is merged by elected sign (``"ties"``, as in the paper) or
            summed (``"linear"``).
        sign: How signs are elected; see :class:`lit_merge.methods.TIES`.
        weigh: Whether the scales come after that election or before it; see there.
        divide: What the sum of the elected is divided by; see there.

    Raises:
        InputError: A number is out of its range or a word unknown.

    References:
        Deep, Bhardwaj and Poria (2024), arXiv:2406.11617.

    Note:
        Ranks need whole tensors: memory is that of the largest tensor of every model.
    """

    elementwise: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    carries_nan: ClassVar[bool] = True

    density: float = 0.5
    window: float = 0.15
    scale: float | Mapping[str, float] = 1.0
    seed: int = 0
    ranks: Literal["row", "tensor"] = "row"
    rescale: Literal["probability", "norm", "none"] = "probability"
    combine: Literal["ties", "linear"] = "ties"
    sign: Sign = "total"
    weigh: Weigh = "values"
    divide: Divide = "count"

    def __post_init__(self) -> None:
        check_number("DELLA.density", self.density, low=0, high=1)
        check_number("DELLA.window", self.window, low=0, high=1)
        check_number("DELLA.density - window", self.density - self.window, low=1e-9)
        check_number("DELLA.density + window", self.density + self.window, high=1 + 1e-9)
        check_scale("DELLA.scale", self.scale)
        check_choice("DELLA.ranks", self.ranks, ("row", "tensor"))
        check_choice("DELLA.rescale", self.rescale, ("probability", "norm", "none"))
        check_choice("DELLA.combine", self.combine, ("ties", "linear"))
        check_choice("DELLA.sign", self.sign, ("total", "frequency"))
        check_choice("DELLA.weigh", self.weigh, ("values", "votes"))
        check_choice("DELLA.divide", self.divide, ("count", "weights", "none"))

    @property
    def linear_in_scale(self) -> bool:
        """Whether the scale does not cancel in a division by the scales' sum."""
        return self.combine == "linear" or self.divide != "weights"

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there is a scale for every task."""
        per_task("DELLA.scale", self.scale, tasks)

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one tensor."""
        base = p.require_base()
        if base.numel() == 0:
            return base.clone()
        scales = per_task("DELLA.scale", self.scale, p.tasks)
        if self.combine == "linear":
            merged = torch.zeros_like(base)
            for vector, scale in zip(self._thinned(p), scales, strict=True):
                merged.add_(vector, alpha=scale)
        else:
            merged = elected_task_vector(
                self._thinned(p), scales, sign=self.sign, weigh=self.weigh, divide=self.divide
            )
        return base + merged

    def _thinned(self, p: ParameterSlice) -> Iterator[Tensor]:
        """Yield each task vector with what is dropped at zero and what stays scaled up."""
        base = p.require_base()
        for task, expert in zip(p.tasks, p.experts, strict=True):
            vector = expert - base
            by_row = self.ranks == "row" and vector.dim() > 1
            rows = vector.reshape(vector.shape[0] if by_row else 1, -1)
            probabilities = keep_probabilities(rows, self.density, self.window).view_as(vector)
            uniforms = uniforms_from(
                key_of(self.seed, task, p.name), 0, vector.numel(), vector.device
            )
            factor = (uniforms.view_as(vector) < probabilities).to(vector.dtype)
            if self.rescale == "probability":
                factor /= probabilities
            elif self.rescale == "norm":
                all_ = vector.abs().sum(dtype=torch.float64)
                left = (vector * factor).abs().sum(dtype=torch.float64)
                factor *= torch.where(left > 0, all_ / left, 1.0).to(vector.dtype)
            yield vector * factor
