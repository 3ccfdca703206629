"""What happens to each tensor of a merge, decided from headers alone and recorded.

=========== ==================================================================================
merge       the method computes it from the experts
average     the mean of the experts (running statistics of BatchNorm)
keep        the base's (the first expert's without a base): counters, frozen parameters
per-task    each expert keeps its own: heads
refuse      the merge stops
=========== ==================================================================================

A user's rules go before everything; then tied weights follow their leader, and the kind of the
tensor decides. What fits no rule is refused by name, never merged by chance.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, get_args

from lit_merge.checkpoint import Checkpoint, TensorInfo
from lit_merge.errors import InputError
from lit_merge.heads import detect_heads

__all__ = ["Action", "ParametersPolicy", "TensorPlan", "detect_heads", "plan_tensors"]

Action = Literal["merge", "keep", "average", "per-task", "refuse"]

_ACTIONS: tuple[str, ...] = get_args(Action)
# Modules that a task gets of its own, and those that only the base's own training needed.
_HEADS = frozenset(
    (
        "head",
        "heads",
        "classifier",
        "pre_classifier",
        "classification_head",
        "fc",
        "score",
        "qa_outputs",
    )
)
_PRETRAINING_HEADS = _HEADS | {"cls", "lm_head"}
_VOCABULARY = frozenset(("wte", "lm_head", "shared", "decoder"))
_RUNNING = ("running_mean", "running_var")


@dataclass(frozen=True)
class ParametersPolicy:
    """What a user decides about tensors that are no ordinary weights.

    Attributes:
        heads: What happens to the tensors of the experts' heads.
        rules: An action by pattern (``encoder.layer.0.*``); the first that matches decides, before
            any built-in rule.
        vocabulary: What happens to an embedding whose rows differ in number: "keep" the base's.
        buffers: What happens to the running statistics of BatchNorm.

    Raises:
        InputError: If a value is not one of those.
    """

    heads: Literal["per-task", "merge"] = "per-task"
    rules: Mapping[str, Action] = field(default_factory=dict)
    vocabulary: Literal["refuse", "keep"] = "refuse"
    buffers: Literal["average", "keep"] = "average"

    def __post_init__(self) -> None:
        choices = {
            "heads": ("per-task", "merge"),
            "vocabulary": ("refuse", "keep"),
            "buffers": ("average", "keep"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise InputError(
                    f"{key}: must be one of {', '.join(allowed)}; got {getattr(self, key)!r}. "
                    "Choose one of these."
                )
        for pattern, action in self.rules.items():
            if action not in _ACTIONS:
                near = difflib.get_close_matches(str(action), _ACTIONS, n=1)
                raise InputError(
                    f"rules[{pattern!r}]: must be one of {', '.join(_ACTIONS)}; got {action!r}. "
                    + (f"Did you mean {near[0]!r}?" if near else "Choose one of these.")
                )
        object.__setattr__(self, "rules", dict(self.rules))


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor.

    Attributes:
        name: In the base's naming.
        action: What is done.
        reason: Why, for the record.
        info: Shape and type in the output (for "per-task": of the first that has it).
        alias_of: The tensor that this one is tied to and equal to, or None.
    """

    name: str
    action: Action
    reason: str
    info: TensorInfo
    alias_of: str | None = None


def plan_tensors(
    base: Checkpoint | None,
    experts: Mapping[str, Checkpoint],
    *,
    heads: Collection[str] = (),
    frozen: Collection[str] = (),
    tied: Sequence[Sequence[str]] = (),
    policy: ParametersPolicy | None = None,
) -> tuple[TensorPlan, ...]:
    """Decide what happens to each tensor of the base and the experts.

    Args:
        base: The reference for names, shapes and types; None takes the first expert instead.
        experts: By task, under the base's names (:func:`lit_merge.checkpoint.aligned`).
        heads: Names of the tasks' heads.
        frozen: Names that no expert has trained.
        tied: Groups of names that are one tensor in every input.
        policy: What the user decides; None for the defaults.

    Returns:
        A plan per tensor: those of the reference in its order, then those that only experts have.

    Raises:
        InputError: If a tensor is missing, is there beyond the reference, differs in shape or
            cannot be computed with, and nothing says what to do with it; or if a rule fits no
            tensor.
    """
    if not experts:
        raise InputError("experts: must be at least one; got none. Name the experts to merge.")
    stage = _Stage(base, experts, frozenset(heads), frozenset(frozen), policy or ParametersPolicy())
    stage.check_names("heads", heads)
    stage.check_names("frozen", frozen)
    leaders = stage.leaders(tied)
    plans: dict[str, TensorPlan] = {}
    for name in sorted(stage.names, key=lambda n: n in leaders):  # leaders before those they lead
        if name in leaders:
            leader = plans[leaders[name]]
            rule = stage.rule(name)
            if rule is not None and rule.action != leader.action:
                raise InputError(
                    f"rules: must treat tied tensors alike; got {rule.action!r} for {name!r}, "
                    f"which is tied to {leader.name!r} ({leader.action}). Give both one action."
                )
            reason = f"tied to {leader.name}: {leader.reason}"
            plans[name] = TensorPlan(name, leader.action, reason, stage.info(name), leader.name)
        else:
            plans[name] = stage.plan(name)
    return tuple(plans[name] for name in stage.names)


