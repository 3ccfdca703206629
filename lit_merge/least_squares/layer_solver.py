"""One layer of a merged model, solved from the rows of all tasks, batches and ranks.

The rows are gone through twice, batch by batch: for the means, and for the sums around them. They
are made anew each time, because the rows of a convolution are several times its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.distributed import failing_together, sum_over_ranks
from lit_merge.least_squares.linear_layers import LinearLayer, effective_affine
from lit_merge.least_squares.normal_equations import (
    NormalEquations,
    choose_ridge,
    mean_diagonal,
    normal_equations,
    solve,
)
from lit_merge.least_squares.row_means import RowMeans, RowSums
from lit_merge.least_squares.settings import LeastSquares


@dataclass(frozen=True)
class SolvedLayer:
    """What became of a layer.

    Attributes:
        name: Its qualified name.
        ridge: The ridge that was used.
        before: Share of the wanted outputs' variance that the layer did not give before, averaged
            over the tasks.
        after: The same afterwards.
    """

    name: str
    ridge: float
    before: float
    after: float


@dataclass(frozen=True)
class TaskRows:
    """One batch of one task at a layer.

    Attributes:
        task: The task.
        inputs: The layer's input.
        output: What the expert's layer has put out.
        expert: The expert's layer; needed where its weights are wanted.
        norm: The expert's BatchNorm behind it.
        lack: What the layer shall make up for, in the shape of its output.
        weights: Weight of each row that counts; None for ones.
        mask: The tokens that count.
        seed: Of the choice of rows.
    """

    task: int
    inputs: Tensor
    output: Tensor
    expert: LinearLayer | None = None
    norm: nn.Module | None = None
    lack: Tensor | None = None
    weights: Tensor | None = None
    mask: Tensor | None = None
    seed: int = 0


class LayerRows:
    """The rows of a layer: x, wanted z and weight v of every batch.

    Args:
        layer: The layer of the merged model.
        norm: The BatchNorm behind it that is solved with it, so that z is what that puts out.
        batches: This rank's batches.
        num_tasks: Number of tasks over all ranks.
        settings: How to solve.
    """

    def __init__(
        self,
        layer: LinearLayer,
        norm: nn.Module | None,
        batches: Sequence[TaskRows],
        num_tasks: int,
        settings: LeastSquares,
    ) -> None:
        self.layer = layer
        self.norm: Any = norm
        self.batches = batches
        self.num_tasks = num_tasks
        self.settings = settings

    def rows(self, batch: TaskRows) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return x ``[G, n, d]``, z ``[G, n, o]`` and v ``[1, n, 1]`` of a batch, or no v."""
        layer, mask = self.layer, batch.mask
        z = layer.outputs(batch.output, mask)
        chosen = self._chosen(z.shape[1], batch.seed)
        if chosen is not None:
            chosen = chosen.to(z.device)
            z = z[:, chosen]
        x, z = _widened(layer.inputs(batch.inputs, mask, chosen)), _widened(z)
        if self.settings.wanted == "weights" and batch.expert is not None:
            expert = batch.expert
            z = x @ expert.matrix(expert.module.weight).to(x)
            if expert.has_bias:
                z = z + expert.offset(expert.module.bias).to(x)[:, None]
        if batch.norm is not None:
            scale, shift = effective_affine(batch.norm)
            z = z * layer.offset(scale)[:, None] + layer.offset(shift)[:, None]
        if batch.lack is not None:
            lack = layer.outputs(batch.lack, mask)
            z = z + _widened(lack if chosen is None else lack[:, chosen])
        if batch.weights is None:
            return x, z, None
        v = batch.weights if chosen is None else batch.weights[chosen]
        return x, z, v.to(x)[None, :, None]

    def _chosen(self, count: int, seed: int) -> Tensor | None:
        """Return the indices of the rows that are used, None for all."""
        most = self.settings.max_rows
        if most is None or count <= most:
            return None
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(count, generator=generator)[:most].sort().values


