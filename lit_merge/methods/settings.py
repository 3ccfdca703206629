"""Checks of the numbers that a method is configured with: alone, and one per task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from lit_merge.errors import InputError


def check_number(
    setting: str, value: object, *, low: float | None = None, high: float | None = None
) -> None:
    """Check one finite number.

    Args:
        setting: What to call it in the message, such as ``"TIES.density"``.
        value: The number.
        low: The least allowed value; None for any.
        high: The greatest allowed value; None for any.

    Raises:
        InputError: It is no finite number within the bounds.
    """
    bounds = {
        (False, False): "",
        (True, False): f" of at least {low}",
        (False, True): f" of at most {high}",
        (True, True): f" between {low} and {high}",
    }[low is not None, high is not None]
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or (low is not None and value < low)
        or (high is not None and value > high)
    ):
        raise InputError(f"{setting}: must be a finite number{bounds}; got {value!r}. Correct it.")


def check_count(setting: str, value: object) -> None:
    """Check a whole number of at least 1.

    Raises:
        InputError: It is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(
            f"{setting}: must be a whole number of at least 1; got {value!r}. Correct it."
        )


def check_choice(setting: str, value: object, choices: Sequence[str]) -> None:
    """Check that a setting is one of a few words.

    Raises:
        InputError: It is none of them.
    """
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise InputError(f"{setting}: must be one of {allowed}; got {value!r}. Correct it.")


def check_numbers(
    setting: str, values: object, *, low: float | None = None, high: float | None = None
) -> None:
    """Check one finite number per task, by task name or in order.

    Raises:
        InputError: There is none, or one of them is no finite number within the bounds.
    """
    if isinstance(values, str) or not isinstance(values, Mapping | Sequence):
        raise InputError(
            f"{setting}: must be a mapping from task name to number, or a list; got {values!r}. "
            f"Correct it."
        )
    if not values:
        raise InputError(f"{setting}: must have one number per task; got none. Add them.")
    named = values.items() if isinstance(values, Mapping) else enumerate(values)
    for key, value in named:
        check_number(f"{setting}[{key!r}]", value, low=low, high=high)


def check_scale(setting: str, scale: float | Mapping[str, float]) -> None:
    """Check a scale: one finite number, or one per task name.

    Raises:
        InputError: It is neither.
    """
    if isinstance(scale, Mapping):
        check_numbers(setting, scale)
    else:
        check_number(setting, scale)


def check_total(setting: str, values: Mapping[str, float] | Sequence[float]) -> None:
    """Check that weights, which will be divided by their sum, do not sum to zero.

    Raises:
        InputError: The sum is zero, or is zero but for rounding.
    """
    numbers = list(values.values() if isinstance(values, Mapping) else values)
    total = math.fsum(numbers)
    if abs(total) <= 1e-9 * math.fsum(map(abs, numbers)):
        raise InputError(
            f"{setting}: must not sum to zero; got {values!r}, which sums to {total:g}. "
            f"Give weights whose sum can be divided by."
        )


def per_task(
    setting: str, values: float | Mapping[str, float] | Sequence[float], tasks: Sequence[str]
) -> tuple[float, ...]:
    """Return one number per task, in the tasks' order.

    Args:
        setting: What to call it in a message.
        values: One number for all tasks, a mapping by task name, or one number per task in order.
        tasks: The experts' task names.

    Raises:
        InputError: A task is missing or unknown, or the number of values is not that of the tasks.

    Example:
        >>> per_task("scale", {"svhn": 0.5, "dtd": 1}, ["dtd", "svhn"])
        (1.0, 0.5)
        >>> per_task("scale", 0.3, ["dtd", "svhn"])
        (0.3, 0.3)
    """
    if isinstance(values, Mapping):
        known = ", ".join(repr(task) for task in tasks)
        for name in values:
            if name not in tasks:
                near = get_close_matches(str(name), tasks, n=1)
                fix = f"Did you mean {near[0]!r}?" if near else "Remove it or correct the name."
                raise InputError(
                    f"{setting}: must name the experts' tasks ({known}); got {name!r}. {fix}"
                )
        for task in tasks:
            if task not in values:
                raise InputError(
                    f"{setting}: must have a number for every task ({known}); got none for "
                    f"{task!r}. Add it."
                )
        return tuple(float(values[task]) for task in tasks)
    if isinstance(values, Sequence):
        if len(values) != len(tasks):
            raise InputError(
                f"{setting}: must have one number per expert, {len(tasks)}; got {len(values)}. "
                f"Correct it, or give a mapping by task name."
            )
        return tuple(float(value) for value in values)
    return (float(values),) * len(tasks)
