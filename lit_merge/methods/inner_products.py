"""Inner products of whole tensors, added up from their slices.

What is gathered here in a survey lets a method that depends on angles and lengths of whole tensors
merge slice by slice all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lit_merge.methods.method import ParameterSlice


def inner_products(vectors: Sequence[Tensor], origin: Tensor | None = None) -> Tensor:
    r"""Return :math:`⟨v_i - o, v_j - o⟩` of all pairs, in float64.

    Args:
        vectors: :math:`v_i`, of one shape.
        origin: :math:`o`, of that shape; None for zero.

    Returns:
        ``[T, T]``, on the CPU.
    """
    rows = [vector.flatten().to(torch.float64, copy=True) for vector in vectors]
    if origin is not None:
        zero = origin.flatten().double()
        rows = [row.sub_(zero) for row in rows]
    products = torch.empty(len(rows), len(rows), dtype=torch.float64)
    for i, row in enumerate(rows):  # one by one: products of flat matrices are slow
        for j in range(i + 1):
            products[i, j] = products[j, i] = torch.dot(row, rows[j])
    return products


def expert_inner_products(p: ParameterSlice) -> Tensor:
    """Return the inner products of the experts in this slice, ``[T, T]`` in float64."""
    return inner_products(p.experts)


def task_vector_inner_products(p: ParameterSlice) -> Tensor:
    """Return the inner products of the task vectors in this slice, ``[T, T]`` in float64."""
    return inner_products(p.experts, p.require_base())


def added_by_group(
    found: Iterable[tuple[str, Tensor]], group: Callable[[str], str]
) -> dict[str, Tensor]:
    """Return the sums of what was found in the slices, by the group of the tensor's name."""
    totals: dict[str, Tensor] = {}
    for name, part in found:
        key = group(name)
        totals[key] = totals[key] + part if key in totals else part
    return totals
