"""Other methods, scales and actions for some tensors: what a merge's ``overrides`` say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lit_merge.errors import InputError
from lit_merge.methods import MergeMethod
from lit_merge.parameters import Action, ParametersPolicy


@dataclass(frozen=True)
class Override:
    """What is different for the tensors that a pattern fits; give one of the three.

    Args:
        method: The method to merge them with.
        scale: The merge's own method with this scale, one number or one per task.
        action: "keep" or another action of the policy's rules.

    Raises:
        InputError: None of them is given, or more than one.
    """

    method: MergeMethod | None = None
    scale: float | dict[str, float] | None = None
    action: Action | None = None

    def __post_init__(self) -> None:
        given = [key for key in ("method", "scale", "action") if getattr(self, key) is not None]
        if len(given) != 1:
            raise InputError(
                f"overrides: must say one of method, scale and action for a pattern; got "
                f"{' and '.join(given) if given else 'none'}. Give one."
            )


def with_rules(policy: ParametersPolicy, overrides: Mapping[str, Override]) -> ParametersPolicy:
    """Return a policy with the actions of the overrides before its own rules.

    Raises:
        InputError: A pattern has an action in both.
    """
    actions = {
        pattern: override.action
        for pattern, override in overrides.items()
        if override.action is not None
    }
    for pattern in actions:
        if pattern in policy.rules:
            raise InputError(
                f"overrides[{pattern!r}]: must not be a rule of the policy too; got "
                f"{actions[pattern]!r} here and {policy.rules[pattern]!r} there. Remove one."
            )
    return dataclasses.replace(policy, rules={**actions, **policy.rules})


def methods_of(
    names: Sequence[str], method: MergeMethod, overrides: Mapping[str, Override]
) -> dict[str, MergeMethod]:
    """Return the method of every tensor; the first pattern that fits its name decides.

    Args:
        names: The tensors that are merged.
        method: Of all that no pattern fits.
        overrides: By pattern (``encoder.layer.0.*``).

    Raises:
        InputError: A pattern fits no merged tensor, or the method has no scale.
    """
    changed = {
        pattern: _method(pattern, method, override)
        for pattern, override in overrides.items()
        if override.action is None
    }
    for pattern in changed:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"overrides[{pattern!r}]: must fit a tensor that is merged; got none that it fits. "
                f'Run "lit-merge merge --plan" to see the names.'
            )
    return {
        name: next(
            (other for pattern, other in changed.items() if fnmatchcase(name, pattern)), method
        )
        for name in names
    }


def _method(pattern: str, method: MergeMethod, override: Override) -> MergeMethod:
    if override.method is not None:
        return override.method
    return with_setting(method, "scale", override.scale, f"overrides[{pattern!r}]")


def with_setting(method: MergeMethod, key: str, value: object, called: str) -> MergeMethod:
    """Return a method with one setting changed.

    Args:
        method: The method.
        key: The setting.
        value: Its new value.
        called: What to call it in a message.

    Raises:
        InputError: The method has no such setting, or not of this value.
    """
    made: Any = method
    settings = [f.name for f in dataclasses.fields(made)] if dataclasses.is_dataclass(made) else []
    if key not in settings:
        known = ", ".join(settings) if settings else "none"
        raise InputError(
            f"{called}: must name a setting of {type(method).__name__} ({known}); got {key!r}. "
            f"Give a method that has it."
        )
    changed: MergeMethod = dataclasses.replace(made, **{key: value})
    return changed
