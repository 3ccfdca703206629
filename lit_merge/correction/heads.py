"""Heads of their own for every task of a merged model.

Experts whose label spaces differ keep their heads: the layers that own these tensors are replaced
by one layer per task behind a :class:`~lit_merge.correction.routing.TaskRouter`.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lit_merge.correction.routing import TaskContext, TaskRouter
from lit_merge.correction.sites import channel_layout
from lit_merge.errors import InputError


def install_heads(
    model: nn.Module,
    heads: Mapping[str, Mapping[str, Tensor]],
    context: TaskContext,
    *,
    tasks: Sequence[str],
) -> tuple[str, ...]:
    """Replace the layers that own the given tensors by one layer per task, in place.

    A task's layer is a copy of the model's with the task's tensors in it; a Linear, convolution,
    embedding or norm takes its size from them. Tensors of a layer that no task gives stay as the
    model has them, a copy for each task. Weights tied to a replaced layer are no longer tied.
    Attach corrections afterwards: hooks on a replaced layer would be copied with it.

    Args:
        model: The network; changed.
        heads: For each task the tensors of its own, by parameter or buffer name in the model.
        context: Holds the tasks of the running batch.
        tasks: The tasks in the order of their indices.

    Returns:
        Names of the replaced modules.

    Raises:
        InputError: A task or tensor is missing, unknown, or does not fit the layer.
    """
    if sorted(tasks) != sorted(heads):
        raise InputError(
            f"heads: must have the tensors of each of the tasks {list(tasks)}; got {list(heads)}. "
            "Name every task once in both."
        )
    names = dict.fromkeys(name for task in tasks for name in heads[task])
    for task in tasks:
        missing = [name for name in names if name not in heads[task]]
        if missing:
            raise InputError(
                f"heads: task {task!r} must have its own {missing[0]!r}, as other tasks have; got "
                f"only {sorted(heads[task])}. Give the tensor for every task or for none."
            )
    known = {*dict(model.named_parameters(remove_duplicate=False))}
    known |= {*dict(model.named_buffers(remove_duplicate=False))}
    owners: dict[str, list[str]] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        if name not in known or not owner or next(model.get_submodule(owner).children(), None):
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)[:3]
            what = "a tensor of a layer" if name in known else f"in {type(model).__name__}"
            raise InputError(
                f"heads: every tensor must be {what} without layers inside; got {name!r}. Near it "
                f"are {near}."
            )
        owners.setdefault(owner, []).append(leaf)
    routers = {
        owner: TaskRouter(
            {
                task: _rebuilt(
                    model.get_submodule(owner),
                    {leaf: heads[task][f"{owner}.{leaf}"] for leaf in leaves},
                    where=f"heads: {owner!r} of task {task!r}",
                )
                for task in tasks
            },
            tasks=tasks,
            context=context,
        )
        for owner, leaves in owners.items()
    }
    for owner, router in routers.items():  # only when all could be built
        parent, _, child = owner.rpartition(".")
        setattr(model.get_submodule(parent), child, router)
    return tuple(routers)


def _rebuilt(layer: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> nn.Module:
    """Return a copy of a leaf layer with other tensors, of other sizes where its kind allows."""
    layer, before = copy.deepcopy(layer), layer
    resized = False
    for name, tensor in tensors.items():
        old = getattr(before, name)
        if tensor.is_floating_point() != old.is_floating_point() or tensor.ndim != old.ndim:
            raise InputError(
                f"{where}: {name!r} must be {old.dtype} with {old.ndim} axes; got {tensor.dtype} "
                f"{tuple(tensor.shape)}. Use an expert of this architecture."
            )
        new = tensor.detach().to(old, copy=True)
        if isinstance(old, nn.Parameter):
            setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            setattr(layer, name, new)
        resized = resized or new.shape != old.shape
    if resized:
        _resize(layer, where=where)
    return layer


def _resize(layer: nn.Module, *, where: str) -> None:
    """Make a layer's own record of its sizes agree with its tensors."""
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    shape = tuple(tensors.get("weight", tensors.get("running_mean", torch.empty(0))).shape)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = shape
    elif isinstance(layer, nn.LayerNorm) and len(shape) == 1:
        layer.normalized_shape = shape
    elif isinstance(layer, _BatchNorm):
        layer.num_features = shape[0]
    elif isinstance(layer, _ConvNd) and not layer.transposed and layer.groups == 1:
        layer.out_channels, layer.in_channels = shape[:2]
    elif type(layer).__name__ == "Conv1D" and len(shape) == 2:
        conv_1d: Any = layer
        conv_1d.nf = shape[1]
    else:
        raise InputError(
            f"{where}: a {type(layer).__name__} must keep its size; got weights of shape {shape}. "
            "Make the experts' layers equally large."
        )
    layout = channel_layout(layer)
    for name, tensor in tensors.items():
        if layout and tensor.ndim == 1 and len(tensor) != layout[0]:
            raise InputError(
                f"{where}: {name!r} must have {layout[0]} entries, as the layer's other tensors; "
                f"got {len(tensor)}. Give all tensors of the layer for every task."
            )
