"""Corrections of a network between its layers, for use with torch alone.

A network in which some scales and shifts could not be folded into the weights gets them back by

    import correction
    correction.apply(model, "corrections.safetensors")

and one network for several tasks, with a head and corrections for each, by

    model = correction.load_multi_task(model, "multi_task.safetensors")
    model.set_task("svhn")
    logits = model(images)
    logits = model(images, task=["svhn", "dtd", "dtd"])  # one task per example

A correction multiplies each channel of what a layer gives, or takes, by a number and adds another;
one before the head may take W_up relu(W_down z) from z. This file needs nothing beside torch.
"""

from __future__ import annotations

import copy
import json
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_INPUT = ":input"  # ends the name of a place before a layer

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and its metadata."""
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        start = 8 + length
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        begin, end = entry["data_offsets"]
        if end == begin:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        count = (end - begin) // dtype.itemsize
        if count != math.prod(shape):
            raise ValueError(f"{path}: {name} has {count} values for the shape {shape}")
        flat = torch.frombuffer(content, dtype=dtype, count=count, offset=start + begin)
        tensors[name] = flat.view(shape).clone()
    return tensors, metadata


class Correction(nn.Module):
    """What is done to the values of one place, for each of T tasks.

    Args:
        tensors: ``weight`` and ``bias``, ``[T, C]``, or ``down``, ``[T, r, C]``, and ``up``,
            ``[T, C, r]``.
        channel_dim: Axis of the channels.
    """

    def __init__(self, tensors: Mapping[str, Tensor], channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, values: Tensor, task: Tensor) -> Tensor:
        """Return the corrected values.

        Args:
            values: What the layer gives or takes, ``[k·B, ...]``.
            task: Index of the task of each example, ``[B]``, or of all, 0-d.
        """
        x = values.movedim(self.channel_dim, -1)
        rows = task.expand(x.shape[0]) if task.ndim == 0 else _per_row(task, x.shape[0])
        held = {name: value[rows].to(x.dtype) for name, value in self.named_buffers()}
        if "weight" in held:
            shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
            x = x * held["weight"].view(shape) + held["bias"].view(shape)
        else:
            flat = x.reshape(x.shape[0], -1, x.shape[-1])
            hidden = (flat @ held["down"].mT).relu()
            x = x - (hidden @ held["up"].mT).reshape(x.shape)
        return x.movedim(-1, self.channel_dim)


def apply(model: nn.Module, path: str | Path) -> list[Any]:
    """Put the corrections of a file behind the layers of a model; return the hooks' handles.

    Calling ``remove()`` of each handle takes them off again.
    """
    tensors, metadata = read_safetensors(path)
    only = torch.tensor(0)
    return _attach(model, tensors, json.loads(metadata["sites"]), lambda: only)


class MultiTask(nn.Module):
    """One network for several tasks; see :func:`load_multi_task`.

    Attributes:
        model: The network, with a layer per task in the place of each layer of the heads.
        tasks: Names of the tasks in the order of their indices.
        num_classes: Number of classes of each task; None where it is not known.
    """

    def __init__(
        self, model: nn.Module, tasks: Sequence[str], num_classes: Sequence[int | None]
    ) -> None:
        super().__init__()
        self.model = model
        self.tasks = tuple(tasks)
        self.num_classes = tuple(num_classes)
        self._task: Tensor | None = None
        self._running: Tensor | None = None

    def index(self, task: str) -> int:
        """Return the index of a task."""
        if task not in self.tasks:
            raise ValueError(f"task: must be one of {', '.join(self.tasks)}; got {task!r}")
        return self.tasks.index(task)

    def set_task(self, task: str) -> None:
        """Choose the task of all examples that come without one."""
        self._task = torch.tensor(self.index(task))

    def running_task(self) -> Tensor:
        """Return the tasks of the examples that run at the moment, ``[B]`` or 0-d."""
        if self._running is None:
            raise ValueError("task: call the MultiTask itself, not the model inside it")
        return self._running

    def forward(
        self, *args: Any, task: str | int | Sequence[str] | Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Call the model.

        Args:
            *args: Of the model.
            task: A task's name or index for all examples, or a name or index for each; None for
                what ``set_task`` has chosen.
            **kwargs: Of the model.

        Returns:
            What the model returns. With examples of several tasks, logits are as many as the widest
            head has, −inf beyond a task's own classes.
        """
        if task is None:
            if self._task is None:
                raise ValueError("task: choose one, by set_task(name) or model(..., task=name)")
            self._running = self._task
        elif isinstance(task, str):
            self._running = torch.tensor(self.index(task))
        elif isinstance(task, (int, Tensor)):
            self._running = torch.as_tensor(task).long()
        else:
            self._running = torch.tensor([self.index(name) for name in task])
        try:
            return self.model(*args, **kwargs)
        finally:
            self._running = None


