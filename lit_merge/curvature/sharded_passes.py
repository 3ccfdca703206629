"""The two ways to the squared gradients of a batch, of a model that is sharded over ranks.

They do what :mod:`lit_merge.curvature.passes` does, on all ranks in step, each with examples of its
own. Where a rank has none, it runs others that do not count. What fails on one rank in a forward is
raised on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.curvature.backward import gradients
from lit_merge.curvature.batches import split_batch, tensors_in
from lit_merge.curvature.coverage import Coverage
from lit_merge.curvature.differentiation import requiring_grad
from lit_merge.curvature.estimator import widen, zeros_for
from lit_merge.curvature.objective import Objective
from lit_merge.curvature.passes import Problem
from lit_merge.curvature.sharded_capture import ShardedCapture
from lit_merge.distributed import failing_together, gather, in_step
from lit_merge.errors import InputError
from lit_merge.sharding import UsedParameters, local_part, part_as, reduce_scatter_into


class ObjectiveTogether(Objective):
    """The mean loss over each rank's batch: what is wrong on one rank is raised on all of them."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        used: UsedParameters,
        **settings: Any,
    ) -> None:
        """Bind model and loss, see :class:`Objective`.

        Args:
            model: Given to the loss.
            loss: Returns the mean loss over the batch.
            used: The parameters of the model.
            settings: As for :class:`Objective`.
        """
        super().__init__(model, loss, **settings)
        self._used = used

    def __call__(self, batch: Any, indices: Sequence[int]) -> Tensor:
        """Return the loss. Collective.

        Raises:
            InputError: On every rank, for what is wrong on any.
        """
        with failing_together(), self._used.forward():
            return super().__call__(batch, indices)

    def require_expectation(self, batch: Any, indices: Sequence[int]) -> None:
        """See :meth:`Objective.require_expectation`."""
        with self._used.forward():
            super().require_expectation(batch, indices)


@dataclass(frozen=True)
class ShardedProblem(Problem):
    """What is differentiated with respect to what.

    Attributes:
        objective: The mean loss of a rank's batch.
        parameters: The wanted ones as they are stored, by name.
        used: The same as a forward uses them, and others.
    """

    used: UsedParameters


def add_at_once(
    problem: ShardedProblem,
    coverage: Coverage,
    capture: ShardedCapture,
    batch: Any,
    indices: Sequence[int],
) -> Tensor:
    """Add the squared gradients of the parameters that the coverage computes at once. Collective.

    Args:
        problem: Loss and parameters.
        coverage: How to compute what.
        capture: A new capture of the coverage's parameters. Afterwards its ``failed`` tells, alike
            on all ranks, which parameters could not be computed.
        batch: B examples.
        indices: [B], index of each in the data set.

    Returns:
        The mean loss.

    Raises:
        InputError: On every rank, if the loss is not finite on any, or the ranks' forwards differ.
    """
    watched = {name: problem.parameters[name] for name in coverage.unused}
    with requiring_grad(watched.values()):
        with capture:
            capture.mark(tensor for _, tensor in tensors_in(batch, "batch"))
            loss = problem.objective(batch, indices)
            capture.end_forward()
        _require_same_forward((*capture.plan(), loss.requires_grad))
        if not loss.requires_grad:
            return loss
        leaves = [problem.used.by_name[name] for name in watched]
        with capture:
            found = gradients(loss * len(indices), [capture.anchor, *leaves])
            capture.end_backward()
    for name, gradient in zip(watched, found[1:], strict=True):
        if gradient is not None:
            capture.failed[name] = "it was not used by the examples of the probe"
    for failed in gather(capture.failed):
        capture.failed |= failed
    return loss.detach()


def add_one_by_one(
    problem: ShardedProblem,
    names: Collection[str],
    totals: MutableMapping[str, Tensor],
    batch: Any,
    indices: Sequence[int],
    *,
    counts: bool = True,
) -> tuple[list[Tensor], set[str]]:
    """Add the squared gradients of some parameters by a loop over the examples. Collective.

    Args:
        problem: Loss and parameters.
        names: Which parameters, alike on all ranks.
        totals: By name, what to add to.
        batch: B examples.
        indices: [B], index of each in the data set.
        counts: Whether this rank's examples count.

    Returns:
        The losses of this rank's examples, and the names of the parameters that got a gradient.
    """
    stored = [problem.parameters[name] for name in names]
    examples = list(zip(indices, split_batch(batch), strict=True))
    losses: list[Tensor] = []
    reached: set[str] = set()
    for (index, example), own in in_step(examples, spare=examples[0]):
        with requiring_grad(stored):
            loss = problem.objective(example, [index])
            _require_same_forward((loss.requires_grad,))
            if own:
                losses.append(loss.detach())
            if loss.requires_grad:
                leaves = {name: problem.used.by_name[name] for name in names}
                reached |= _add_squares(loss, leaves, totals, counts=counts and own)
    return losses, reached


def _add_squares(
    loss: Tensor,
    leaves: dict[str, nn.Parameter],
    totals: MutableMapping[str, Tensor],
    *,
    counts: bool,
) -> set[str]:
    """Add the squared gradients of one loss, of which one at a time is held."""
    reached: set[str] = set()

    def add(name: str, gradient: Tensor | None) -> None:
        used = leaves[name]
        room = zeros_for(local_part(used))
        if gradient is not None and counts:
            part = part_as(gradient.to_dense() if gradient.is_sparse else gradient, used)
            room.copy_(widen(part).square())
        reduce_scatter_into(totals[name], room, used=used)

    @torch.no_grad()
    def take(name: str, gradient: Tensor) -> Tensor | None:
        reached.add(name)
        add(name, gradient)
        # What autograd would keep until the end, without its memory.
        plain = type(gradient) is Tensor and not gradient.is_sparse
        return gradient.new_zeros(()).expand(gradient.shape) if plain else None

    with _hooks(leaves, take):
        gradients(loss, [*leaves.values()])
        with torch.no_grad():
            for name in leaves:
                if name not in reached:
                    add(name, None)
    return reached


@contextmanager
def _hooks(
    leaves: dict[str, nn.Parameter], take: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    handles: list[Any] = [
        leaf.register_hook(partial(take, name))  # type: ignore[no-untyped-call]
        for name, leaf in leaves.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _require_same_forward(plan: tuple[Any, ...]) -> None:
    """Raise where the backward of another rank would wait for what this one's does not do."""
    for rank, other in enumerate(gather(plan)):
        if other != plan:
            raise InputError(
                "model: must use the same parameters in the same order on every rank, whatever its "
                f"examples are; got another forward on rank {rank}. Measure the unsharded model "
                'with strategy="ddp".'
            )
