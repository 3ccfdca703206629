"""Sums, gatherings and errors across ranks: the only file that names process groups.

Everything here is a no-op for one process, so callers need no branches. The functions that talk to
other ranks are collective: every rank must call them, in the same order, and never inside a loop
over batches, because ranks may have different numbers of batches, even none; :func:`in_step` makes
them equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_merge.errors import InputError

T = TypeVar("T")

_BUCKET = 1 << 24  # elements reduced at a time: 64 MB of float32


def world_size() -> int:
    """Return the number of processes that work together, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    """Wait until every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def broadcast(value: T, *, source: int = 0) -> T:
    """Return the value that rank ``source`` has given; small and picklable."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=source)
    return values[0]


def make_equal(tensor: Tensor) -> None:
    """Overwrite a tensor by the first rank's, bit for bit. Collective."""
    if world_size() == 1:
        return
    # What is sent must lie in memory without gaps.
    sent = tensor.detach().contiguous()
    dist.broadcast(sent, src=0)
    if sent.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(sent)


def gather(value: T, *, group: Any = None) -> tuple[T, ...]:
    """Return the values of all ranks, or of a group's, in their order; small and picklable."""
    if world_size() == 1:
        return (value,)
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return tuple(values)


def sum_over_ranks(
    tensors: Mapping[str, Tensor], *, device: torch.device, group: Any = None
) -> dict[str, Tensor]:
    """Return the sum of each named tensor over the ranks, on every rank.

    A rank without examples may lack tensors that others have: they count as zero there.

    Args:
        tensors: Whole tensors by name; not changed.
        device: The device that this rank's process group works on.
        group: The process group of the ranks to sum over, of which this one is a member; None for
            all ranks.

    Returns:
        The sums by name, in this rank's order, each on the device of its tensor.

    Raises:
        InputError: Two ranks hold different shapes or dtypes under one name.
    """
    if world_size() == 1:
        return dict(tensors)
    layout = _common_layout(tensors, group)
    sums: dict[str, Tensor] = {}
    for names in _buckets(layout):
        parts = [
            tensors[name].detach().to(device).flatten()
            if name in tensors
            else torch.zeros(layout[name][0], dtype=layout[name][1], device=device).flatten()
            for name in names
        ]
        bucket = torch.cat(parts)
        dist.all_reduce(bucket, op=dist.ReduceOp.SUM, group=group)
        for name, flat in zip(
            names, torch.split(bucket, [len(part) for part in parts]), strict=True
        ):
            home = tensors[name].device if name in tensors else device
            # A copy of its own: a view would keep the whole bucket alive.
            sums[name] = flat.reshape(layout[name][0]).to(home, copy=True)
    return {name: sums[name] for name in [*tensors, *(n for n in sums if n not in tensors)]}


def sum_number(value: int) -> int:
    """Return the sum of an integer over the ranks, on every rank."""
    return sum(gather(value))


def true_everywhere(value: bool, *, device: torch.device) -> bool:
    """Return whether a value is true on all ranks. Collective, and cheap enough for every step.

    Args:
        value: This rank's.
        device: The device that this rank's process group works on.
    """
    if world_size() == 1:
        return value
    least = torch.tensor(int(value), device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return bool(least)


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise on every rank what any rank raises in the block, so that no rank waits for ever.

    Collective at the end of the block, so the block itself must not be.

    Raises:
        InputError: On the ranks that were fine, when another one was not; names that rank.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    messages = gather(_message(error))
    if error is not None:
        raise error
    _raise_first(messages)


def in_step(batches: Iterable[T], *, spare: T) -> Iterator[tuple[T, bool]]:
    """Yield as many batches on every rank as the rank with the most of them has.

    A sharded model communicates in every forward and backward, so that all ranks must run them
    equally often. Collective before every batch; an error of one rank's iterator ends all of them.

    Args:
        batches: This rank's batches; may be none.
        spare: What is run again and again where they have ended.

    Yields:
        A batch, and whether it is one of ``batches``: the spare must not count.

    Raises:
        InputError: On the ranks that were fine, when another one was not; names that rank.
    """
    iterator = iter(batches)
    while True:
        item, own, error = spare, True, None
        try:
            item = next(iterator)
        except StopIteration:
            own = False
        except Exception as caught:
            error = caught
        states = gather((_message(error), own))
        if error is not None:
            raise error
        _raise_first([message for message, _ in states])
        if not any(others for _, others in states):
            return
        yield item, own


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds only a part of the tensor.

    Recognised are DTensors (FSDP2, tensor parallel), the flat parameters of FSDP1 and the
    parameters of DeepSpeed's ZeRO-3.
    """
    if getattr(tensor, "_is_flat_param", False) or hasattr(tensor, "ds_id"):
        return True
    return is_dtensor(tensor)


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether a tensor is a part of one that is sharded with FSDP2 or tensor parallelism."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def sharded_parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of which this process holds only a part.

    Inside an FSDP1 wrapper all parameters count, because with ``use_orig_params=True`` they look
    like ordinary ones. FSDP2 leaves the parameters of its outermost unit whole after a forward
    without a backward; they are sharded again first.
    """
    reshard(module)
    wrapped = {
        id(parameter)
        for child in module.modules()
        if type(child).__name__ == "FullyShardedDataParallel"
        for parameter in child.parameters()
    }
    return tuple(
        name
        for name, parameter in module.named_parameters()
        if id(parameter) in wrapped or is_sharded(parameter)
    )


def fsdp_units(model: nn.Module) -> list[Any]:
    """Return the modules that FSDP2 makes whole together, the model itself first."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def shard_parameters(module: nn.Module, mesh: Any) -> None:
    """Shard what a module holds over a device mesh (FSDP2), as one unit. Collective.

    Args:
        module: The module; parameters of units inside are theirs already.
        mesh: One-dimensional, of the ranks with different data.
    """
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, mesh=mesh)


def reshard(model: nn.Module) -> None:
    """Let go of the whole parameters that FSDP2 holds between a forward and a backward."""
    for unit in fsdp_units(model):
        unit.reshard()


def _message(error: Exception | None) -> str | None:
    return None if error is None else str(error) or type(error).__name__


def _raise_first(messages: Sequence[str | None]) -> None:
    """Raise what another rank has raised."""
    for other, message in enumerate(messages):
        if message is not None:
            raise InputError(f"rank {other}: {message}")


def _common_layout(
    tensors: Mapping[str, Tensor], group: Any
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every tensor that any rank holds, in one order for all ranks."""
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for other, own in enumerate(
        gather({n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}, group=group)
    ):
        for name, what in own.items():
            if layout.setdefault(name, what) != what:
                raise InputError(
                    f"{name}: must have one shape and dtype on every rank; got {layout[name]} and, "
                    f"on rank {other}, {what}. Build the same model on every rank."
                )
    return dict(sorted(layout.items()))


def _buckets(layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Iterator[list[str]]:
    """Yield names in groups of one dtype and at most _BUCKET elements (a larger tensor alone)."""
    for dtype in dict.fromkeys(dtype for _, dtype in layout.values()):
        group: list[str] = []
        filled = 0
        for name, (shape, its_dtype) in layout.items():
            if its_dtype != dtype:
                continue
            size = torch.Size(shape).numel()
            if group and filled + size > _BUCKET:
                yield group
                group, filled = [], 0
            group.append(name)
            filled += size
        yield group
