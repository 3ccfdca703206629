"""Tensors of which each process holds a part, as DTensors: the only file that looks into them.

FSDP2 makes a parameter whole for a forward and a backward, as another Parameter than the one that
is stored. Under tensor parallelism it is never whole: each process computes with its part. Both can
come together: the ranks with different data then share each part.

Where a tensor is whole, everything here is a no-op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lit_merge.distributed import failing_together, fsdp_units, gather, is_dtensor, rank, reshard

_Place: TypeAlias = tuple[nn.Module, str, str]
"""A module, the attribute of a parameter in it, and the parameter's name in the model."""

_Hook: TypeAlias = Callable[[nn.Module, tuple[Any, ...]], None]


def zero_everywhere(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of the tensors that are zero in all parts, on every rank. Collective.

    Args:
        tensors: Whole or sharded tensors by name; a rank may lack some.
    """
    zero: dict[str, bool] = {}
    for others in gather({name: not local_part(value).any() for name, value in tensors.items()}):
        for name, is_zero in others.items():
            zero[name] = zero.get(name, True) and is_zero
    return tuple(name for name, is_zero in zero.items() if is_zero)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, sharing its memory: all of a whole one."""
    if not is_dtensor(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def part_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process' part of a sharded tensor in the layout of another.

    Collective where the layouts differ, as those of a parameter and its gradient may under tensor
    parallelism.

    Args:
        tensor: Sharded somehow; or whole, if ``like`` is.
        like: A tensor of the same shape, sharded as wanted.
    """
    if not is_dtensor(like):
        return tensor
    return local_part(tensor.redistribute(placements=like.placements))  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, on every rank. Collective if it is sharded."""
    if not is_dtensor(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def give_whole(tensors: Mapping[str, Tensor], take: Callable[[str, Tensor], None]) -> None:
    """Give the first rank one whole tensor after another, on the CPU. Collective.

    Every rank holds one whole tensor at a time.

    Args:
        tensors: Whole or sharded tensors, the same names in the same order on every rank.
        take: Called on the first rank.

    Raises:
        Exception: What ``take`` raised; the other ranks raise an InputError.
    """
    error: Exception | None = None
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if rank() == 0 and error is None:
            try:
                take(name, value.cpu())
            except Exception as caught:  # the others are waiting for the next tensor
                error = caught
    with failing_together():
        if error is not None:
            raise error


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this process would hold; it may share its memory.

    Args:
        tensor: Whole, and the same on every rank.
        like: A tensor of the same shape, sharded as wanted.
    """
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    home = tensor.to(like.device)
    everywhere = DTensor.from_local(home, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements).to_local()


@torch.no_grad()
def copy_into(target: Tensor, values: Tensor) -> None:
    """Copy this process' part of a whole tensor into what it holds of a sharded one.

    Args:
        target: Sharded or whole.
        values: Whole, of the same shape, and the same on every rank.
    """
    local_part(target).copy_(own_part(values.to(target.dtype), target))


def sharded_as(part: Tensor, like: Tensor) -> Tensor:
    """Return the sharded tensor of which each process gives its part, sharing its memory.

    Args:
        part: What this process holds, in the shape of ``local_part(like)``.
        like: A tensor that is sharded as wanted; where it is whole, so is the part.
    """
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def reduce_scatter_into(total: Tensor, addend: Tensor, *, used: Tensor) -> None:
    """Add to each process' part of a sum what all ranks with different data have for it.

    Collective, unless each process computes its own part alone (tensor parallelism) or the sum is
    whole. Parts may be uneven, also empty. It needs memory for a copy of the addend.

    Args:
        total: The sum, sharded like its parameter; a whole one is added to as it is, without the
            other ranks.
        addend: What this process has found, in the shape of ``local_part(used)``.
        used: The parameter as a forward sees it: whole under FSDP2, this process' part under
            tensor parallelism, which no rank with other data shares.
    """
    if not is_dtensor(total):
        total += addend
        return
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, placements = total.device_mesh, total.placements  # type: ignore[attr-defined]
    data = _data_axes(total, used)
    part = local_part(total)
    if data:
        if len(data) < mesh.ndim:
            mesh = mesh[tuple(_axes(total)[i] for i in data)]
        # A strided shard is an ordinary one of what tensor parallelism has left.
        dims = [getattr(placements[i], "dim", None) for i in data]
        wanted = [Replicate() if dim is None else Shard(dim) for dim in dims]
        pending = DTensor.from_local(addend, mesh, [Partial()] * len(data), run_check=False)
        addend = pending.redistribute(placements=wanted).to_local()
    part += addend


def operand(tensor: Tensor, used: Tensor, axes: Mapping[int, int]) -> Tensor:
    """Return what a process needs of an activation for the gradient of its part of a parameter.

    Collective where the tensor is sharded in another way, which it is not in a Linear that is
    column- or row-parallel.

    Args:
        tensor: Input, or gradient of the output, of an operation with the parameter.
        used: The parameter as the forward used it.
        axes: Which axis of the tensor goes along each axis of the parameter; axes of the parameter
            that the tensor does not have are left out. For the input [..., I] of a Linear {1: -1},
            for the gradient [..., O] of its output {0: -1}.
    """
    if not is_dtensor(used) or not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate, Shard

    dims: list[Any] = [getattr(p, "dim", None) for p in used.placements]  # type: ignore[attr-defined]
    wanted = [Shard(axes[dim] % tensor.ndim) if dim in axes else Replicate() for dim in dims]
    return local_part(tensor.redistribute(placements=wanted))  # type: ignore[attr-defined]


def own_rows(used: Tensor) -> range:
    """Return which of the first axis' entries this process holds, for an embedding's indices."""
    return own_entries(used)[0]


def own_entries(tensor: Tensor) -> tuple[range, ...]:
    """Return along each axis which entries of a tensor this process holds."""
    if not is_dtensor(tensor):
        return tuple(map(range, tensor.shape))
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    found = []
    for axis, size in enumerate(tensor.shape):
        along = [p if getattr(p, "dim", None) == axis else Replicate() for p in placements]
        shape = [1] * axis + [size] + [1] * (tensor.dim() - axis - 1)
        numbers = torch.arange(size, device=tensor.device).view(shape)
        every = DTensor.from_local(numbers, mesh, [Replicate()] * mesh.ndim, run_check=False)
        here = local_part(every.redistribute(placements=along)).flatten()
        found.append(range(int(here[0]), int(here[-1]) + 1) if len(here) else range(0))
    return tuple(found)


def is_summed_over_data(total: Tensor, used: Tensor) -> bool:
    """Return whether :func:`reduce_scatter_into` adds up what all ranks have for a sum.

    Args:
        total: The sum, sharded like its parameter.
        used: The parameter as a forward sees it.
    """
    return bool(_data_axes(total, used))


class UsedParameters:
    """The Parameters that a forward uses, by name, while this context lasts.

    FSDP2 puts whole ones in the place of the sharded ones when a unit's forward begins, and takes
    them out when it ends. Both are the same objects in every forward. Everything else is used as it
    is.

    Attributes:
        by_name: The used parameter by the name in ``model.named_parameters()``. Before a unit's
            first forward its sharded one stands here.
    """

    def __init__(self, model: nn.Module) -> None:
        """Set up the watch over a model; what one context has found out, a later one knows."""
        self._model = model
        self._handles: list[Any] = []
        self.by_name: dict[str, nn.Parameter] = {}
        self._stored: dict[str, nn.Parameter] = {}
        self._names: dict[int, str] = {}
        self._units: list[tuple[Any, list[_Place], list[_Place]]] = []
        self._gathered: list[Any] = []
        self._usual: list[Any] = []

    def name_of(self, tensor: Tensor) -> str | None:
        """Return the name of the parameter that a tensor is, sharded or as used; None for none."""
        return self._names.get(id(tensor))

    def __enter__(self) -> UsedParameters:
        """Begin to watch."""
        reshard(self._model)
        self._stored = dict(self._model.named_parameters())
        self.by_name = {**self._stored, **self.by_name}
        self._names |= {id(parameter): name for name, parameter in self._stored.items()}
        self._units = self._units or self._find_units()
        for unit, places, own in self._units:
            # Before FSDP2's own hook, and after it.
            before = unit.register_forward_pre_hook(self._note(own), prepend=True)
            after = unit.register_forward_pre_hook(self._look_at(places))
            self._handles += [before, after]
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop watching, with all parameters sharded again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        reshard(self._model)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Make the block, a forward, one that all ranks get through, whatever it raises on this.

        Parameters are sharded when it begins. Where it fails, what the other ranks still gather in
        theirs is gathered here as well, in the order of the forwards before.
        """
        reshard(self._model)
        self._gathered = []
        try:
            yield
        except Exception:
            reshard(self._model)
            for unit in self._usual[len(self._gathered) :]:
                unit.unshard()
                unit.reshard()
            raise
        self._usual = self._gathered

    def _find_units(self) -> list[tuple[Any, list[_Place], list[_Place]]]:
        """Return what FSDP2 makes whole together, with the places in it, and those of its own."""
        units = []
        for unit in fsdp_units(self._model):
            inner = {module for other in fsdp_units(unit)[1:] for module in other.modules()}
            own = self._places(module for module in unit.modules() if module not in inner)
            units.append((unit, self._places(unit.modules()), own))
        return units

    def _places(self, modules: Iterable[nn.Module]) -> list[_Place]:
        """Return where the parameters of modules are, each with its name in the model."""
        return [
            (module, attribute, self._names[id(parameter)])
            for module in modules
            for attribute, parameter in module._parameters.items()
            if parameter is not None
        ]

    def _note(self, own: list[_Place]) -> _Hook:
        """Return what notes that a unit is about to be made whole, if it is not."""

        def note(unit: nn.Module, args: tuple[Any, ...]) -> None:
            if any(module._parameters[key] is self._stored[name] for module, key, name in own):
                self._gathered.append(unit)

        return note

    def _look_at(self, places: list[_Place]) -> _Hook:
        """Return what learns the used parameters of a unit that is whole."""

        def look(unit: nn.Module, args: tuple[Any, ...]) -> None:
            for module, attribute, name in places:
                parameter = module._parameters[attribute]
                assert parameter is not None
                self._names[id(parameter)] = name
                if parameter is not self._stored[name]:  # an inner unit's is still sharded
                    self.by_name[name] = parameter

        return look


def _data_axes(total: Tensor, used: Tensor) -> list[int]:
    """Return the axes of a sum's mesh along which the ranks have different data."""
    if not is_dtensor(total):
        return []
    parallel = _axes(used) if is_dtensor(used) else ()
    return [i for i, name in enumerate(_axes(total)) if name not in parallel]


def _axes(tensor: Any) -> tuple[Any, ...]:
    """Return the names of the axes of a sharded tensor's mesh; numbers where they have none."""
    mesh = tensor.device_mesh
    return tuple(mesh.mesh_dim_names or range(mesh.ndim))
