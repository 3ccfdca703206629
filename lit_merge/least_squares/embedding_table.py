r"""Least squares for a table of embeddings: a mean of the experts' rows by how often they occur.

With one column of x per id, the normal equations of
:mod:`lit_merge.least_squares.settings` are diagonal. For the rows n of every task t that have the
id i, and what the experts put out there,

.. math:: e_i = \frac{\sum_t w_t \sum_n v_n z_n + λ \bar d\, e^0_i}
                     {\sum_t w_t \sum_n v_n + λ \bar d}

with :math:`\bar d` the mean of :math:`\sum_t w_t \sum_n v_n` over the ids that occur and
:math:`w_t` one over the task's weight of rows and the variance of its outputs. An id that does not
occur keeps the merge's :math:`e^0_i`.

Shapes: counts ``[V]``, sums ``[V, C]`` for V ids and C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.correction.forward import rows
from lit_merge.distributed import failing_together, sum_over_ranks
from lit_merge.least_squares.layer_solver import SolvedLayer
from lit_merge.least_squares.normal_equations import RIDGES
from lit_merge.least_squares.row_means import RowSums
from lit_merge.least_squares.settings import Ridge


class EmbeddingTable:
    """An embedding whose rows can be solved.

    Args:
        name: Its qualified name.
        module: The embedding.
    """

    def __init__(self, name: str, module: nn.Embedding) -> None:
        self.name = name
        self.module = module

    def explains(self, ids: Any, output: Any) -> bool:
        """Return whether an output is nothing but the rows of the ids."""
        if not isinstance(ids, Tensor) or not isinstance(output, Tensor):
            return False
        return torch.equal(self.module.weight[ids], output)


@dataclass(frozen=True)
class EmbeddedRows:
    """One batch of one task at an embedding.

    Attributes:
        task: The task.
        ids: What the embedding was given, integer of any shape.
        output: What the expert's embedding has put out, ``[*ids.shape, C]``.
        weights: Weight of each row that counts; None for ones.
        mask: The tokens that count.
    """

    task: int
    ids: Tensor
    output: Tensor
    weights: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class TableEquations:
    """Sums over rows that determine a table, float64: diagonal normal equations.

    Attributes:
        counts: Weight of the rows of each id, ``[V]``.
        sums: Weighted sum of the wanted outputs of each id, ``[V, C]``.
        square: Weighted sum of their squares, 0-d.
    """

    counts: Tensor
    sums: Tensor
    square: Tensor

    def __add__(self, other: TableEquations) -> TableEquations:
        """Return the sums over the rows of both."""
        return TableEquations(
            self.counts + other.counts, self.sums + other.sums, self.square + other.square
        )

    def solve(self, prior: Tensor, ridge: float) -> Tensor:
        """Return the table, float64 ``[V, C]``; ids that do not occur have the prior's rows."""
        seen = self.counts > 0
        strength = ridge * self.counts[seen].mean()
        table = prior.to(self.sums, copy=True)
        right = self.sums[seen] + strength * table[seen]
        table[seen] = right / (self.counts[seen] + strength)[:, None]
        return table

    def loss(self, table: Tensor) -> float:
        """Return the weighted sum of squared errors of a table."""
        fitted = self.counts @ table.square().sum(1) - 2 * (table * self.sums).sum()
        return float(fitted + self.square)


@torch.no_grad()
def solve_embedding(
    table: EmbeddingTable,
    batches: Sequence[EmbeddedRows],
    num_tasks: int,
    ridge: float | Ridge,
) -> SolvedLayer:
    """Solve a table of embeddings and overwrite it. Collective.

    Args:
        table: The merged model's.
        batches: This rank's batches.
        num_tasks: Number of tasks over all ranks.
        ridge: See :class:`~lit_merge.correction.least_squares.LeastSquares`.

    Raises:
        InputError: On every rank: an output is not finite, or a task has no rows.
    """
    name, prior = table.name, table.module.weight.to(torch.float64, copy=True)
    sums = RowSums(num_tasks, prior.new_empty(1, 0, prior.shape[1]))
    with failing_together():
        for batch in batches:
            _, z, v = _rows(batch)
            sums.add(batch.task, z.new_empty(1, len(z), 0), z[None], v[None, :, None], layer=name)
    task_weights = sums.means(name).task_weights
    parts: dict[str, Tensor] = {}
    for half in "01":
        parts[f"{half}.counts"] = prior.new_zeros(len(prior))
        parts[f"{half}.sums"] = torch.zeros_like(prior)
        parts[f"{half}.square"] = prior.new_zeros(())
    for batch in batches:
        ids, z, v = _rows(batch)
        z, v = z.double(), v.double() * task_weights[batch.task]
        middle = len(ids) // 2
        for half, part in (("0", slice(0, middle)), ("1", slice(middle, None))):
            own, weight = z[part], v[part]
            parts[f"{half}.counts"].index_add_(0, ids[part], weight)
            parts[f"{half}.sums"].index_add_(0, ids[part], own * weight[:, None])
            parts[f"{half}.square"] += weight @ own.square().sum(1)
    parts = sum_over_ranks(parts, device=prior.device)
    one, two = (
        TableEquations(*(parts[f"{half}.{what}"] for what in ("counts", "sums", "square")))
        for half in "01"
    )
    total = one + two
    if isinstance(ridge, str):
        losses = {
            some: one.loss(two.solve(prior, some)) + two.loss(one.solve(prior, some))
            for some in RIDGES
        }
        used = min(losses, key=lambda some: losses[some])
    else:
        used = ridge
    found = total.solve(prior, used)
    table.module.weight.copy_(found)
    return SolvedLayer(name, used, total.loss(prior) / num_tasks, total.loss(found) / num_tasks)


def _rows(batch: EmbeddedRows) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids ``[n]``, wanted outputs ``[n, C]`` and weights ``[n]`` of the rows that count."""
    ids = rows(batch.ids[..., None], batch.mask)[:, 0]
    z = rows(batch.output, batch.mask)
    v = z.new_ones(len(z)) if batch.weights is None else batch.weights.to(z)
    return ids, z, v
