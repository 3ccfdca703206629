"""What goes into a merge: base, experts and their curvature under one set of names.

The names are the base's (the first expert's where there is no base). Everything that headers can
tell is checked when the inputs are opened; what only the data can tell, when it is read
(:mod:`lit_merge.streaming.reading`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from lit_merge.checkpoint import Checkpoint
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo
from lit_merge.methods import MergeMethod


@dataclass(frozen=True)
class MergeInputs:
    """Opened inputs, renamed onto one set of names.

    Attributes:
        base: The base's weights, or None.
        experts: The experts' weights by task.
        hessians: The experts' Hessians by task; experts without one are absent.
        base_hessian: The base's Hessian, or None.
        grams: The Gram matrices of the experts' inputs by task, likewise.
        kronecker: The Kronecker factors of the experts' Hessians by task, likewise.
        merges: For each task whose expert is a merged folder, how many experts it is made of.
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
    grams: Mapping[str, Checkpoint] = field(default_factory=dict)
    kronecker: Mapping[str, Checkpoint] = field(default_factory=dict)
    merges: Mapping[str, int] = field(default_factory=dict)

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

    @property
    def leaves(self) -> tuple[int, ...]:
        """How many experts each expert is made of: one, unless it is a merge itself."""
        return tuple(self.merges.get(task, 1) for task in self.tasks)

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
        kinds = {"hessian": self.hessians, "gram": self.grams, "kronecker": self.kronecker}
        for need in (need for need in kinds if need in method.needs):
            for task, expert in self.experts.items():
                if task not in kinds[need]:
                    raise InputError(
                        f"{expert.path}: must have {_KINDS[need][0]} for {name} (task {task!r}); "
                        f"got none. {_KINDS[need][1]}, or choose a method that needs none."
                    )


_RUN = 'Run "lit-merge curvature'
_KINDS = {
    "hessian": ("a Hessian", f'{_RUN}" on these weights'),
    "gram": (
        "Gram matrices of its inputs",
        f'{_RUN} --estimator none --gram true", or train it with the InputGrams callback',
    ),
    "kronecker": (
        "Kronecker factors of its Hessian",
        f"""{_RUN} --estimator none --kronecker true", or with the KroneckerFactors callback""",
    ),
}


KRONECKER_SIDES = ("input", "output")
"""What follows a weight's name in the names of its two factors."""


def stored_name(checkpoint: Checkpoint, names: Sequence[str]) -> str:
    """Return the first of a tensor's names that a checkpoint has; the first where it has none."""
    return next((name for name in names if name in checkpoint), names[0])


_T = TypeVar("_T")


def _union(groups: Iterable[tuple[_T, ...]]) -> tuple[_T, ...]:
    return tuple(dict.fromkeys(item for group in groups for item in group))
