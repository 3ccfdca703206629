"""Each example through its own task's part of a model, in one forward of a mixed-task batch.

A merged model is shared by T tasks, but its heads (and corrections) are not. The tasks of the
examples of a batch are held by a :class:`TaskContext` while the model runs, because a model's
forward has no argument for them::

    context = TaskContext()
    model.head = TaskRouter({"svhn": a, "dtd": b}, tasks=("svhn", "dtd"), context=context)
    with context.using(torch.tensor([0, 1, 1])):
        logits = model(images)                       # [3, widest head]

Examples are the outermost axis everywhere: axis 0 of an activation has length B, or k·B with each
example's k entries next to each other (windows of a Swin transformer, say). Models that put time
first (``batch_first=False``) do not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_merge.correction.sites import channel_layout
from lit_merge.errors import InputError


class TaskContext:
    """The task of every example of the batch that runs at the moment.

    Note:
        With activation checkpointing the forward runs again in the backward pass, which must then
        happen inside :meth:`using` as well.
    """

    def __init__(self) -> None:
        self._ids: Tensor | None = None
        self._present: tuple[int, ...] = ()

    @contextmanager
    def using(self, task_ids: Tensor | int) -> Iterator[None]:
        """Set the tasks for the forwards inside the block; blocks can be nested.

        Args:
            task_ids: Index of the task of each example, integer ``[B]``; one int stands for a batch
                of any size from that task.

        Raises:
            InputError: They are no such indices.
        """
        ids = torch.as_tensor(task_ids)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool or ids.ndim > 1:
            raise InputError(
                f"task_ids: must be integers [batch]; got {ids.dtype} {tuple(ids.shape)}. Give the "
                "index of each example's task."
            )
        # Found here, so that a forward waits for the device once and not at every router.
        present: tuple[int, ...] = tuple(torch.unique(ids).tolist())
        if not present or present[0] < 0:
            raise InputError(
                f"task_ids: must be non-negative and at least one; got {ids.tolist()}. Give the "
                "index of each example's task."
            )
        before = self._ids, self._present
        self._ids, self._present = ids.long(), present
        try:
            yield
        finally:
            self._ids, self._present = before

    @property
    def task_ids(self) -> Tensor:
        """Tasks of the running batch, int64 ``[B]``, or 0-d if one stands for all.

        Raises:
            InputError: No batch is running.
        """
        if self._ids is None:
            raise InputError(
                "task_ids: per-task heads and corrections must know the task of each example; got "
                "a forward outside of `with context.using(task_ids)`. Wrap the forward in it."
            )
        return self._ids

    @property
    def present(self) -> tuple[int, ...]:
        """Tasks that occur in the running batch, ascending; empty outside of one."""
        return self._present

    def __deepcopy__(self, memo: dict[int, Any]) -> TaskContext:
        """Return the context itself: a copied model runs in the blocks of the original's."""
        return self

    def ids_for(self, activations: Tensor, *, where: str) -> Tensor:
        """Return the task of each entry of axis 0 of an activation.

        Args:
            activations: ``[k·B, ...]``, the k entries of an example next to each other.
            where: Name of the place in the model, for messages.

        Returns:
            int64 ``[k·B]`` on the device of the activations.

        Raises:
            InputError: Axis 0 is no multiple of the number of examples.
        """
        ids, length = self.task_ids.to(activations.device), activations.shape[0]
        if ids.ndim == 0:
            return ids.expand(length)
        if length == len(ids):
            return ids
        if length == 0 or length % len(ids):
            raise InputError(
                f"{where}: axis 0 must be the {len(ids)} examples of task_ids, or a multiple; got "
                f"shape {tuple(activations.shape)}. Give one task id per example, and leave "
                "modules whose output is not per example out of the sites."
            )
        return ids.repeat_interleave(length // len(ids))


class TaskRouter(nn.Module):
    """A module per task in the place of one: every example goes through its own task's.

    Outputs of different width (label spaces) are padded on the channel axis to the widest with
    −inf, which softmax, argmax and cross-entropy take for "impossible" (label smoothing would make
    it an infinite loss: take the task's own columns for that): to the widest of all tasks where the
    layers tell their width (:func:`~lit_merge.correction.sites.channel_layout`), else to the widest
    in the batch. Where the tasks' layers take inputs of different width, each gets as much as it
    takes of what an earlier router has padded.

    Note:
        Only modules of tasks that are present run, except that trainable ones of absent tasks run
        on zero rows when gradients are recorded: every parameter then takes part in every step, so
        DistributedDataParallel needs no ``find_unused_parameters``.

    Attributes:
        heads: The modules by task, in the order of the task indices; a dot in a task name is
            stored as ``/``.
    """

    def __init__(
        self, heads: Mapping[str, nn.Module], *, tasks: Sequence[str], context: TaskContext
    ) -> None:
        super().__init__()
        missing = [task for task in tasks if task not in heads]
        unknown = [task for task in heads if task not in tasks]
        if not tasks or missing or unknown:
            raise InputError(
                f"heads: must have one module for each of the tasks {list(tasks)}; got "
                f"{list(heads)}. Name every task once in both."
            )
        self.context = context
        self.tasks = tuple(tasks)
        self.heads = nn.ModuleDict()
        for task in tasks:
            add_named(self.heads, task, heads[task], parameter="tasks")
        layouts = [channel_layout(heads[task]) for task in tasks]
        self.channel_dim = next((layout[1] for layout in layouts if layout), -1)
        self._width = max((layout[0] for layout in layouts if layout), default=0)
        self._cuts = len({getattr(heads[task], "in_features", None) for task in tasks}) > 1

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return each example's own output.

        Args:
            x: Input, ``[k·B, ...]``.
            *args: Further arguments, the same for all heads.
            **kwargs: Further keyword arguments, the same for all heads.

        Returns:
            ``[k·B, ..., W]`` with W the widest output.
        """
        context, heads = self.context, list(self.heads.values())
        ids = context.ids_for(x, where=f"per-task {type(heads[0]).__name__}")
        present = context.present
        if present[-1] >= len(heads):
            raise InputError(
                f"task_ids: must be below the number of tasks, {len(heads)}; got {present[-1]}. "
                f"The tasks are {list(self.tasks)}."
            )
        if len(present) == 1 and not any(self._must_run(head) for head in heads):
            return self._widened([self._run(heads[present[0]], x, args, kwargs)])[0]
        order, outputs = [], []
        for task, head in enumerate(heads):
            if task in present or self._must_run(head):
                index = (ids == task).nonzero().squeeze(1)
                order.append(index)
                outputs.append(self._run(head, x[index], args, kwargs))
        return torch.cat(self._widened(outputs))[torch.cat(order).argsort()]

    @staticmethod
    def _must_run(head: nn.Module) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters())

    def _run(self, head: nn.Module, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        if self._cuts:
            x = x[..., : getattr(head, "in_features", None)]
        output: Tensor = head(x, *args, **kwargs)
        return output

    def _widened(self, outputs: list[Tensor]) -> list[Tensor]:
        dim = self.channel_dim
        width = max(self._width, *(output.shape[dim] for output in outputs))
        # F.pad counts (left, right) from the last axis.
        before = [0, 0] * (-1 - dim if dim < 0 else outputs[0].ndim - 1 - dim)
        return [
            F.pad(output, (*before, 0, width - output.shape[dim]), value=float("-inf"))
            if output.shape[dim] < width
            else output
            for output in outputs
        ]


def add_named(parent: nn.Module, name: str, module: nn.Module, *, parameter: str) -> None:
    """Register a module under a user's name, with dots (no part of a module's name) as ``/``.

    Raises:
        InputError: The name is taken, by another module or by torch.
    """
    key = name.replace(".", "/")
    try:
        if key in dict(parent.named_children()):
            raise KeyError(key)
        parent.add_module(key, module)
    except KeyError:
        raise InputError(
            f"{parameter}: names must be unique, not empty and none of torch's own; got {name!r}. "
            "Choose another name."
        ) from None
