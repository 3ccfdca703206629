"""The two ways to the squared gradients of a batch: all examples at once, and one by one.

The first is fast and knows only some parameters; the second is a plain loop over batches of one
example, right for every parameter, and costs a forward and backward per example.

Both run inside :func:`~lit_merge.curvature.differentiation.differentiation`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lit_merge.curvature.backward import gradients
from lit_merge.curvature.batches import split_batch
from lit_merge.curvature.batches import tensors_in as tensors_of_batch
from lit_merge.curvature.capture import Capture
from lit_merge.curvature.coverage import Coverage
from lit_merge.curvature.differentiation import requiring_grad
from lit_merge.curvature.estimator import widen
from lit_merge.curvature.objective import Objective


@dataclass(frozen=True)
class Problem:
    """What is differentiated with respect to what.

    Attributes:
        objective: The mean loss of a batch.
        parameters: The wanted ones, by name.
    """

    objective: Objective
    parameters: Mapping[str, nn.Parameter]


def add_at_once(
    problem: Problem, coverage: Coverage, capture: Capture, batch: Any, indices: Sequence[int]
) -> Tensor:
    """Add the squared gradients of the parameters that the coverage computes at once.

    Args:
        problem: Loss and parameters.
        coverage: How to compute what.
        capture: A new capture of the coverage's parameters; its totals are added to. Afterwards its
            ``failed`` tells which parameters must be computed one by one for this batch.
        batch: B examples.
        indices: [B], index of each in the data set.

    Returns:
        The mean loss.
    """
    watched = {name: problem.parameters[name] for name in coverage.unused}
    with capture, requiring_grad(watched.values()):
        capture.mark(tensor for _, tensor in tensors_of_batch(batch, "batch"))
        loss = problem.objective(batch, indices)
        capture.end_forward()
        if not loss.requires_grad:
            return loss
        # ℓ_n, not the mean Σ_n ℓ_n / B, is what the gradients are of
        found = gradients(loss * len(indices), [capture.anchor, *watched.values()])
        capture.end_backward()
    for name, gradient in zip(watched, found[1:], strict=True):
        if gradient is not None:
            capture.failed[name] = "it was not used by the examples of the probe"
    return loss.detach()


def add_one_by_one(
    problem: Problem,
    names: Collection[str],
    totals: MutableMapping[str, Tensor],
    batch: Any,
    indices: Sequence[int],
) -> tuple[list[Tensor], set[str]]:
    """Add the squared gradients of some parameters by a loop over the examples.

    Args:
        problem: Loss and parameters.
        names: Which parameters.
        totals: By name, what to add to.
        batch: B examples.
        indices: [B], index of each in the data set.

    Returns:
        The losses of the examples, and the names of the parameters that got a gradient.
    """
    chosen = {name: problem.parameters[name] for name in names}
    losses: list[Tensor] = []
    reached: set[str] = set()
    with requiring_grad(chosen.values()):
        for index, example in zip(indices, split_batch(batch), strict=True):
            loss = problem.objective(example, [index])
            losses.append(loss.detach())
            if not loss.requires_grad:
                continue
            found = gradients(loss, [*chosen.values()])
            for name, gradient in zip(chosen, found, strict=True):
                if gradient is None:
                    continue
                reached.add(name)
                dense = widen(gradient.to_dense() if gradient.is_sparse else gradient)
                totals[name].addcmul_(dense, dense)
    return losses, reached
