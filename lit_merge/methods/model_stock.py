"""Model stock: how far to go from the base to the experts' mean, told by the angle between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods.average import average
from lit_merge.methods.inner_products import added_by_group, task_vector_inner_products
from lit_merge.methods.method import LookAtAll, MergeMethod, ParameterSlice, looking_at
from lit_merge.methods.settings import check_choice


def mean_cosine(products: Tensor, mean: Literal["cosine", "angle"]) -> float:
    """Return the cosine between vectors, as a mean over all pairs.

    Args:
        products: ``[T, T]``, the vectors' inner products, T at least 2.
        mean: Whether cosines are averaged or the angles, whose mean's cosine is returned.

    Returns:
        The mean; a pair with a zero vector counts as orthogonal.
    """
    lengths = products.diagonal().sqrt()
    first, second = torch.triu_indices(len(products), len(products), offset=1)
    pairs = lengths[first] * lengths[second]
    cosines = torch.where(pairs == 0, 0.0, products[first, second] / pairs).clamp(-1, 1)
    return float(cosines.mean()) if mean == "cosine" else math.cos(float(cosines.acos().mean()))


def stock_ratio(cosine: float, experts: int) -> float:
    r"""Return the ratio t at which the way from base to mean comes nearest to the experts' centre.

    .. math:: t = \frac{N \cos θ}{1 + (N - 1) \cos θ}

    Args:
        cosine: :math:`\cos θ` between task vectors.
        experts: N.

    Returns:
        Between 0 and 1; 0, the base, where task vectors are orthogonal or point away from each
        other.
    """
    positive = max(cosine, 0.0) if not math.isnan(cosine) else cosine
    return experts * positive / (1 + (experts - 1) * positive)


@dataclass(frozen=True)
class ModelStock(MergeMethod):
    r"""A point between the base and the experts' mean, the nearer to it the more they agree.

    .. math:: θ = (1 - t) θ_0 + t \frac{1}{N} \sum_i θ_i, \qquad
        t = \frac{N \cos θ}{1 + (N - 1) \cos θ}

    with cos θ between the task vectors. It is meant for experts of one task, fine-tuned several
    times; those of different tasks are nearly orthogonal, and the result is near to the base.

    Args:
        scope: What one angle is measured over: each tensor (``"tensor"``), all tensors of a module
            such as weight and bias (``"layer"``: names that are equal up to their last dot), or
            all that are merged (``"model"``).
        mean: Over more than two experts, whether the cosines of all pairs are averaged
            (``"cosine"``) or their angles (``"angle"``).

    Raises:
        InputError: A word is unknown, or there are fewer than two experts.

    References:
        Jang et al. (2024), arXiv:2403.19522, the ratio for N models.

    Note:
        The paper assumes that all pairs have the same angle. Where task vectors point away from
        each other on the whole, its ratio is negative or has a pole; here it is 0 then. A zero
        task vector counts as orthogonal to all others.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    carries_nan: ClassVar[bool] = True

    scope: Literal["tensor", "layer", "model"] = "tensor"
    mean: Literal["cosine", "angle"] = "cosine"

    def __post_init__(self) -> None:
        check_choice("ModelStock.scope", self.scope, ("tensor", "layer", "model"))
        check_choice("ModelStock.mean", self.mean, ("cosine", "angle"))

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there are at least two experts."""
        if len(tasks) < 2:
            raise InputError(
                f"experts: must be at least two for ModelStock, which measures the angle between "
                f"them; got {len(tasks)}. Add experts, or choose TaskArithmetic."
            )

    def survey(self, look_at_all: LookAtAll) -> Mapping[str, float]:
        """Find the ratio of every group of tensors in one pass."""
        totals = added_by_group(look_at_all(task_vector_inner_products), self._group)
        return {
            group: stock_ratio(mean_cosine(products, self.mean), len(products))
            for group, products in totals.items()
        }

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice; without a survey it counts as the whole group."""
        base = p.require_base()
        self.check_tasks(p.tasks)
        fact = self.survey(looking_at([p])) if p.fact is None else p.fact
        mean = average(p.experts, [1.0] * len(p.experts))
        return torch.lerp(base, mean, fact[self._group(p.name)])

    def _group(self, name: str) -> str:
        return {"tensor": name, "layer": name.rpartition(".")[0], "model": ""}[self.scope]
