"""Heads: each task's own layer, solved for its expert's logits on the merged model's features."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lit_merge.correction.routing import TaskRouter
from lit_merge.correction.site import channel_layout
from lit_merge.least_squares.layer_solver import LayerRows, SolvedLayer, TaskRows, solve_layer
from lit_merge.least_squares.linear_layers import LinearLayer, linear_layer
from lit_merge.least_squares.settings import LeastSquares


def solve_heads(
    name: str, router: TaskRouter, batches: Sequence[TaskRows], settings: LeastSquares
) -> tuple[SolvedLayer, ...]:
    """Solve the head of every task and overwrite it; heads that are not linear stay. Collective.

    Args:
        name: Qualified name of the router.
        router: The merged model's heads.
        batches: This rank's batches: what the merged model gives to its heads, and what the
            expert's head has put out.
        settings: How to solve.

    Raises:
        InputError: On every rank: a value is not finite, or a system is singular.
    """
    solved = []
    for task, head in enumerate(router.heads.values()):
        layer = linear_layer(f"{name}.heads.{router.tasks[task]}", head)
        if layer is None:
            continue
        width = getattr(head, "in_features", None)
        own = [
            TaskRows(
                0,
                inputs=batch.inputs[..., :width],
                output=_own_classes(layer, batch.output),
                mask=batch.mask,
                seed=batch.seed,
            )
            for batch in batches
            if batch.task == task
        ]
        solved.append(solve_layer(LayerRows(layer, None, own, 1, settings), per_task_shift=False))
    return tuple(solved)


def _own_classes(layer: LinearLayer, output: Tensor) -> Tensor:
    """Return an expert's logits without what a router has padded."""
    width, axis = channel_layout(layer.module) or (output.shape[-1], -1)
    return output.narrow(axis, 0, width)
