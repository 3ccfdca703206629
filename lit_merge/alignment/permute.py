"""Applying permutations to all that a model's units lie in: tensors and activation statistics.

All permutations of one axis are composed into one order, old place by new place, so that every
tensor is gathered once for each of its axes however many symmetries it has. Outer symmetries come
before those inside of them: :mod:`lit_merge.alignment.symmetry`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lit_merge.alignment.symmetry import Symmetry
from lit_merge.correction.statistics import ChannelStatistics
from lit_merge.errors import InputError


def permute(
    tensors: Mapping[str, Tensor],
    symmetries: Sequence[Symmetry],
    permutations: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return tensors with their units permuted; those that no permutation touches as they are.

    Args:
        tensors: Parameters and buffers by name, or what has their names and shapes, such as a
            diagonal Hessian.
        symmetries: In their order, the outer before the inner.
        permutations: By name of a symmetry, int64 ``[size]``: new unit u is old unit
            ``permutation[u]``. Symmetries without one stay.

    Returns:
        All the given tensors by name.

    Raises:
        InputError: A permutation is none of its symmetry's units, or a tensor is missing or has
            not the places of the symmetry.
    """
    orders: dict[tuple[str, int], Tensor] = {}
    for symmetry, permutation in _checked(symmetries, permutations):
        for axis in symmetry.axes:
            if axis.name not in tensors:
                raise InputError(
                    f"tensors: must hold {axis.name!r}, on which the symmetry {symmetry.name!r} "
                    "acts; got no such tensor. Permute all tensors of the model together."
                )
            shape = tensors[axis.name].shape
            if len(shape) <= axis.axis or int(axis.positions.max()) >= shape[axis.axis]:
                raise InputError(
                    f"tensors: {axis.name!r} must have the places of the symmetry "
                    f"{symmetry.name!r} on axis {axis.axis}; got shape {tuple(shape)}. Find the "
                    "symmetries on a model of this architecture."
                )
            key = axis.name, axis.axis
            order = orders.setdefault(key, torch.arange(shape[axis.axis]))
            orders[key] = order[_order(len(order), axis.positions, permutation)]
    permuted = dict(tensors)
    for (name, dim), order in orders.items():
        value = permuted[name]
        permuted[name] = value.index_select(dim, order.to(value.device))
    return permuted


def permute_statistics(
    statistics: Mapping[str, ChannelStatistics],
    symmetries: Sequence[Symmetry],
    permutations: Mapping[str, Tensor],
) -> dict[str, ChannelStatistics]:
    """Return the statistics that the permuted model's activations have.

    Args:
        statistics: By site, the name of a module.
        symmetries: As in :func:`permute`.
        permutations: As in :func:`permute`.

    Returns:
        All the given statistics, new where a permutation moves channels of their site.

    Raises:
        InputError: A permutation is none of its symmetry's units, or a site has not the channels
            of the symmetry.
    """
    orders: dict[str, Tensor] = {}
    for symmetry, permutation in _checked(symmetries, permutations):
        for site in symmetry.sites:
            if site.name not in statistics:
                continue
            width = statistics[site.name].num_features
            if int(site.positions.max()) >= width:
                raise InputError(
                    f"site {site.name!r}: must have the channels of the symmetry "
                    f"{symmetry.name!r}; got {width}. Gather the statistics on this model."
                )
            order = orders.setdefault(site.name, torch.arange(width))
            orders[site.name] = order[_order(width, site.positions, permutation)]
    permuted = dict(statistics)
    for name, order in orders.items():
        one = permuted[name]
        index = order.to(one.mean.device)
        permuted[name] = ChannelStatistics(one.count, one.mean[index], one.m2[index])
    return permuted


def _checked(
    symmetries: Sequence[Symmetry], permutations: Mapping[str, Tensor]
) -> Iterator[tuple[Symmetry, Tensor]]:
    unknown = permutations.keys() - {symmetry.name for symmetry in symmetries}
    if unknown:
        raise InputError(
            f"permutations: must be of the symmetries given; got one of {sorted(unknown)[0]!r}. "
            "Take names of the symmetries."
        )
    for symmetry in symmetries:
        permutation = permutations.get(symmetry.name)
        if permutation is None:
            continue
        if permutation.dtype != torch.int64 or not torch.equal(
            permutation.cpu().sort().values, torch.arange(symmetry.size)
        ):
            raise InputError(
                f"permutations: that of {symmetry.name!r} must be an int64 vector with each of 0 "
                f"to {symmetry.size - 1} once; got {permutation.dtype} of shape "
                f"{tuple(permutation.shape)}. Give one old unit for each new one."
            )
        yield symmetry, permutation.cpu()


def _order(length: int, positions: Tensor, permutation: Tensor) -> Tensor:
    """Return the old place for each new one on an axis."""
    order = torch.arange(length)
    order[positions.flatten()] = positions[permutation].flatten()
    return order
