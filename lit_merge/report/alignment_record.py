"""Reading ``align.json``: how alike the units of aligned models are, before and after.

The file is written by :mod:`lit_merge.align`, which says what is in it. Checked here is what is
shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_merge.errors import InputError
from lit_merge.evaluation.file import read_json_object

ALIGN_FILE = "align.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class AlignedUnits:
    """What was found for one symmetry in one group.

    Attributes:
        symmetry: The symmetry's name.
        size: Number of units that may change places.
        group: The group that was permuted.
        moved: How many of its units have another place now.
        before: How alike its units are to the reference's in their places, from −1 to 1, with
            nothing permuted; None where nothing was compared.
        after: The same at the end.
    """

    symmetry: str
    size: int
    group: str
    moved: int
    before: float | None
    after: float | None


@dataclass(frozen=True)
class AlignmentRecord:
    """What ``align.json`` says.

    Attributes:
        name: What to call the alignment: its folder.
        reference: The group into whose order the others were brought.
        groups: Names of the tasks by group.
        before: What was maximised, with nothing permuted.
        after: The same at the end.
        units: By symmetry and group, the reference left out.
        provenance: Settings and versions.
    """

    name: str
    reference: str
    groups: Mapping[str, tuple[str, ...]]
    before: float
    after: float
    units: tuple[AlignedUnits, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def similarity(self) -> tuple[float, float] | None:
        """Return how alike the compared units are on average, before and after; None for none."""
        found = [
            (one.size, one.before, one.after)
            for one in self.units
            if one.before is not None and one.after is not None
        ]
        total = sum(size for size, _, _ in found)
        if not total:
            return None
        return (
            sum(size * before for size, before, _ in found) / total,
            sum(size * after for size, _, after in found) / total,
        )


def read_alignment(path: str | Path) -> AlignmentRecord:
    """Read and check an ``align.json``.

    Raises:
        InputError: If the file is missing, no JSON, of another format, or an entry is wrong.
    """
    content = read_json_object(path)
    version = content.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(
            f"{path}: must be the record of an alignment with format_version {FORMAT_VERSION}; got "
            f'{version!r}. Give the align.json that "lit-merge align" wrote.'
        )
    try:
        reference = str(content["reference"])
        groups = {
            str(name): tuple(str(task) for task in group["experts"])
            for name, group in content["groups"].items()
        }
        objective = content["objective"]
        return AlignmentRecord(
            name=str(Path(path).parent),
            reference=reference,
            groups=groups,
            before=_finite(objective["before"]),
            after=_finite(objective["after"]),
            units=tuple(
                AlignedUnits(
                    str(symmetry["name"]),
                    int(symmetry["size"]),
                    group,
                    int(symmetry["moved"][group]),
                    *_pair(symmetry["similarity"][group]),
                )
                for symmetry in content["symmetries"]
                for group in groups
                if group != reference
            ),
            provenance={key: content[key] for key in ("settings", "versions") if key in content},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: must hold the record of an alignment; got a damaged one "
            f"({type(error).__name__}: {error}). Align again."
        ) from error


def _pair(values: Sequence[float] | None) -> tuple[float | None, float | None]:
    if values is None:
        return None, None
    before, after = values
    return _finite(before), _finite(after)


def _finite(value: float) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is no finite number")
    return number