@torch.no_grad()
def solve_layer(
    layer_rows: LayerRows, *, per_task_shift: bool, precision: Tensor | None = None
) -> SolvedLayer:
    """Solve a layer and overwrite it. Collective.

    Args:
        layer_rows: Its rows.
        per_task_shift: Whether each task has a shift of its own behind the layer, so that only what
            is left without the task's mean has to be fitted.
        precision: The merge's precision of the weight, in the weight's shape.

    Raises:
        InputError: On every rank: a value is not finite, a task has no rows, or the system is
            singular.
    """
    layer, norm, settings = layer_rows.layer, layer_rows.norm, layer_rows.settings
    prior = layer.matrix(layer.module.weight).to(torch.float64, copy=True)
    if norm is not None:
        scale = layer.offset(effective_affine(norm)[0].double())[:, None]
        prior = prior * scale
    sums = RowSums(layer_rows.num_tasks, prior)
    with failing_together():
        for batch in layer_rows.batches:
            sums.add(batch.task, *layer_rows.rows(batch), layer=layer.name)
    means = sums.means(layer.name)
    centred = norm is not None or layer.has_bias
    folds = _equations(layer_rows, means, prior, per_task=per_task_shift, centred=centred)
    ridge = settings.ridge
    total = folds[0] + folds[1]
    if isinstance(ridge, str):
        ridge = choose_ridge(folds, prior)
    extra = None
    if precision is not None:
        extra = layer.matrix(precision.double()).to(prior)
        if norm is not None:  # of a weight that is multiplied with the norm's scale
            extra = extra / scale.square().clamp_min(torch.finfo(torch.float32).tiny)
        # Of mean one over the layer, in the unit of the ridge.
        extra = extra * (settings.precision * mean_diagonal(total.gram) / extra.mean())
    matrix = solve(total, prior, ridge=ridge, precision=extra, name=layer.name)
    offset = means.z - (means.x[:, None] @ matrix)[:, 0] if centred else None
    if norm is not None:
        assert offset is not None
        _make_transparent(norm, offset)
        layer.set_(matrix, torch.zeros_like(offset) if layer.has_bias else None)
    else:
        layer.set_(matrix, offset)
    tasks = layer_rows.num_tasks
    return SolvedLayer(layer.name, ridge, total.loss(prior) / tasks, total.loss(matrix) / tasks)


def _equations(
    layer_rows: LayerRows, means: RowMeans, like: Tensor, *, per_task: bool, centred: bool
) -> tuple[NormalEquations, NormalEquations]:
    """Return the sums over the first and over the second half of every batch, of all ranks."""
    groups, inputs, outputs = like.shape
    sums = {
        f"{half}.{part}": like.new_zeros(shape)
        for half in (0, 1)
        for part, shape in (
            ("gram", (groups, inputs, inputs)),
            ("cross", (groups, inputs, outputs)),
            ("square", (groups, outputs)),
        )
    }
    for batch in layer_rows.batches:
        x, z, v = layer_rows.rows(batch)
        if per_task:
            x, z = x - _row(means.of_x[batch.task], x), z - _row(means.of_z[batch.task], z)
        elif centred:
            x, z = x - _row(means.x, x), z - _row(means.z, z)
        if v is not None:
            root = v.sqrt()
            x, z = x * root, z * root
        middle = x.shape[1] // 2
        for half, part in enumerate((slice(0, middle), slice(middle, None))):
            own = normal_equations(x[:, part], z[:, part], means.task_weights[batch.task])
            sums[f"{half}.gram"] += own.gram
            sums[f"{half}.cross"] += own.cross
            sums[f"{half}.square"] += own.square
    sums = sum_over_ranks(sums, device=like.device)
    one, two = (
        NormalEquations(sums[f"{half}.gram"], sums[f"{half}.cross"], sums[f"{half}.square"])
        for half in (0, 1)
    )
    return one, two


def _row(mean: Tensor, rows: Tensor) -> Tensor:
    return mean.to(rows)[:, None]


def _widened(rows: Tensor) -> Tensor:
    """Return rows in float32, or in float64 where they are."""
    return rows if rows.dtype == torch.float64 else rows.float()


def _make_transparent(norm: Any, offset: Tensor) -> None:
    """Let a BatchNorm only add an offset: what it scaled by is in the layer before it now."""
    norm.running_mean.zero_()
    norm.running_var.fill_(1.0 - norm.eps)
    norm.weight.fill_(1.0)
    norm.bias.copy_(offset.reshape(norm.bias.shape))
