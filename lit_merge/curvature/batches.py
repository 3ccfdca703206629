"""Batches as nested containers of tensors: how many examples, and which.

A batch is a tensor, or any nesting of dicts (also ``BatchEncoding``), lists, tuples, named tuples
and dataclasses that holds tensors whose dimension 0 counts the examples. Lists and tuples of texts
or other objects, one per example, are cut with them; everything else (numbers, flags, None,
0-dimensional tensors) belongs to the whole batch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_merge.errors import InputError


def batch_size_of(batch: Any) -> int:
    """Return the number of examples in a batch.

    Raises:
        InputError: No tensor tells the number, or two tensors disagree.
    """
    sizes = {
        path: tensor.shape[0] for path, tensor in tensors_in(batch, "batch") if tensor.dim() > 0
    }
    if not sizes:
        raise InputError(
            "batch: must hold tensors whose first dimension counts the examples; got "
            f"{type(batch).__name__} without one. Collate the examples into tensors."
        )
    (path, size), *others = sizes.items()
    for other_path, other_size in others:
        if other_size != size:
            raise InputError(
                "batch: all tensors must have the examples in their first dimension; got "
                f"{size} in {path} and {other_size} in {other_path}. Leave what is not per example "
                "out of the batch."
            )
    if size == 0:
        raise InputError("batch: must hold at least one example; got 0. Drop empty batches.")
    return size


def take_examples(batch: Any, indices: Sequence[int]) -> Any:
    """Return the batch of some of a batch's examples, in containers of the same types.

    Args:
        batch: A batch of B examples.
        indices: Which ones, each in [0, B).
    """
    size = batch_size_of(batch)
    wanted = list(indices)
    start = wanted[0] if wanted else 0
    run = wanted == list(range(start, start + len(wanted)))

    def take(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            return tensor
        if run:  # a view: nothing is copied
            return tensor[start : start + len(wanted)]
        return tensor.index_select(0, torch.tensor(wanted, device=tensor.device))

    def take_entries(entries: Sequence[Any]) -> Sequence[Any]:
        return [entries[i] for i in wanted] if len(entries) == size else entries

    return _rebuilt(batch, take, take_entries)


def split_batch(batch: Any) -> list[Any]:
    """Return the B batches of one example each that a batch of B examples consists of."""
    return [take_examples(batch, [i]) for i in range(batch_size_of(batch))]


def unlike_pair(batch: Any) -> tuple[int, ...]:
    """Return the two examples of a batch that are padded most differently (one, if it has one).

    Two examples of different length tell more about whether a model keeps examples apart than two
    of the same length. Padding shows as zeros or repeated values in integer and boolean tensors.
    """
    size = batch_size_of(batch)
    changes = torch.zeros(size)
    for _, tensor in tensors_in(batch, "batch"):
        if tensor.dim() >= 2 and not tensor.is_floating_point() and not tensor.is_complex():
            rows = tensor.reshape(size, -1)
            changes += (rows[:, 1:] != rows[:, :-1]).sum(1).cpu()
            changes += (rows != 0).sum(1).cpu()
    shortest, longest = int(changes.argmin()), int(changes.argmax())
    if shortest == longest:  # all alike: the first and the last
        shortest, longest = 0, size - 1
    return (shortest, longest) if shortest != longest else (shortest,)


def outside_inference(batch: Any) -> Any:
    """Return the batch with inference tensors replaced by copies that autograd takes.

    Must be called outside of inference mode.
    """
    if not any(tensor.is_inference() for _, tensor in tensors_in(batch, "batch")):
        return batch
    return _rebuilt(batch, lambda t: t.clone() if t.is_inference() else t, lambda entries: entries)


def tensors_in(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a nest of containers, each with the path that leads to it."""
    if isinstance(value, Tensor):
        yield path, value
        return
    children = _children(value)
    if children is not None:
        for key, child in children:
            yield from tensors_in(child, f"{path}[{key!r}]")


def _children(value: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return None


def _rebuilt(
    value: Any,
    tensor: Callable[[Tensor], Tensor],
    entries: Callable[[Sequence[Any]], Sequence[Any]],
) -> Any:
    """Return the container with ``tensor`` applied to tensors, ``entries`` to lists without any."""
    if isinstance(value, Tensor):
        return tensor(value)
    if isinstance(value, Mapping):
        changed = {key: _rebuilt(child, tensor, entries) for key, child in value.items()}
        if not isinstance(value, MutableMapping):
            return changed
        result = copy.copy(value)  # keeps BatchEncoding, OrderedDict, defaultdict, …
        for key, child in changed.items():
            result[key] = child
        return result
    if isinstance(value, (list, tuple)):
        if next(tensors_in(value, ""), None) is None:
            shared = any(entry is None or isinstance(entry, (int, float)) for entry in value)
            children = list(value if shared else entries(value))
        else:
            children = [_rebuilt(child, tensor, entries) for child in value]
        if hasattr(value, "_make"):  # a named tuple
            return value._make(children)
        return type(value)(children)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        duplicate = copy.copy(value)
        for name, child in _children(value) or ():
            changed_child = _rebuilt(child, tensor, entries)
            object.__setattr__(duplicate, name, changed_child)  # also of a frozen one
        return duplicate
    return value
