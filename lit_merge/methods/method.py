"""What a merge method is: a frozen dataclass around a pure function of one piece of a model.

Notation, here and in every method: :math:`θ_0` the base weights, :math:`θ_t` the weights of expert
t, :math:`τ_t = θ_t - θ_0` its task vector, :math:`h_t` the diagonal of its Hessian, summed over the
expert's training examples. A *slice* holds the same elements of the same tensor from every model:
all of it, or a flat chunk. No method touches files, ranks or Lightning.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from lit_merge.errors import InputError


@dataclass(frozen=True)
class ParameterSlice:
    r"""The same elements of one tensor from every model.

    Args:
        name: The tensor's name in the base.
        tasks: The experts' task names, in the order of ``experts``.
        experts: :math:`θ_t`, one per task; all of one shape and of one dtype, float32 or float64.
        base: :math:`θ_0`, of the same shape; None when the merge has no base.
        hessians: :math:`h_t ≥ 0`, one per task; None when the merge has no curvature.
        base_hessian: The base's own Hessian; None when it has none.
        grams: Per task the Gram matrix :math:`\sum x x^T` [n, n] of the inputs of the layer that
            this weight [m, n] belongs to (of a convolution, flattened to [m, n]), summed over the
            training examples and their positions; None for a tensor without, as biases are.
        kronecker: Per task two factors, [n, n] of the inputs and [m, m] of the output gradients,
            whose Kronecker product stands for the weight's Hessian; None for a tensor without.
        start: The flat position of the slice's first element in the tensor.
        shape: The whole tensor's shape; None where the slice is the whole tensor.
        coarse: Whether the weights come from types of at most 16 bits, beside which the rounding
            of float32 is nothing.
        fact: What the method's :meth:`MergeMethod.survey` returned.
    """

    name: str
    tasks: tuple[str, ...]
    experts: tuple[Tensor, ...]
    base: Tensor | None = None
    hessians: tuple[Tensor, ...] | None = None
    base_hessian: Tensor | None = None
    grams: tuple[Tensor, ...] | None = None
    kronecker: tuple[tuple[Tensor, Tensor], ...] | None = None
    start: int = 0
    shape: tuple[int, ...] | None = None
    coarse: bool = False
    fact: Any = None

    def require_base(self) -> Tensor:
        """Return the base's elements.

        Raises:
            InputError: The slice has none.
        """
        if self.base is None:
            raise InputError(
                f"base: must be given for a method that merges task vectors; got None for tensor "
                f"'{self.name}'. Give the base that the experts were fine-tuned from."
            )
        return self.base

    def require_hessians(self) -> tuple[Tensor, ...]:
        """Return the experts' Hessians.

        Raises:
            InputError: The slice has none.
        """
        if self.hessians is None:
            raise InputError(
                f"hessians: must be given for a method that weighs by curvature; got None for "
                f"tensor '{self.name}'. Give one Hessian per expert, or choose a method that needs "
                f"none."
            )
        return self.hessians


R = TypeVar("R")


class LookAtAll(Protocol):
    """Starts a pass over all merged tensors each time it is called."""

    def __call__(
        self, look: Callable[[ParameterSlice], R], every: int = 1
    ) -> Iterable[tuple[str, R]]:
        """Return the tensor's name and what ``look`` found, slice by slice, in the tensors' order.

        The slices of one tensor follow one another. ``look`` is called from several threads at
        once and must keep nothing of a slice: its memory is used again.

        Args:
            look: Takes a slice.
            every: Look at every so-manieth slice of each tensor only, from its first on: a sample,
                for which the others are not read.
        """


def looking_at(slices: Iterable[ParameterSlice]) -> LookAtAll:
    """Return passes over slices that are at hand."""
    pieces = tuple(slices)

    def look_at_all(look: Callable[[ParameterSlice], R], every: int = 1) -> Iterable[tuple[str, R]]:
        for _, tensor in groupby(pieces, key=lambda p: p.name):
            for p in islice(tensor, 0, None, every):
                yield p.name, look(p)

    return look_at_all


class MergeMethod(ABC):
    """A way to make one tensor out of the experts'.

    Subclasses are frozen dataclasses of primitives, so that they pickle, compare and come from
    YAML.

    Attributes:
        elementwise: Whether an element of the result depends on the same element of the inputs
            only (and on the survey's fact). Such a method gets flat chunks; others whole tensors.
        carries_nan: Whether a NaN or an infinity in any input always makes the result NaN or
            infinite in the same place, so that looking at the result is enough.
        masks: Whether the method gives a model per task, as the shared result and a mask.
    """

    elementwise: ClassVar[bool] = True
    carries_nan: ClassVar[bool] = False
    masks: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """What a slice must hold besides the experts.

        A subset of ``{"base", "hessian", "gram", "kronecker"}``. Grams and Kronecker factors come
        with whole tensors only. Most methods need the same whatever their settings are, and say
        so with a class variable.
        """
        return frozenset()

    @property
    def linear_in_scale(self) -> bool:
        """Whether the result is the base plus the setting ``scale`` times what has no scale in it.

        A forecast is then a parabola in the scale. Scales by task count as one that is common to
        them. Most methods say so with a class variable.
        """
        return False

    def check_tasks(self, tasks: Sequence[str]) -> None:  # noqa: B027 (most have nothing to check)
        """Check settings that name tasks or depend on their number, before any data is read.

        Args:
            tasks: The experts' task names, in order.

        Raises:
            InputError: A setting does not fit these tasks.
        """

    def survey(self, look_at_all: LookAtAll) -> Any:
        """Look at all slices before the first is merged, for a fact that needs them together.

        Args:
            look_at_all: Starts a pass over the tensors that this method merges.

        Returns:
            What :attr:`ParameterSlice.fact` is to be; None for methods without such a fact.
        """
        return None

    def notes(self, fact: Any) -> tuple[str, ...]:
        """Return what a user should know of what the survey found."""
        return ()

    def hessian(self, p: ParameterSlice) -> Tensor | None:
        """Return the Hessian of the merged slice as an expert of the same base, in a new tensor.

        None for methods that say nothing about it.
        """
        return None

    def merge_with_hessian(self, p: ParameterSlice) -> tuple[Tensor, Tensor | None]:
        """Merge one slice, and return its :meth:`hessian` too: to be had at once where cheaper."""
        return self(p), self.hessian(p)

    def task_masks(self, p: ParameterSlice) -> tuple[Tensor, ...]:
        """Return which entries of the shared task vector each task uses, as booleans.

        Task t's model is :math:`θ_0 + λ_t m_t ⊙ (θ - θ_0)` with θ the merged slice and
        :math:`λ_t` of :meth:`task_scales`.

        Raises:
            NotImplementedError: The method gives one model for all tasks.
        """
        raise NotImplementedError(f"{type(self).__name__} has no masks")

    def task_scales(self, fact: Any, tasks: Sequence[str]) -> tuple[float, ...]:
        """Return each task's :math:`λ_t` of :meth:`task_masks`, given what the survey found."""
        return (1.0,) * len(tasks)

    @abstractmethod
    def __call__(self, p: ParameterSlice) -> Tensor:
        """Merge one slice; return a new tensor of the slice's shape and dtype."""


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    r"""Return :math:`\sum_i w_i x_i`.

    Args:
        tensors: :math:`x_i`, at least one, of one shape and dtype.
        weights: :math:`w_i`, numbers or tensors of that shape.
    """
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        if isinstance(weight, Tensor):
            total.addcmul_(tensor, weight)
        else:
            total.add_(tensor, alpha=weight)
    return total


def add_task_vectors(
    base: Tensor,
    experts: Sequence[Tensor],
    coefficients: Sequence[float | Tensor],
) -> Tensor:
    r"""Return the base plus weighted task vectors.

    .. math:: θ = θ_0 + \sum_t c_t (θ_t - θ_0)

    Args:
        base: :math:`θ_0`.
        experts: :math:`θ_t`, at least one, of the base's shape and dtype.
        coefficients: :math:`c_t`, numbers or tensors of that shape.

    Note:
        The vectors are summed before the base is added: one rounding at the size of the weights.
        One expert alone is interpolated, which returns it bit for bit where c = 1 and the base
        where c = 0; θ₀ + (θ₁ − θ₀) would not.
    """
    if len(experts) == 1:
        return torch.lerp(base, experts[0], coefficients[0])
    total = (experts[0] - base).mul_(coefficients[0])
    vector = torch.empty_like(total)  # one for all of them: it stays in the cache
    for expert, coefficient in zip(experts[1:], coefficients[1:], strict=True):
        torch.sub(expert, base, out=vector)
        if isinstance(coefficient, Tensor):
            total.addcmul_(vector, coefficient)
        else:
            total.add_(vector, alpha=coefficient)
    return total.add_(base)


def add_coarse_task_vectors(
    base: Tensor, experts: Sequence[Tensor], coefficients: Sequence[float]
) -> Tensor:
    r"""Return what :func:`add_task_vectors` does, up to a few roundings, in half the time.

    .. math:: θ = (1 - \sum_t c_t) θ_0 + \sum_t c_t θ_t

    Good where the result is rounded to fewer bits afterwards. Where an expert has not changed the
    base, :func:`add_task_vectors` gives exactly the base, and this one after the rounding.

    Args:
        base: As there.
        experts: As there.
        coefficients: As there; numbers.
    """
    return weighted_sum(experts, coefficients).add_(base, alpha=1 - math.fsum(coefficients))
