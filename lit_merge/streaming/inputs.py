"""What goes into a merge: base, experts and Hessians under one set of names, read slice by slice.

The names are the base's (the first expert's where there is no base). Everything that headers can
tell is checked when the inputs are opened; what only the data can tell, when it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from lit_merge.checkpoint import Checkpoint
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo
from lit_merge.methods import MergeMethod, ParameterSlice


@dataclass(frozen=True)
class MergeInputs:
    """Opened inputs, renamed onto one set of names.

    Attributes:
        base: The base's weights, or None.
        experts: The experts' weights by task.
        hessians: The experts' Hessians by task; experts without one are absent.
        base_hessian: The base's Hessian, or None.
        infos: What is known of each expert, by task; its parameter names are the base's.
        fingerprints: Of the experts' weights by task, as in
            :func:`lit_merge.checkpoint.fingerprint`; empty for state dicts.
        base_fingerprint: Of the base's weights; None without a base, or for state dicts.
        notes: What a user should be told about how the inputs were taken.
    """

    base: Checkpoint | None
    experts: Mapping[str, Checkpoint]
    hessians: Mapping[str, Checkpoint]
    base_hessian: Checkpoint | None
    infos: Mapping[str, ExpertInfo]
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    base_fingerprint: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The experts' task names, in order."""
        return tuple(self.experts)

    @property
    def reference(self) -> Checkpoint:
        """What the merge takes its names from: the base, or the first expert."""
        return self.base if self.base is not None else next(iter(self.experts.values()))

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of parameters that some expert declares to be of its head."""
        return _union(info.head_parameters for info in self.infos.values())

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of parameters that every expert declares not to have changed."""
        first, *others = (info.frozen_parameters for info in self.infos.values())
        return tuple(name for name in first if all(name in other for other in others))

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Groups of names that some expert declares to be one tensor."""
        return _union(info.tied_parameters for info in self.infos.values())

    def require(self, method: MergeMethod) -> None:
        """Check that everything is there that a method needs, as far as headers tell.

        Raises:
            InputError: The method's settings do not fit the tasks, or base or Hessians are missing.
        """
        method.check_tasks(self.tasks)
        name = type(method).__name__
        if "base" in method.needs and self.base is None:
            raise InputError(
                f"base: must be given for {name}, which merges task vectors; got None. Give the "
                f"base that the experts were fine-tuned from."
            )
        for task, expert in self.experts.items():
            if "hessian" in method.needs and task not in self.hessians:
                raise InputError(
                    f"{expert.path}: must have a Hessian for {name} (task {task!r}); got none. Run "
                    f'"lit-merge curvature" on these weights, or choose a method that needs none.'
                )

    def read(
        self,
        names: Sequence[str],
        start: int,
        stop: int,
        *,
        method: MergeMethod,
        shape: tuple[int, ...] | None = None,
    ) -> ParameterSlice:
        """Read the same elements from every model, in the precision to compute in, and check them.

        Args:
            names: The tensor's name; then its other names where weights are tied, one of which may
                stand in its place in an input.
            start: The first flat element.
            stop: The one after the last.
            method: Whose needs are read: its base, its Hessians.
            shape: What to give the slice; flat when None.

        Returns:
            A slice of float64 where a model has float64, else of float32, on the reference's
            device.

        Raises:
            InputError: A value is NaN or infinite, or a Hessian's negative; names file, tensor,
                index.
        """
        models = [] if self.base is None else [self.base]
        models += self.experts.values()
        dtypes = {model.infos[stored_name(model, names)].dtype for model in models}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        device = self.reference.read(stored_name(self.reference, names), 0, 0).device

        def take(checkpoint: Checkpoint, *, hessian: bool = False) -> Tensor:
            name = stored_name(checkpoint, names)
            stored = checkpoint.read(name, start, stop)
            values = stored.to(device=device, dtype=dtype)
            check_values(values, checkpoint, name, start, hessian=hessian)
            for other in names:
                if other != name and other in checkpoint and not hessian:
                    _check_tied(stored, checkpoint, name, other, start)
            return values if shape is None else values.reshape(shape)

        experts = tuple(take(expert) for expert in self.experts.values())
        wants_hessian = "hessian" in method.needs
        return ParameterSlice(
            name=names[0],
            tasks=self.tasks,
            experts=experts,
            base=take(self.base) if self.base is not None and "base" in method.needs else None,
            hessians=tuple(take(self.hessians[task], hessian=True) for task in self.tasks)
            if wants_hessian
            else None,
            base_hessian=take(self.base_hessian, hessian=True)
            if wants_hessian and self.base_hessian is not None
            else None,
        )


def stored_name(checkpoint: Checkpoint, names: Sequence[str]) -> str:
    """Return the first of a tensor's names that a checkpoint has; the first where it has none."""
    return next((name for name in names if name in checkpoint), names[0])


def check_values(
    values: Tensor, checkpoint: Checkpoint, name: str, start: int, *, hessian: bool = False
) -> None:
    """Check what was read of a tensor.

    Args:
        values: Flat elements, of a floating type.
        checkpoint: Where they come from.
        name: The tensor there.
        start: The flat position of the first.
        hessian: Whether they are a Hessian's, and must not be negative either.

    Raises:
        InputError: One is NaN, infinite or negative; names file, tensor and index.
    """
    good = all_finite(values)
    if good and not (hessian and values.numel() and bool(values.min() < 0)):
        return
    first = int((values < 0).nonzero()[0]) if good else first_not_finite(values)
    index = unravel(start + first, checkpoint.infos[name].shape)
    must = "must not be negative" if good else "must be finite"
    fix = "Take a checkpoint from before the training diverged."
    if hessian:
        fix = "Check the loss on the training data, and compute sums of squared gradients again."
    raise InputError(
        f"{checkpoint.file_of(name)}: tensor {name!r} {must}; got {values[first].item():g} at "
        f"{index}. {fix}"
    )


def all_finite(values: Tensor) -> bool:
    """Return whether there is no NaN and no infinity, for the cost of a sum."""
    wide = values if values.dtype == torch.float64 else values.float()
    # Sums carry NaN and infinity; only one that overflows has to be looked at entry by entry.
    return bool(torch.isfinite(wide.sum())) or bool(torch.isfinite(wide).all())


def first_not_finite(values: Tensor) -> int:
    """Return the flat position of the first NaN or infinity."""
    return int((~torch.isfinite(values.double())).flatten().nonzero()[0])


def _check_tied(values: Tensor, checkpoint: Checkpoint, name: str, other: str, start: int) -> None:
    if not torch.equal(checkpoint.read(other, start, start + values.numel()), values):
        raise InputError(
            f"{checkpoint.file_of(other)}: tied tensors {name!r} and {other!r} must be equal; got "
            f"different values. Take models in which they are tied, or correct tied_parameters in "
            f"expert.json."
        )


def unravel(position: int, shape: Sequence[int]) -> list[int]:
    """Return the index of a flat position.

    >>> unravel(7, (2, 3, 4))
    [0, 1, 3]
    """
    index: list[int] = []
    for size in reversed(shape):
        index.insert(0, position % size)
        position //= size
    return index


_T = TypeVar("_T")


def _union(groups: Iterable[tuple[_T, ...]]) -> tuple[_T, ...]:
    return tuple(dict.fromkeys(item for group in groups for item in group))
