"""Matrices of an expert's layers on disk: Gram matrices, and Kronecker factors of the Fisher.

``gram.safetensors`` has a matrix [n, n] under the name of each weight [m, n] (a convolution's
[m, c, *kernel] flattened), ``kronecker.safetensors`` has ``<weight>.input`` [n, n] and
``<weight>.output`` [m, m]; both are symmetric, and float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lit_merge.checkpoint import Checkpoint, RenamedCheckpoint, alignment, open_state_dict
from lit_merge.errors import InputError
from lit_merge.expert.contents import check_finite, plain

SIDES = ("input", "output")
"""What the names of the two Kronecker factors of a weight end in."""

_ROUNDING = 1e-5  # of the largest entry: how far a symmetric matrix may be from its transpose
_FIX = "Gather it again on these weights."


def factor_names(weights: Mapping[str, str]) -> dict[str, str]:
    """Return new names of Kronecker factors, given those of the weights.

    >>> factor_names({"model.fc.weight": "fc.weight"})["model.fc.weight.output"]
    'fc.weight.output'
    """
    return {f"{old}.{side}": f"{new}.{side}" for old, new in weights.items() for side in SIDES}


def aligned_factors(factors: Checkpoint, weights: Iterable[str]) -> Checkpoint:
    """Return a view of Kronecker factors whose names begin with those of the weights.

    Names without a counterpart stay as they are; see :func:`~lit_merge.checkpoint.alignment`.
    """
    owners = dict.fromkeys(name.rpartition(".")[0] for name in factors)
    names = factor_names(alignment(owners, weights))
    if all(old == new for old, new in names.items()):
        return factors
    return RenamedCheckpoint(factors, names)


def check_gram(gram: Checkpoint, weights: Checkpoint) -> None:
    """Check, from headers alone, that Gram matrices fit weights, of which they may lack some.

    Raises:
        InputError: If a name is not that of a weight, or a shape or type differs.
    """
    for name in gram:
        _check_header(gram, name, _matrix_shape(gram, name, name, weights)[1])


def check_kronecker(factors: Checkpoint, weights: Checkpoint) -> None:
    """Check, from headers alone, that Kronecker factors fit weights, of which they may lack some.

    Raises:
        InputError: If a name is not that of a factor of a weight, a weight lacks one of its two, or
            a shape or type differs.
    """
    for name in factors:
        weight, _, side = name.rpartition(".")
        absent = [f"{weight}.{s}" for s in SIDES if f"{weight}.{s}" not in factors]
        if side not in SIDES or absent:
            lacking = f" without {absent[0]!r}" if side in SIDES else ""
            raise InputError(
                f"{factors.file_of(name)}: must hold <weight>.input and <weight>.output of each "
                f"weight; got {name!r}{lacking}. {_FIX}"
            )
        m, n = _matrix_shape(factors, name, weight, weights)
        _check_header(factors, name, n if side == "input" else m)


def checked_gram(gram: Mapping[str, Tensor], weights: Checkpoint) -> dict[str, Tensor]:
    """Return Gram matrices as they are stored: under plain names, fp32, on the CPU.

    Args:
        gram: [n, n] by the weight's name.
        weights: What they belong to, under plain names.

    Raises:
        InputError: If a matrix is not finite or not symmetric, has a negative number on its
            diagonal, or does not fit its weight.
    """
    given = plain(gram, "gram")
    check_gram(open_state_dict(given, path="gram"), weights)
    return _checked_values(given, "gram")


def checked_kronecker(factors: Mapping[str, Tensor], weights: Checkpoint) -> dict[str, Tensor]:
    """Return Kronecker factors as they are stored: under plain names, fp32, on the CPU.

    Args:
        factors: ``<weight>.input`` and ``<weight>.output``.
        weights: What they belong to, under plain names.

    Raises:
        InputError: As :func:`checked_gram`.
    """
    given = plain(factors, "kronecker")
    check_kronecker(open_state_dict(given, path="kronecker"), weights)
    return _checked_values(given, "kronecker")


def _matrix_shape(
    matrices: Checkpoint, name: str, weight: str, weights: Checkpoint
) -> tuple[int, int]:
    """Return m and n of the weight that a matrix belongs to."""
    file = matrices.file_of(name)
    if weight not in weights:
        raise InputError(
            f"{file}: must have the names of {weights.path}; got {name!r}, whose weight is not "
            f"there. {_FIX}"
        )
    shape = weights.infos[weight].shape
    if len(shape) < 2:
        raise InputError(
            f"{file}: tensor {name!r} must belong to a weight of two or more axes; got one of "
            f"shape {list(shape)}. {_FIX}"
        )
    return shape[0], math.prod(shape[1:])


def _check_header(matrices: Checkpoint, name: str, size: int) -> None:
    info = matrices.infos[name]
    if info.shape != (size, size):
        raise InputError(
            f"{matrices.file_of(name)}: tensor {name!r} must have the shape {[size, size]}, as its "
            f"weight has it; got {list(info.shape)}. {_FIX}"
        )
    if not info.dtype.is_floating_point:
        raise InputError(
            f"{matrices.file_of(name)}: tensor {name!r} must be of a floating type; got "
            f"{info.dtype}. {_FIX}"
        )


def _checked_values(given: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    check_finite(given, what, "Check the model's activations and loss on the training data.")
    stored = {n: v.to(device="cpu", dtype=torch.float32) for n, v in given.items()}
    check_finite(stored, what, "Give matrices that float32 can hold.")
    for name, matrix in stored.items():
        largest = float(matrix.abs().max()) if matrix.numel() else 0.0
        apart = float((matrix - matrix.mT).abs().max()) if matrix.numel() else 0.0
        if apart > _ROUNDING * largest:
            raise InputError(
                f"{what}: tensor {name!r} must be symmetric; got entries {apart:g} apart from "
                "their mirror image. Give sums of outer products."
            )
        if bool((matrix.diagonal() < 0).any()):
            raise InputError(
                f"{what}: tensor {name!r} must not be negative on its diagonal; got "
                f"{float(matrix.diagonal().min()):g}. Give sums of outer products."
            )
    return stored
