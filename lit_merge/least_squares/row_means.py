r"""Means over the rows of a layer by task, and what each task's rows count.

With n_t the summed weight v of a task's rows and Var Z_t the variance of its wanted outputs, summed
over the outputs, a task has :math:`w_t = 1/(n_t \operatorname{Var} Z_t)` per unit of weight, so
that every task counts alike whatever its number of rows and its scale.

Shapes: G groups of rows; x ``[G, n, d]``, z ``[G, n, o]``, v ``[1, n, 1]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_merge.distributed import sum_over_ranks
from lit_merge.errors import InputError


@dataclass(frozen=True)
class RowMeans:
    """Means over the rows of all batches and ranks, float64.

    Attributes:
        task_weights: :math:`w_t`; 0 for a task whose outputs do not vary, unless none do.
        of_x: Mean of x by task, ``[G, d]``.
        of_z: Mean of z by task, ``[G, o]``.
        x: Mean of x over all tasks, each with the weight of all of its rows.
        z: The same of z.
    """

    task_weights: tuple[float, ...]
    of_x: tuple[Tensor, ...]
    of_z: tuple[Tensor, ...]
    x: Tensor
    z: Tensor


class RowSums:
    """Sums over the rows that a rank has seen so far.

    Args:
        num_tasks: Number of tasks over all ranks.
        like: Float64 tensor of the shape of the layer's matrix, ``[G, d, o]``.
    """

    def __init__(self, num_tasks: int, like: Tensor) -> None:
        groups, inputs, outputs = like.shape
        self.num_tasks = num_tasks
        self._sums: dict[str, Tensor] = {}
        for task in range(num_tasks):
            self._sums[f"{task}.n"] = like.new_zeros(())
            self._sums[f"{task}.x"] = like.new_zeros(groups, inputs)
            self._sums[f"{task}.z"] = like.new_zeros(groups, outputs)
            self._sums[f"{task}.zz"] = like.new_zeros(groups, outputs)

    def add(self, task: int, x: Tensor, z: Tensor, v: Tensor | None, *, layer: str) -> None:
        """Take in rows.

        Args:
            task: Their task.
            x: Inputs.
            z: Wanted outputs.
            v: Weights; None for ones.
            layer: Name of the layer, for messages.

        Raises:
            InputError: A value is NaN or infinite.
        """
        for values, whose in ((x, "inputs of the layer"), (z, "outputs of the expert's layer")):
            if not bool(values.isfinite().all()):
                raise InputError(
                    f"layer {layer!r}: {whose} must be finite; got NaN or infinity on task {task}. "
                    "Check the weights of its expert, or use a wider precision."
                )
        vx, vz = (x, z) if v is None else (x * v, z * v)
        self._sums[f"{task}.n"] += x.shape[1] if v is None else v.sum(dtype=torch.float64)
        self._sums[f"{task}.x"] += vx.sum(1, dtype=torch.float64)
        self._sums[f"{task}.z"] += vz.sum(1, dtype=torch.float64)
        self._sums[f"{task}.zz"] += (vz * z).sum(1, dtype=torch.float64)

    def means(self, layer: str) -> RowMeans:
        """Return the means over all ranks. Collective.

        Raises:
            InputError: A task has no rows.
        """
        sums = sum_over_ranks(self._sums, device=self._sums["0.x"].device)
        of_x, of_z, weights, shares = [], [], [], []
        for task in range(self.num_tasks):
            count = sums[f"{task}.n"]
            if not count > 0:
                raise InputError(
                    f"layer {layer!r}: must have rows of every task; got none of task {task} that "
                    "counts. Give calibration examples that are not all padding."
                )
            of_x.append(sums[f"{task}.x"] / count)
            of_z.append(sums[f"{task}.z"] / count)
            variance = float((sums[f"{task}.zz"] / count - of_z[-1].square()).clamp_min(0).sum())
            # A task whose outputs do not vary at all has nothing to say about the matrix.
            known = variance > 1e-12 * float(of_z[-1].square().sum()) and variance > 0
            weights.append(1 / (float(count) * variance) if known else 0.0)
            shares.append(1 / variance if known else 0.0)
        if not any(shares):
            weights, shares = [1.0] * self.num_tasks, [1.0] * self.num_tasks
        total = sum(shares)
        x = torch.stack([share / total * mean for share, mean in zip(shares, of_x, strict=True)])
        z = torch.stack([share / total * mean for share, mean in zip(shares, of_z, strict=True)])
        return RowMeans(tuple(weights), tuple(of_x), tuple(of_z), x.sum(0), z.sum(0))
