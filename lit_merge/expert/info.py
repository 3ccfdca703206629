"""What ``expert.json`` says about an expert: whose curvature it is, of what, over how much.

The file is JSON of primitives. It carries the version of its format, so that a reader of another
version can say so instead of guessing.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lit_merge.checkpoint import is_inside
from lit_merge.checkpoint.regular_file import require_regular_file
from lit_merge.errors import InputError
from lit_merge.location import Location
from lit_merge.strict_json import parse_json

FORMAT_VERSION = 1

_TEXTS = ("task", "estimator", "labels", "fingerprint", "base_fingerprint")
_NAMES = ("head_parameters", "frozen_parameters")
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class ExpertInfo:
    """The contents of ``expert.json``.

    Attributes:
        task: Name of the task, or None when it was not said.
        estimator: Name of the estimator of the curvature; None without curvature.
        labels: "sampled" from the model or "observed" in the data; None where that makes no sense.
        num_examples: Training examples that the Hessian is the sum over.
        reduction: "sum" over the examples, the only one there is.
        fingerprint: Of the weights that the curvature belongs to; filled in by
            :func:`write_expert`.
        base_fingerprint: Of the weights that the training began with.
        head_parameters: Names of the parameters of the task's head.
        frozen_parameters: Names of the parameters that the training did not change.
        tied_parameters: Groups of names that are one tensor.
        weights: File or folder with the weights, inside the expert folder; "." for the folder.
        versions: Of lit_merge, torch and lightning; filled in by :func:`write_expert`.
        details: Anything else, as JSON: settings of the estimator, class of the module.

    Raises:
        InputError: If a value has the wrong type or cannot be meant.
    """

    task: str | None = None
    estimator: str | None = None
    labels: str | None = None
    num_examples: int | None = None
    reduction: str = "sum"
    fingerprint: str | None = None
    base_fingerprint: str | None = None
    head_parameters: tuple[str, ...] = ()
    frozen_parameters: tuple[str, ...] = ()
    tied_parameters: tuple[tuple[str, ...], ...] = ()
    weights: str = "model.safetensors"
    versions: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in _TEXTS:
            value = getattr(self, key)
            _require(value is None or isinstance(value, str), key, "a text or null", value)
        for key in ("fingerprint", "base_fingerprint"):
            value = getattr(self, key)
            _require(value is None or _is_hex(value), key, "64 hexadecimal digits", value)
        n = self.num_examples
        _require(n is None or (type(n) is int and n > 0), "num_examples", "a positive integer", n)
        _require(
            self.reduction == "sum",
            "reduction",
            '"sum" (a mean Hessian times num_examples)',
            self.reduction,
        )
        for key in _NAMES:
            object.__setattr__(self, key, _names(getattr(self, key), key))
        groups = self.tied_parameters
        _require(isinstance(groups, (tuple, list)), "tied_parameters", "a list of lists", groups)
        tied = tuple(_names(group, "tied_parameters") for group in groups)
        object.__setattr__(self, "tied_parameters", tied)
        _require(
            isinstance(self.weights, str) and (self.weights == "." or is_inside(self.weights)),
            "weights",
            "a path inside the expert folder",
            self.weights,
        )
        for key in ("versions", "details"):
            value = getattr(self, key)
            _require(isinstance(value, Mapping), key, "values by name", value)
            object.__setattr__(self, key, dict(value))

    def to_json(self) -> str:
        """Return the text of ``expert.json``.

        Raises:
            InputError: If ``details`` holds what JSON cannot.
        """
        try:
            content = {"format_version": FORMAT_VERSION, **asdict(self)}
            return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        except (TypeError, ValueError) as error:
            raise InputError(
                f"details: must hold only what JSON can; got {error}. Use numbers, texts and lists."
            ) from error


def read_info(path: Location) -> ExpertInfo:
    """Read ``expert.json``.

    Raises:
        InputError: If the file is damaged, of another format version, or has an unknown entry.
    """
    if isinstance(path, Path):
        require_regular_file(path)
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: must be JSON; got {error}. Write the expert folder again."
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: must hold entries by name; got a {type(content).__name__}. "
            "Write the expert folder again."
        )
    found = content.pop("format_version", None)
    if found != FORMAT_VERSION:
        raise InputError(
            f"{path}: must have format_version {FORMAT_VERSION}; got {found!r}. Use the lit-merge "
            "that wrote it, or write the expert folder again."
        )
    known = [f.name for f in fields(ExpertInfo)]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise InputError(
                f"{path}: must have only known entries; got {key!r}. "
                + (f"Did you mean {near[0]!r}?" if near else "Put it under details.")
            )
    try:
        return ExpertInfo(**content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def current_versions() -> dict[str, str]:
    """Return the versions of what computes here, without importing any of it."""
    return {name: _version(name) for name in ("lit_merge", "torch", "lightning")}


def _version(package: str) -> str:
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def _names(value: object, key: str) -> tuple[str, ...]:
    good = isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value)
    _require(good, key, "a list of names", value)
    return tuple(value) if isinstance(value, (tuple, list)) else ()


def _is_hex(value: str) -> bool:
    return len(value) == 64 and _HEX.issuperset(value)


def _require(good: bool, key: str, what: str, value: object) -> None:
    if not good:
        raise InputError(f"{key}: must be {what}; got {value!r}. Correct this entry.")
