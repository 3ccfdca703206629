"""An expert under a permutation: all that its folder holds, moved alike.

Weights, buffers and the diagonal Hessian are permuted on the axes of their symmetries, activation
statistics on the channels of their sites, and of a layer's Gram matrix and Kronecker factors both
axes, as the inputs or outputs of the layer are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_merge.alignment.permute import permute, permute_statistics
from lit_merge.alignment.symmetry import Symmetry
from lit_merge.checkpoint import Checkpoint, alignment
from lit_merge.correction.statistics import from_tensors, to_tensors
from lit_merge.errors import InputError
from lit_merge.expert import Expert

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class ExpertTensors:
    """What an expert folder holds, under the names of the expert.

    Attributes:
        weights: Parameters and buffers.
        hessian: Diagonal Hessian, or None.
        activations: Statistics as in ``activations.safetensors``, or None.
        gram: Gram matrices, or None.
        kronecker: Kronecker factors, or None.
    """

    weights: Tensors
    hessian: Tensors | None = None
    activations: Tensors | None = None
    gram: Tensors | None = None
    kronecker: Tensors | None = None


def permuted_expert(
    expert: Expert,
    symmetries: Sequence[Symmetry],
    permutations: Mapping[str, Tensor],
    *,
    parameters: Iterable[str],
    modules: Iterable[str],
) -> ExpertTensors:
    """Return an expert whose units are permuted, in the types and under the names that it has.

    Args:
        expert: An opened expert folder.
        symmetries: What is permuted, by names of the model.
        permutations: By symmetry, int64 ``[size]``.
        parameters: Names of the model's parameters and buffers.
        modules: Names of its modules.

    Raises:
        InputError: A tensor is NaN or infinite, or does not fit a symmetry.
    """
    weights = read_tensors(expert.weights)
    names = alignment(weights, parameters)

    def moved(tensors: Tensors) -> Tensors:
        own = {names[name]: value for name, value in tensors.items()}
        out = permute(own, present(symmetries, own), permutations)
        return {name: out[names[name]] for name in tensors}

    hessian, gram, kronecker = expert.hessian, expert.gram, expert.kronecker
    layers = {
        name.removesuffix(".input").removesuffix(".output")
        for part in (gram, kronecker)
        for name in part or ()
    }
    order = _orders({name: weights[name].shape for name in layers & weights.keys()}, moved)
    return ExpertTensors(
        weights=moved(weights),
        hessian=None if hessian is None else moved(read_tensors(hessian)),
        activations=_activations(expert, symmetries, permutations, modules),
        gram=None
        if gram is None
        else {n: _both_axes(v, order[n]["input"]) for n, v in read_tensors(gram).items()},
        kronecker=None
        if kronecker is None
        else {
            name: _both_axes(value, order[weight][side])
            for name, value in read_tensors(kronecker).items()
            for weight, _, side in [name.rpartition(".")]
        },
    )


def read_tensors(checkpoint: Checkpoint) -> Tensors:
    """Return all tensors of a checkpoint.

    Raises:
        InputError: One is NaN or infinite.
    """
    tensors = {}
    for name in checkpoint:
        value = checkpoint.tensor(name)
        if value.is_floating_point() and not bool(value.float().isfinite().all()):
            raise InputError(
                f"{checkpoint.file_of(name)}: tensor {name!r} must be finite; got NaN or infinity. "
                "Take a checkpoint from before the training diverged."
            )
        tensors[name] = value
    return tensors


def present(symmetries: Sequence[Symmetry], tensors: Mapping[str, Tensor]) -> list[Symmetry]:
    """Return symmetries without the axes of tensors that are not there, such as a head's."""
    return [replace(s, axes=tuple(a for a in s.axes if a.name in tensors)) for s in symmetries]


def _activations(
    expert: Expert,
    symmetries: Sequence[Symmetry],
    permutations: Mapping[str, Tensor],
    modules: Iterable[str],
) -> Tensors | None:
    if expert.activations is None:
        return None
    source = str(expert.activations.path)
    statistics = from_tensors(read_tensors(expert.activations), source=source)
    names = alignment(statistics, modules)
    own = {names[site]: value for site, value in statistics.items()}
    out = permute_statistics(own, symmetries, permutations)
    return to_tensors({site: out[names[site]] for site in statistics})


def _orders(
    shapes: Mapping[str, torch.Size], moved: Callable[[Tensors], Tensors]
) -> dict[str, dict[str, Tensor]]:
    """Return the old place of each new input and output of layers, by weight."""
    numbered = {n: torch.arange(shape.numel()).reshape(shape) for n, shape in shapes.items()}
    found = {}
    for name, out in moved(numbered).items():
        width = out[0].numel()
        flat = out.reshape(len(out), width)
        found[name] = {"input": flat[0] % width, "output": flat[:, 0] // width}
    return found


def _both_axes(matrix: Tensor, order: Tensor) -> Tensor:
    return matrix[order][:, order]
