"""The assignment problem: which unit goes to which place, so that the profit is largest."""

from __future__ import annotations

import torch
from torch import Tensor


def assign(profit: Tensor) -> tuple[Tensor, float]:
    r"""Return the permutation of the largest total profit, by the Hungarian algorithm.

    .. math:: \max_π \sum_u C_{u, π(u)}

    Args:
        profit: What it earns to put the old unit v at the place u, ``[n, n]``, finite.

    Returns:
        The permutation, int64 ``[n]``, the identity where nothing is better; and its profit.

    References:
        Kuhn (1955), "The Hungarian method for the assignment problem".

    >>> assign(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    (tensor([1, 0]), 3.0)
    """
    from scipy.optimize import linear_sum_assignment

    matrix = profit.detach().to("cpu", torch.float64).numpy()
    _, columns = linear_sum_assignment(matrix, maximize=True)
    best = float(matrix[range(len(columns)), columns].sum())
    stay = float(matrix.trace())
    if best <= stay:  # dead units are all alike: do not shuffle them
        return torch.arange(len(columns)), stay
    return torch.from_numpy(columns).to(torch.int64), best