class _Stage:
    """The inputs of one plan, with the names looked up once."""

    def __init__(
        self,
        base: Checkpoint | None,
        experts: Mapping[str, Checkpoint],
        heads: frozenset[str],
        frozen: frozenset[str],
        policy: ParametersPolicy,
    ) -> None:
        self.experts = experts
        self.heads = heads
        self.frozen = frozen
        self.policy = policy
        self.reference = next(iter(experts.values())) if base is None else base
        self.called = "the first expert" if base is None else "the base"
        every = (self.reference, *experts.values())
        self.names = tuple(dict.fromkeys(name for checkpoint in every for name in checkpoint))
        self.rules: dict[str, tuple[str, Action]] = {}
        for pattern, action in policy.rules.items():
            fitting = [name for name in self.names if fnmatchcase(name, pattern)]
            if not fitting:
                raise self._unknown(f"rules[{pattern!r}]: must fit a tensor", pattern)
            for name in fitting:
                self.rules.setdefault(name, (pattern, action))

    def check_names(self, key: str, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.names:
                raise self._unknown(f"{key}: must be names of tensors; got {name!r}", name)

    def leaders(self, tied: Sequence[Sequence[str]]) -> dict[str, str]:
        """Return the leader of each tied name: the first of its group that every input has."""
        found: dict[str, str] = {}
        holders = (self.reference, *self.experts.values())
        for group in tied:
            members = [name for name in self.names if name in group]
            leader = next((n for n in members if all(n in c for c in holders)), None)
            for name in members:
                if leader is None or name == leader:
                    continue
                mine, first = self.info(name), self.info(leader)
                if mine.shape != first.shape:
                    raise InputError(
                        f"{self._file(name)}: tied tensors must have one shape; got {name!r} "
                        f"{list(mine.shape)} and {leader!r} {list(first.shape)}. "
                        "Correct tied_parameters in expert.json."
                    )
                found[name] = leader
        return found

    def rule(self, name: str) -> TensorPlan | None:
        """Return what the user's rules say."""
        if name not in self.rules:
            return None
        pattern, action = self.rules[name]
        if action == "refuse":
            raise InputError(
                f"{self._file(name)}: tensor {name!r} is refused by the rule {pattern!r}; got it "
                "in the inputs. Remove the tensor or the rule."
            )
        if action in ("merge", "average"):
            self._require_everywhere(name)
            self._require_one_shape(name)
            self._require_real(name, f"Give the rule {pattern!r} the action keep.")
        if action == "keep" and name not in self.reference:
            raise InputError(
                f"{self._file(name)}: tensor {name!r} must be in {self.called} to be kept; got it "
                f"only in an expert. Give the rule {pattern!r} the action per-task."
            )
        return TensorPlan(name, action, f"rule {pattern}", self.info(name))

    def plan(self, name: str) -> TensorPlan:
        """Return what happens to a tensor that follows no other."""
        ruled = self.rule(name)
        if ruled is not None:
            return ruled
        info = self.info(name)

        def decided(action: Action, reason: str) -> TensorPlan:
            return TensorPlan(name, action, reason, info)

        declared = name in self.heads
        if declared and self.policy.heads == "per-task":
            return decided("per-task", "head of a task")
        if not declared and name not in self.reference and _is_in(_HEADS, name):
            return decided("per-task", f"head of a task, by its name, that {self.called} lacks")
        if not any(name in e for e in self.experts.values()) and _is_in(_PRETRAINING_HEADS, name):
            return decided("keep", f"head that only {self.called} has")
        if not (info.dtype.is_floating_point or info.dtype.is_complex):
            kind = str(info.dtype).removeprefix("torch.")
            if name in self.reference:
                return decided("keep", f"{kind} values are not weights")
            return decided("per-task", f"{kind} values, which {self.called} lacks")
        self._require_everywhere(name)
        shapes = self._shapes(name)
        if len(set(shapes)) > 1:
            if not declared and _is_in(_HEADS, name) and len({s[1:] for s in shapes}) == 1:
                return decided("per-task", "head of a task, by its name and its number of classes")
            if _is_vocabulary(name, shapes) and self.policy.vocabulary == "keep":
                return decided("keep", "vocabularies differ")
            self._require_one_shape(name)
        self._require_real(name, f"Give it a rule: {{{name}: keep}}.")
        if name in self.frozen:
            return decided("keep", "frozen in every expert")
        if self._is_running_statistic(name):
            return decided(self.policy.buffers, "running statistic of BatchNorm")
        return decided("merge", "weights of one shape")

    def _require_everywhere(self, name: str) -> None:
        if name not in self.reference:
            task, holder = next((t, e) for t, e in self.experts.items() if name in e)
            raise InputError(
                f"{holder.file_of(name)}: must hold only tensors of {self.called} "
                f"({self.reference.path}); got {name!r} beside them. If it is part of {task!r}'s "
                f"head, say so with the rule {{{name}: per-task}}."
            )
        for expert in self.experts.values():
            if name not in expert:
                lacking = [n for n in self.reference if n not in expert]
                more = f" and lacks {len(lacking) - 1} more" if len(lacking) > 1 else ""
                raise InputError(
                    f"{expert.path}: must hold every tensor of {self.called} "
                    f"({self.reference.path}); got none named {name!r}{more}. Take an expert of "
                    f"the same model, or give a rule: {{{name}: keep}}."
                )

    def _require_one_shape(self, name: str) -> None:
        wanted = self.info(name).shape
        for expert in self.experts.values():
            shape = expert.infos[name].shape
            if shape == wanted:
                continue
            fix = f"Take experts of one model, or give a rule: {{{name}: keep}} or per-task."
            if _is_vocabulary(name, (wanted, shape)):
                fix = 'Bring the vocabularies together, or set vocabulary: "keep" for the base\'s.'
            raise InputError(
                f"{expert.file_of(name)}: tensor {name!r} must have the shape {list(wanted)} of "
                f"{self.reference.file_of(name)}; got {list(shape)}. {fix}"
            )

    def _is_running_statistic(self, name: str) -> bool:
        module, _, kind = name.rpartition(".")
        siblings = (f"{module}.{k}" for k in ("num_batches_tracked", "weight", *_RUNNING))
        return kind in _RUNNING and any(s != name and s in self.reference for s in siblings)

    def _require_real(self, name: str, fix: str) -> None:
        for holder in (self.reference, *self.experts.values()):
            dtype = holder.infos[name].dtype
            if not dtype.is_floating_point:
                raise InputError(
                    f"{holder.file_of(name)}: tensor {name!r} must be of a real floating type to "
                    f"be merged; got {dtype}. {fix}"
                )

    def _shapes(self, name: str) -> list[tuple[int, ...]]:
        return [c.infos[name].shape for c in (self.reference, *self.experts.values())]

    def _first(self, name: str) -> Checkpoint:
        return next(c for c in (self.reference, *self.experts.values()) if name in c)

    def info(self, name: str) -> TensorInfo:
        return self._first(name).infos[name]

    def _file(self, name: str) -> object:
        return self._first(name).file_of(name)

    def _unknown(self, message: str, name: str) -> InputError:
        near = difflib.get_close_matches(name, self.names, n=3, cutoff=0.4)
        fix = f"Near are {', '.join(near)}." if near else f"The tensors are {_some(self.names)}."
        got = "" if "; got" in message else "; got none that it fits"
        return InputError(f"{message}{got}. {fix}")


def _is_in(modules: frozenset[str], name: str) -> bool:
    """Return whether a tensor is in one of the modules, none of them inside a numbered block."""
    for component in name.split(".")[:-1]:
        if component in modules:
            return True
        if component.isdigit():  # blocks.3.mlp.fc is no head
            return False
    return False


def _is_vocabulary(name: str, shapes: Iterable[tuple[int, ...]]) -> bool:
    """Return whether this is a table with a row per token, of different numbers of rows."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    named = module in _VOCABULARY or ("emb" in module and "pos" not in module)
    widths = {shape[1:] for shape in shapes}
    return named and len(widths) == 1 and len(widths.pop()) == 1


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
