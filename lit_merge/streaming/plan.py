"""What a merge will do: an action per tensor, and what will be written where.

Decided from headers, with one exception: a tensor that a method needs a Hessian for and that has
none is read, because it may be kept where no expert has changed it, and must be refused where one
has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lit_merge.checkpoint import TensorInfo
from lit_merge.errors import InputError
from lit_merge.methods import MergeMethod
from lit_merge.parameters import ParametersPolicy, TensorPlan, plan_tensors
from lit_merge.streaming.inputs import MergeInputs

CHUNK = 1 << 18
"""Elements that are read, merged and written at a time: small enough for the cache, large enough
that the calls do not count."""


@dataclass(frozen=True)
class MergePlan:
    """What will be done.

    Attributes:
        tensors: A plan per tensor, as :func:`lit_merge.parameters.plan_tensors` returns them.
        infos: What the merged model will hold, in order.
        heads: What will be written for each task that has tensors of its own.
        followers: Names of the tensors that are tied to a tensor, by that tensor's name.
        as_is: Names that a rule of the user keeps, whatever is in them.
        notes: What a user should be told about it.
    """

    tensors: tuple[TensorPlan, ...]
    infos: Mapping[str, TensorInfo]
    heads: Mapping[str, Mapping[str, TensorInfo]]
    followers: Mapping[str, tuple[str, ...]]
    as_is: frozenset[str]
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of what will be written."""
        written = [self.infos, *self.heads.values()]
        return sum(info.nbytes for infos in written for info in infos.values())

    def names(self, tensor: TensorPlan) -> tuple[str, ...]:
        """Return a tensor's name, then those of the tensors tied to it."""
        return (tensor.name, *self.followers.get(tensor.name, ()))

    def merged(self) -> Iterator[TensorPlan]:
        """Yield the tensors that the method computes; tied ones once."""
        for tensor in self.tensors:
            if tensor.action == "merge" and tensor.alias_of is None:
                yield tensor


def plan_merge(
    inputs: MergeInputs,
    method: MergeMethod,
    *,
    policy: ParametersPolicy,
    dtype: torch.dtype | None,
) -> MergePlan:
    """Decide what a merge does with every tensor.

    Args:
        inputs: What is merged.
        method: How.
        policy: What the user decides about tensors.
        dtype: The floating type to write; None to write every tensor in the reference's.

    Raises:
        InputError: The method lacks something it needs, a tensor fits no rule, or none is left to
            merge.
    """
    inputs.require(method)
    tensors = plan_tensors(
        inputs.base,
        inputs.experts,
        heads=inputs.heads,
        frozen=inputs.frozen,
        tied=inputs.tied,
        policy=policy,
    )
    followers: dict[str, tuple[str, ...]] = {}
    for tensor in tensors:
        if tensor.alias_of is not None:
            followers[tensor.alias_of] = (*followers.get(tensor.alias_of, ()), tensor.name)
    notes: list[str] = []
    if "hessian" in method.needs:
        tensors, unseen = _without_unseen(inputs, tensors, followers)
        if unseen:
            notes.append(
                f"kept as in {inputs.reference.path}, because no expert has changed them and a "
                f"Hessian has no entry: {', '.join(unseen)}"
            )
    if not any(tensor.action == "merge" for tensor in tensors):
        raise InputError(
            f"policy: must leave tensors to merge; got {len(tensors)} tensors, of which none is "
            f"merged. Relax the rules."
        )

    def cast(info: TensorInfo) -> TensorInfo:
        if dtype is None or not info.dtype.is_floating_point:
            return info
        return replace(info, dtype=dtype)

    own = [tensor.name for tensor in tensors if tensor.action == "per-task"]
    infos = {
        tensor.name: cast(tensor.info)
        for tensor in tensors
        if tensor.name in inputs.reference
        and (tensor.action != "per-task" or inputs.base is not None)
    }
    heads = {
        task: {name: cast(expert.infos[name]) for name in own if name in expert}
        for task, expert in inputs.experts.items()
    }
    return MergePlan(
        tensors=tensors,
        infos=infos,
        heads={task: tensors_of for task, tensors_of in heads.items() if tensors_of},
        followers=followers,
        as_is=frozenset(
            tensor.name
            for tensor in tensors
            if tensor.action == "keep"
            and any(
                fnmatchcase(name, pattern)
                for pattern in policy.rules
                for name in (tensor.name, tensor.alias_of or tensor.name)
            )
        ),
        notes=tuple(notes),
    )


def chunks(numel: int) -> Iterator[tuple[int, int]]:
    """Yield the flat ranges in which a tensor is gone through.

    >>> list(chunks(2 * CHUNK + 5))
    [(0, 262144), (262144, 524288), (524288, 524293)]
    """
    for start in range(0, numel, CHUNK):
        yield start, min(start + CHUNK, numel)


def same_values(reference: Tensor, values: Tensor) -> bool:
    """Return whether values are the reference's, stored in a type of their own."""
    return torch.equal(reference.to(values.dtype), values)


def _without_unseen(
    inputs: MergeInputs,
    tensors: tuple[TensorPlan, ...],
    followers: Mapping[str, tuple[str, ...]],
) -> tuple[tuple[TensorPlan, ...], list[str]]:
    """Keep tensors without a Hessian entry where no expert has changed them.

    Returns:
        The plans, and the names of those that are kept now.

    Raises:
        InputError: An expert has changed one, or the base's Hessian lacks a tensor to merge.
    """
    prior = inputs.base_hessian
    kept: list[str] = []
    unseen: list[tuple[TensorPlan, str]] = []
    for tensor in tensors:
        if tensor.action != "merge" or tensor.alias_of is not None:
            continue
        names = (tensor.name, *followers.get(tensor.name, ()))
        lacking = [t for t, h in inputs.hessians.items() if not any(n in h for n in names)]
        if lacking:
            unseen.append((tensor, lacking[0]))
            kept += names
        elif prior is not None and not any(n in prior for n in names):
            raise InputError(
                f"{prior.path}: must have an entry for tensor {tensor.name!r}; got none. Compute "
                f"the base's Hessian for all trained parameters, or leave base_hessian out."
            )
    for tensor, task in unseen:  # the only reading of data, after all that headers tell
        _require_unchanged(inputs, tensor, task)
    reason = "equal in all models, without an entry in a Hessian"
    now_kept = set(kept)
    plans = tuple(
        replace(tensor, action="keep", reason=reason) if tensor.name in now_kept else tensor
        for tensor in tensors
    )
    return plans, kept


def _require_unchanged(inputs: MergeInputs, tensor: TensorPlan, task: str) -> None:
    name = tensor.name
    for other, expert in inputs.experts.items():
        for start, stop in chunks(tensor.info.numel):
            reference = inputs.reference.read(name, start, stop)
            if not same_values(reference, expert.read(name, start, stop)):
                raise InputError(
                    f"{inputs.hessians[task].path}: must have an entry for tensor {name!r} (task "
                    f"{task!r}), which the expert of task {other!r} has changed; got none. Run "
                    f'"lit-merge curvature" for this parameter too, or give it a rule: '
                    f"{{{name}: keep}}."
                )
