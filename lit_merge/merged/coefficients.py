r"""How far each layer goes along each task vector, learned: a merge's coefficients per layer.

.. math:: θ(l) = θ_{merged}(l) + \sum_t \tanh(c_{t,l}) \, (θ_t(l) - θ_0(l))

With :math:`c = 0` it is the merge, whatever its method was. A layer is a module with parameters of
its own: its weight and bias move together.

References:
    Yang et al. (2024), arXiv:2310.02575 (AdaMerging, layer-wise); the tanh, which keeps a
    coefficient in (−1, 1), as in Yang et al. (2024), arXiv:2412.10416 (SUPERMERGE).

Note:
    AdaMerging learns the coefficients themselves, by entropy; here they are learned as a change of
    a merge, by the loss of the fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_merge.checkpoint import Checkpoint, aligned
from lit_merge.errors import InputError
from lit_merge.expert import open_expert


class LayerCoefficients(nn.Module):
    """A coefficient per task and layer.

    The task vectors are no part of its state: they are given for a fit and taken away after it.

    Args:
        parameters: The shared parameters by name.
        num_tasks: Number of tasks T.

    Attributes:
        weight: c, ``[T, L]`` for L layers.
        layers: Names of the layers.
    """

    def __init__(self, parameters: Mapping[str, Tensor], num_tasks: int) -> None:
        super().__init__()
        self.layers = tuple(dict.fromkeys(map(_layer_of, parameters)))
        self.weight = nn.Parameter(torch.zeros(num_tasks, len(self.layers)))
        self._task_vectors: dict[str, Tensor] = {}

    @property
    def active(self) -> bool:
        """Whether there are task vectors."""
        return bool(self._task_vectors)

    def give(self, task_vectors: Mapping[str, Tensor]) -> None:
        """Take the task vectors to move along.

        Args:
            task_vectors: ``[T, *shape]`` by name; parameters without one stay.

        Raises:
            InputError: If there is none.
        """
        if not task_vectors:
            raise InputError(
                "coefficients: must find a task vector; got experts without a floating tensor in "
                'common with the base. Use coefficients: "none".'
            )
        self._task_vectors = dict(task_vectors)

    def take(self) -> None:
        """Drop the task vectors."""
        self._task_vectors = {}

    def moved(self, parameters: Mapping[str, Tensor], *, sign: float = 1.0) -> dict[str, Tensor]:
        """Return the parameters that have a task vector, moved along it.

        Args:
            parameters: The shared parameters by name, ``[*shape]``.
            sign: −1 for the opposite way.
        """
        coefficients = sign * self.weight.tanh()
        columns = {layer: i for i, layer in enumerate(self.layers)}
        return {
            name: parameters[name]
            + torch.tensordot(
                coefficients[:, columns[_layer_of(name)]].to(vectors.dtype), vectors, dims=1
            )
            for name, vectors in self._task_vectors.items()
        }


def read_task_vectors(
    base: Checkpoint, experts: Sequence[str | Path], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the task vectors of the parameters that base and experts all have.

    Args:
        base: The weights that the experts were fine-tuned from.
        experts: Path of each task's expert, in the order of the tasks.
        parameters: The shared parameters by the network's names, for their sizes and types.

    Returns:
        ``[T, *shape]`` by name, where the parameters are.

    Raises:
        InputError: If an expert cannot be read.
    """
    common = _values(aligned(base, parameters), parameters)
    vectors: dict[str, list[Tensor]] = {name: [] for name in common}
    for path in experts:
        expert = open_expert(path)
        try:
            own = _values(aligned(expert.weights, parameters), parameters)
        finally:
            expert.close()
        vectors = {n: [*found, own[n] - common[n]] for n, found in vectors.items() if n in own}
    return {name: torch.stack(found) for name, found in vectors.items()}


def _values(checkpoint: Checkpoint, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: checkpoint.tensor(name).to(like, copy=True)
        for name, like in parameters.items()
        if like.is_floating_point()
        and name in checkpoint
        and checkpoint.infos[name].shape == like.shape
    }


def _layer_of(name: str) -> str:
    return name.rpartition(".")[0]
