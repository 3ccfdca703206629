"""What a merge will do: an action per tensor, and what will be written where.

Decided from headers, with one exception: a tensor that a method needs a Hessian for and that has
none is read, because it may be kept where no expert has changed it, and must be refused where one
has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch

from lit_merge.checkpoint import TensorInfo
from lit_merge.errors import InputError
from lit_merge.methods import MergeMethod
from lit_merge.parameters import ParametersPolicy, TensorPlan, plan_tensors
from lit_merge.streaming.inputs import MergeInputs, stored_name
from lit_merge.streaming.overrides import Override, methods_of, with_rules
from lit_merge.streaming.pieces import Piece, chunks, pieces_of
from lit_merge.streaming.values import equal


@dataclass(frozen=True)
class MergePlan:
    """What will be done.

    Attributes:
        tensors: A plan per tensor, as :func:`lit_merge.parameters.plan_tensors` returns them.
        infos: What the merged model will hold, in order.
        heads: What will be written for each task that has tensors of its own.
        methods: What computes each tensor that is merged, by name.
        followers: Names of the tensors that are tied to a tensor, by that tensor's name.
        as_is: Names that a rule of the user keeps, whatever is in them.
        notes: What a user should be told about it.
    """

    tensors: tuple[TensorPlan, ...]
    infos: Mapping[str, TensorInfo]
    heads: Mapping[str, Mapping[str, TensorInfo]]
    methods: Mapping[str, MergeMethod]
    followers: Mapping[str, tuple[str, ...]]
    as_is: frozenset[str]
    notes: tuple[str, ...] = ()
    by_name: Mapping[str, TensorPlan] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {tensor.name: tensor for tensor in self.tensors})

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
            if tensor.name in self.methods:
                yield tensor

    def groups(self) -> list[tuple[MergeMethod, tuple[TensorPlan, ...]]]:
        """Return each method with the tensors that it merges."""
        by_method: dict[int, list[TensorPlan]] = {}
        for tensor in self.merged():
            by_method.setdefault(id(self.methods[tensor.name]), []).append(tensor)
        return [(self.methods[group[0].name], tuple(group)) for group in by_method.values()]

    def pieces(self, *, whole: frozenset[str] = frozenset()) -> list[Piece]:
        """Return all pieces of what is written, the merged model's first.

        Args:
            whole: Names that another plan over the same inputs wants whole.
        """
        whole |= {name for name, method in self.methods.items() if not method.elementwise}
        infos = {tensor.name: tensor.info for tensor in self.tensors}
        pieces = list(pieces_of(infos, whole=whole))
        for task, own in self.heads.items():
            pieces += pieces_of(own, task=task)
        return pieces


def plan_merge(
    inputs: MergeInputs,
    method: MergeMethod,
    *,
    policy: ParametersPolicy,
    dtype: torch.dtype | None,
    overrides: Mapping[str, Override] | None = None,
) -> MergePlan:
    """Decide what a merge does with every tensor.

    Args:
        inputs: What is merged.
        method: How.
        policy: What the user decides about tensors.
        dtype: The floating type to write; None to write every tensor in the reference's.
        overrides: What is different for some tensors, by pattern.

    Raises:
        InputError: A method lacks something it needs, a tensor fits no rule, or none is left to
            merge.
    """
    overrides = overrides or {}
    if not overrides:
        inputs.require(method)
    policy = with_rules(policy, overrides)
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
    leaders = [t.name for t in tensors if t.action == "merge" and t.alias_of is None]
    methods = methods_of(leaders, method, overrides)
    for used in {id(m): m for m in methods.values()}.values():
        inputs.require(used)
    for name, used in methods.items():
        _require_factors_alike(inputs, (name, *followers.get(name, ())), used)
    curved = {name for name, used in methods.items() if "hessian" in used.needs}
    if curved:
        tensors, unseen = _without_unseen(inputs, tensors, followers, curved)
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
        if task not in inputs.merges  # it brings the heads of its tasks, and has none of its own
    }
    return MergePlan(
        tensors=tensors,
        infos=infos,
        heads={task: tensors_of for task, tensors_of in heads.items() if tensors_of},
        methods={
            t.name: methods[t.name] for t in tensors if t.name in methods and t.action == "merge"
        },
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


def _require_factors_alike(
    inputs: MergeInputs, names: tuple[str, ...], method: MergeMethod
) -> None:
    """Check that a tensor has Gram matrices, or Kronecker factors, of all experts or of none."""
    kinds = {
        "gram": (inputs.grams, names),
        "kronecker": (inputs.kronecker, [f"{name}.input" for name in names]),
    }
    for kind in method.needs & kinds.keys():
        files, entries = kinds[kind]
        has = {task: any(n in files[task] for n in entries) for task in inputs.tasks}
        if any(has.values()) and not all(has.values()):
            task = next(task for task, there in has.items() if not there)
            raise InputError(
                f"{files[task].path}: must have an entry for tensor {names[0]!r}, as the other "
                f"experts' have; got none (task {task!r}). Gather it for the same layers of all "
                f"experts, or take another method for this tensor: overrides."
            )


def bytes_read(inputs: MergeInputs, plan: MergePlan) -> int:
    """Return the bytes that one reading of the inputs takes."""
    total = 0
    for tensor in plan.tensors:
        if tensor.action in ("merge", "average"):
            needs = plan.methods[tensor.name].needs if tensor.name in plan.methods else frozenset()
            sources = list(inputs.experts.values())
            if inputs.base is not None and "base" in needs:
                sources.append(inputs.base)
            if "hessian" in needs:
                sources += inputs.hessians.values()
                sources += [inputs.base_hessian] if inputs.base_hessian is not None else []
            names = plan.names(tensor)
            if tensor.alias_of is None:
                total += sum(source.infos[stored_name(source, names)].nbytes for source in sources)
        elif tensor.action == "keep":
            total += tensor.info.nbytes
    return total + sum(info.nbytes for own in plan.heads.values() for info in own.values())


def _without_unseen(
    inputs: MergeInputs,
    tensors: tuple[TensorPlan, ...],
    followers: Mapping[str, tuple[str, ...]],
    curved: set[str],
) -> tuple[tuple[TensorPlan, ...], list[str]]:
    """Keep tensors without a Hessian entry where no expert has changed them.

    Args:
        inputs: What is merged.
        tensors: The plans.
        followers: As in :class:`MergePlan`.
        curved: Names of tensors whose method weighs by the Hessian.

    Returns:
        The plans, and the names of those that are kept now.

    Raises:
        InputError: An expert has changed one, or the base's Hessian lacks a tensor to merge.
    """
    prior = inputs.base_hessian
    kept: list[str] = []
    unseen: list[tuple[TensorPlan, str]] = []
    for tensor in tensors:
        if tensor.name not in curved:
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
            values = expert.read(name, start, stop)
            if not equal(reference.to(values.dtype), values):
                raise InputError(
                    f"{inputs.hessians[task].path}: must have an entry for tensor {name!r} (task "
                    f"{task!r}), which the expert of task {other!r} has changed; got none. Run "
                    f'"lit-merge curvature" for this parameter too, or give it a rule: '
                    f"{{{name}: keep}}."
                )