class TaskHeads(nn.Module):
    """A layer per task: each example goes through its own task's."""

    def __init__(self, layers: Sequence[nn.Module], running_task: Callable[[], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.channel_dim = 1 if isinstance(layers[0], nn.modules.conv._ConvNd) else -1
        self._running_task = running_task

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return each example's own output; the narrower ones end with −inf."""
        task = self._running_task()
        if task.ndim == 0:
            output: Tensor = self._run(int(task), x, args, kwargs)
            return output
        rows = _per_row(task, x.shape[0]).to(x.device)
        order, parts = [], []
        for index in sorted(set(rows.tolist())):
            own = (rows == index).nonzero().squeeze(1)
            order.append(own)
            parts.append(self._run(index, x[own], args, kwargs))
        width = max(part.shape[self.channel_dim] for part in parts)
        padded = [self._widened(part, width) for part in parts]
        return torch.cat(padded)[torch.cat(order).argsort()]

    def _widened(self, part: Tensor, width: int) -> Tensor:
        shape = list(part.shape)
        shape[self.channel_dim] = width - shape[self.channel_dim]
        return torch.cat((part, part.new_full(shape, -math.inf)), self.channel_dim)

    def _run(self, index: int, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        layer = self.layers[index]
        if isinstance(layer, nn.Linear):
            x = x[..., : layer.in_features]  # the rest is an earlier head's padding
        output: Tensor = layer(x, *args, **kwargs)
        return output


def load_multi_task(model: nn.Module, path: str | Path) -> MultiTask:
    """Load one network for several tasks.

    Args:
        model: The plain architecture, with any number of classes; it is changed.
        path: The file.

    Returns:
        The network in evaluation mode, to be called in the place of the model.
    """
    tensors, metadata = read_safetensors(path)
    about = json.loads(metadata["multi_task"])
    wrapped = MultiTask(model, about["tasks"], about["num_classes"])
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        group, _, inner = name.partition("/")
        groups.setdefault(group, {})[inner] = value
    owners: dict[str, None] = {}
    for name in groups.get("heads", {}):
        owners.setdefault(name.partition("/")[2].rpartition(".")[0])
    state = dict(groups.get("shared", {}))
    for owner in owners:
        layer = model.get_submodule(owner)
        layers = []
        for index in range(len(wrapped.tasks)):
            start = f"{index}/{owner}."
            own = {n[len(start) :]: v for n, v in groups["heads"].items() if n.startswith(start)}
            layers.append(_with_tensors(layer, own))
        parent, _, child = owner.rpartition(".")
        setattr(model.get_submodule(parent), child, TaskHeads(layers, wrapped.running_task))
        for name in list(state):
            if name.startswith(f"{owner}."):
                del state[name]
    inside = tuple(f"{owner}." for owner in owners)
    model.load_state_dict(
        {**state, **{n: v for n, v in model.state_dict().items() if n.startswith(inside)}}
    )
    sites = about["sites"]
    _attach(model, groups.get("corrections", {}), sites, wrapped.running_task)
    return wrapped.eval()


def _attach(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    sites: Sequence[Mapping[str, Any]],
    running_task: Callable[[], Tensor],
) -> list[Any]:
    handles = []
    for site in sites:
        name = site["name"]
        layer = model.get_submodule(name.removesuffix(_INPUT))
        own = {key: tensors[f"{name}/{key}"] for key in site["tensors"]}
        hook = _Hook(Correction(own, site["channel_dim"]), running_task)
        if name.endswith(_INPUT):
            handles.append(layer.register_forward_pre_hook(hook.before, with_kwargs=True))
        else:
            handles.append(layer.register_forward_hook(hook.after))
    return handles


class _Hook:
    """A correction at a layer; it follows the layer from device to device."""

    def __init__(self, correction: Correction, running_task: Callable[[], Tensor]) -> None:
        self.correction = correction
        self.running_task = running_task

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Correct the first of a layer's arguments."""
        if args:
            return (self.corrected(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self.corrected(kwargs[name])}

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Correct a layer's output, the first of several."""
        if isinstance(output, (tuple, list)):
            return type(output)([self.corrected(output[0]), *output[1:]])
        return self.corrected(output)

    def corrected(self, values: Tensor) -> Tensor:
        """Return corrected values."""
        if next(self.correction.buffers()).device != values.device:
            self.correction.to(values.device)
        corrected: Tensor = self.correction(values, self.running_task().to(values.device))
        return corrected


def _per_row(task: Tensor, rows: int) -> Tensor:
    """Return the task of each row, where each example has as many rows, one after the other."""
    if rows % len(task):
        raise ValueError(f"task: must be one per example; got {len(task)} for {rows} rows")
    return task.repeat_interleave(rows // len(task))


def _with_tensors(layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a layer with other tensors, maybe of other sizes."""
    layer = copy.deepcopy(layer)
    for name, value in tensors.items():
        old = getattr(layer, name)
        new = value.to(old)
        setattr(layer, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    weight = tensors.get("weight")
    if weight is not None and isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif weight is not None and isinstance(layer, nn.LayerNorm) and weight.ndim == 1:
        layer.normalized_shape = tuple(weight.shape)
    return layer
