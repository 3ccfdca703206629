"""Backwards in which a mode that sees torch function calls stays on.

``torch.autograd.grad`` and ``Tensor.backward`` are torch functions themselves, and such a mode is
off inside of those it sees. But there the parts of a model that are under activation checkpointing
run a second time, and must do the same as the first time, under the mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from lit_merge.errors import InputError


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradients of a loss, None for leaves that it does not depend on."""
    ones = torch.ones_like(loss)
    return _engine_run_backward(
        (loss,), (ones,), False, False, tuple(leaves), allow_unreachable=True, accumulate_grad=False
    )


def accumulate_gradients(
    loss: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """Do what ``Tensor.backward`` does with the same arguments."""
    _engine_run_backward(
        (loss,),
        (torch.ones_like(loss) if gradient is None else gradient,),
        create_graph if retain_graph is None else retain_graph,
        create_graph,
        tuple(inputs or ()),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def require_seen_forward(loss: Tensor) -> None:
    """Raise where a part of the forward is only made in the backward, out of anyone's sight.

    Args:
        loss: Computed with parameters that require a gradient.

    Raises:
        InputError: Activations are checkpointed in the old way.
    """
    if any("CheckpointFunction" in node for node in _graph_of(loss)):
        raise InputError(
            "loss: must be computed in a forward that can be seen; got reentrant checkpointing "
            "(torch.utils.checkpoint with use_reentrant=True). Set use_reentrant=False."
        )


def _graph_of(value: Tensor) -> Iterator[str]:
    """Yield the names of the functions that a tensor was computed by."""
    waiting = [value.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
            yield node.name()
