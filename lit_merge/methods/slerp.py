"""Spherical interpolation: from one expert to another along an arc instead of the chord."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods.inner_products import (
    added_by_group,
    expert_inner_products,
    task_vector_inner_products,
)
from lit_merge.methods.method import (
    LookAtAll,
    MergeMethod,
    ParameterSlice,
    add_task_vectors,
    looking_at,
    weighted_sum,
)
from lit_merge.methods.settings import check_choice, check_number


def arc_coefficients(
    products: Tensor, weight: float, threshold: float
) -> tuple[float, float] | None:
    r"""Return what two vectors are multiplied with at a point of the arc between them.

    .. math:: \left( \frac{\sin (1-t) φ}{\sin φ}, \frac{\sin tφ}{\sin φ} \right), \qquad
        \cos φ = \frac{⟨a, b⟩}{‖a‖ ‖b‖}

    Args:
        products: ``[2, 2]``, the inner products of a and b, in float64.
        weight: :math:`t`, how far from a to b.
        threshold: The largest :math:`|\cos φ|` of an arc.

    Returns:
        The two coefficients. None where the vectors are nearly parallel or opposed, or one of
        them is zero: no arc, or no unique one, leads from one to the other.
    """
    lengths = math.sqrt(float(products[0, 0])) * math.sqrt(float(products[1, 1]))
    if lengths == 0:
        return None
    cosine = float(products[0, 1]) / lengths
    if abs(cosine) > threshold or abs(cosine) >= 1:
        return None
    angle = math.acos(cosine)
    first, second = (math.sin(share * angle) for share in (1 - weight, weight))
    return first / math.sin(angle), second / math.sin(angle)


@dataclass(frozen=True)
class SLERP(MergeMethod):
    r"""The point between two experts on the arc that joins them, tensor by tensor.

    .. math:: θ = \frac{\sin (1-t) φ}{\sin φ} θ_1 + \frac{\sin tφ}{\sin φ} θ_2

    with φ the angle between the two whole tensors. Experts of one length keep it on the way, where
    the plain mean of them is shorter.

    Args:
        weight: :math:`t`, how far from the first expert to the second: 0 to 1.
        of: Whether the experts' weights are interpolated (``"weights"``) or their task vectors
            from the base (``"task_vectors"``), which start at the base and are nearly never
            parallel.
        threshold: The largest :math:`|\cos φ|`, 0 to 1, at which there is an arc to follow.
            Tensors that are nearer to parallel or to opposed are interpolated linearly, as are
            those with a zero vector. With 0, all tensors that are not exactly orthogonal are.

    Raises:
        InputError: A number is out of its range, a word unknown, or there are not two experts.

    References:
        Shoemake (1985), Animating rotation with quaternion curves, SIGGRAPH.

    Note:
        The angle is that between the directions, the vectors on the arc have the lengths as they
        are, as is usual for weights: between experts of different lengths, the length is not
        interpolated linearly. Angles are computed in float64.
    """

    carries_nan: ClassVar[bool] = True

    weight: float = 0.5
    of: Literal["weights", "task_vectors"] = "weights"
    threshold: float = 0.9995

    def __post_init__(self) -> None:
        check_number("SLERP.weight", self.weight, low=0, high=1)
        check_choice("SLERP.of", self.of, ("weights", "task_vectors"))
        check_number("SLERP.threshold", self.threshold, low=0, high=1)

    @property
    def needs(self) -> frozenset[str]:
        """The base, for task vectors."""
        return frozenset({"base"}) if self.of == "task_vectors" else frozenset()

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Check that there are two experts."""
        if len(tasks) != 2:
            names = ", ".join(repr(task) for task in tasks)
            raise InputError(
                f"experts: must be two for SLERP; got {len(tasks)} ({names}). Merge two, then the "
                f"result with the next one, or choose a method for any number."
            )

    def survey(self, look_at_all: LookAtAll) -> Mapping[str, tuple[float, float] | None]:
        """Find the coefficients of every tensor in one pass."""
        look = expert_inner_products if self.of == "weights" else task_vector_inner_products
        return {
            name: arc_coefficients(products, self.weight, self.threshold)
            for name, products in added_by_group(look_at_all(look), lambda name: name).items()
        }

    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice; without a survey it counts as the whole tensor."""
        self.check_tasks(p.tasks)
        fact = self.survey(looking_at([p])) if p.fact is None else p.fact
        coefficients = fact[p.name]
        if coefficients is None:
            return torch.lerp(p.experts[0], p.experts[1], self.weight)
        if self.of == "weights":
            return weighted_sum(p.experts, coefficients)
        return add_task_vectors(p.require_base(), p.experts, coefficients)
