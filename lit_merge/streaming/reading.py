"""Reading the same piece of every model: into buffers that are used again, checked, widened.

What is read is not copied more than once: from the disk into a buffer, and from there into one of
the type to compute in, unless it is of that type already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lit_merge.checkpoint import Checkpoint
from lit_merge.errors import InputError
from lit_merge.methods import MergeMethod, ParameterSlice
from lit_merge.streaming.inputs import KRONECKER_SIDES, MergeInputs, stored_name
from lit_merge.streaming.values import check_hessian, check_values, equal

_CPU = torch.device("cpu")
_Whole: TypeAlias = tuple[object, torch.dtype, str]
_Part: TypeAlias = tuple[object, torch.dtype, str, int]


class PieceReader:
    """Reads piece after piece; one per thread.

    Slices share memory with the reader's buffers: they hold until the next :meth:`open`.

    Args:
        inputs: What is read.
        device: Where to compute.
        accumulate: The least type to compute in; float64 tensors are always computed in float64.
    """

    def __init__(
        self,
        inputs: MergeInputs,
        *,
        device: torch.device,
        accumulate: torch.dtype = torch.float32,
    ) -> None:
        self._inputs = inputs
        self._device = device
        self._accumulate = accumulate
        self._buffers: dict[_Whole, Tensor] = {}
        self._typed: dict[_Part, Tensor] = {}
        self._stored: dict[object, str] = {}
        self._taken: dict[object, Tensor] = {}
        self._checked: set[object] = set()
        self._names: Sequence[str] = ()
        self._start = self._stop = 0
        self._dtype = accumulate
        self._coarse = False

    def open(self, names: Sequence[str], start: int, stop: int) -> None:
        """Go to a piece.

        Args:
            names: The tensor's name; then its other names where weights are tied, one of which may
                stand in its place in an input.
            start: The first flat element.
            stop: The one after the last.
        """
        self._start, self._stop = start, stop
        self._taken.clear()
        self._checked.clear()
        if names == self._names:
            return
        self._names = names
        self._stored.clear()
        inputs = self._inputs
        models = [*inputs.experts.values(), *((inputs.base,) if inputs.base is not None else ())]
        found = [model.infos.get(self._name_in(model)) for model in models]
        stored = {info.dtype for info in found if info is not None}  # what is kept may be in one
        self._dtype = torch.float64 if torch.float64 in stored else self._accumulate
        self._coarse = all(dtype.itemsize <= 2 for dtype in stored)

    def slice(
        self,
        method: MergeMethod,
        *,
        shape: tuple[int, ...],
        whole: bool,
        check: bool = True,
        fact: Any = None,
    ) -> ParameterSlice:
        """Return what a method needs of the piece.

        Args:
            method: Whose needs are read: its base, its Hessians.
            shape: The whole tensor's.
            whole: Whether the slice is given that shape; flat otherwise.
            check: Whether values must be looked at for NaN and infinity before they are merged.
                Hessians are checked for negative values and NaN in any case.
            fact: What the method's survey found.

        Returns:
            A slice on the device to compute on.

        Raises:
            InputError: A value cannot be used; names file, tensor and index.
        """
        inputs = self._inputs
        has_base = inputs.base is not None and "base" in method.needs
        by_curvature = "hessian" in method.needs

        def weights(checkpoint: Checkpoint, key: object) -> Tensor:
            values = self._take(checkpoint, key)
            if check and key not in self._checked:
                check_values(values, checkpoint, self._name_in(checkpoint), self._start)
                self._checked.add(key)
            return values.view(shape) if whole else values

        def curvature(checkpoint: Checkpoint, key: object) -> Tensor:
            values = self._take(checkpoint, key)
            if key not in self._checked:
                name = self._name_in(checkpoint)
                check_hessian(values, checkpoint, name, self._start, finite=check)
                self._checked.add(key)
            return values.view(shape) if whole else values

        return ParameterSlice(
            name=self._names[0],
            tasks=inputs.tasks,
            experts=tuple(weights(e, ("expert", task)) for task, e in inputs.experts.items()),
            base=weights(inputs.base, "base") if has_base and inputs.base is not None else None,
            hessians=tuple(
                curvature(inputs.hessians[task], ("hessian", task)) for task in inputs.tasks
            )
            if by_curvature
            else None,
            base_hessian=curvature(inputs.base_hessian, "base hessian")
            if by_curvature and inputs.base_hessian is not None
            else None,
            grams=self._grams() if "gram" in method.needs else None,
            kronecker=self._kronecker() if "kronecker" in method.needs else None,
            start=self._start,
            shape=None if whole else shape,
            coarse=self._coarse,
            fact=fact,
        )

    def check_weights(self, method: MergeMethod) -> None:
        """Look for a NaN or an infinity in everything that a method has read of the piece.

        Raises:
            InputError: There is one; names file, tensor and index.
        """
        inputs = self._inputs
        for task, expert in inputs.experts.items():
            self._check_taken(expert, ("expert", task))
        if inputs.base is not None:
            self._check_taken(inputs.base, "base")
        if "hessian" in method.needs:
            for task, hessian in inputs.hessians.items():
                self._check_taken(hessian, ("hessian", task))
            if inputs.base_hessian is not None:
                self._check_taken(inputs.base_hessian, "base hessian")

    def stored(self, checkpoint: Checkpoint, name: str, start: int, stop: int) -> Tensor:
        """Return elements in the type in which they are stored, in a buffer."""
        info = checkpoint.infos[name]
        return checkpoint.read(name, start, stop, self._buffer("stored", info.dtype, stop - start))

    def same_values(self, reference: Tensor, checkpoint: Checkpoint, name: str, start: int) -> bool:
        """Return whether a model has these values, stored in a type of its own."""
        stop = start + reference.numel()
        buffer = self._buffer("other", checkpoint.infos[name].dtype, reference.numel())
        values = checkpoint.read(name, start, stop, buffer)
        return equal(reference.to(values.dtype), values)

    def _check_taken(self, checkpoint: Checkpoint, key: object) -> None:
        if key in self._taken:
            name = self._name_in(checkpoint)
            check_values(self._taken[key], checkpoint, name, self._start)

    def _take(self, checkpoint: Checkpoint, key: object) -> Tensor:
        """Return the piece of one model in the type to compute in, read once."""
        if key in self._taken:
            return self._taken[key]
        name = self._name_in(checkpoint)
        numel = self._stop - self._start
        dtype = checkpoint.infos[name].dtype
        buffer = self._buffer(key, dtype, numel)
        stored = checkpoint.read(name, self._start, self._stop, buffer)
        if "hessian" not in str(key):
            self._check_tied(checkpoint, name, stored)
        values = stored
        if stored.dtype != self._dtype or stored.device != self._device:
            values = self._buffer(key, self._dtype, numel, self._device).copy_(stored)
        self._taken[key] = values
        return values

    def _check_tied(self, checkpoint: Checkpoint, name: str, stored: Tensor) -> None:
        for other in self._names:
            if other == name or other not in checkpoint:
                continue
            buffer = self._buffer("tied", checkpoint.infos[other].dtype, stored.numel())
            if not equal(checkpoint.read(other, self._start, self._stop, buffer), stored):
                raise InputError(
                    f"{checkpoint.file_of(other)}: tied tensors {name!r} and {other!r} must be "
                    f"equal; got different values. Take models in which they are tied, or correct "
                    f"tied_parameters in expert.json."
                )

    def _grams(self) -> tuple[Tensor, ...] | None:
        grams = self._inputs.grams
        if not all(self._present(grams[task]) for task in self._inputs.tasks):
            return None
        return tuple(
            self._block(grams[task], stored_name(grams[task], self._names))
            for task in self._inputs.tasks
        )

    def _kronecker(self) -> tuple[tuple[Tensor, Tensor], ...] | None:
        factors = self._inputs.kronecker
        found = []
        for task in self._inputs.tasks:
            name = next((n for n in self._names if f"{n}.input" in factors[task]), None)
            if name is None:
                return None
            one, two = (self._block(factors[task], f"{name}.{side}") for side in KRONECKER_SIDES)
            found.append((one, two))
        return tuple(found)

    def _present(self, checkpoint: Checkpoint) -> bool:
        return any(name in checkpoint for name in self._names)

    def _block(self, checkpoint: Checkpoint, name: str) -> Tensor:
        values = checkpoint.tensor(name).to(device=self._device, dtype=self._dtype)
        check_values(values.flatten(), checkpoint, name, 0)
        return values

    def _name_in(self, checkpoint: Checkpoint) -> str:
        """Return the name of the tensor in one of the inputs."""
        found = self._stored.get(id(checkpoint))
        if found is None:
            found = self._stored[id(checkpoint)] = stored_name(checkpoint, self._names)
        return found

    def _buffer(
        self, key: object, dtype: torch.dtype, numel: int, device: torch.device = _CPU
    ) -> Tensor:
        """Return a tensor that is the same memory each time it is asked for."""
        mine = (key, dtype, device.type, numel)
        buffer = self._typed.get(mine)
        if buffer is None:
            whole = self._buffers.get(mine[:3])
            if whole is None or whole.numel() < numel:
                pinned = self._device.type == "cuda" and device.type == "cpu"
                whole = torch.empty(numel, dtype=dtype, device=device, pin_memory=pinned)
                self._buffers[mine[:3]] = whole
                # Parts of what was replaced would keep it alive.
                self._typed = {k: v for k, v in self._typed.items() if k[:3] != mine[:3]}
            buffer = self._typed[mine] = whole[:numel]
        return buffer
