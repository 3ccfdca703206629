from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_merge.errors import InputError
from lit_merge.report.alignment_record import AlignedUnits, read_alignment

CONTENT: dict[str, Any] = {
    "format_version": 1,
    "reference": "left",
    "groups": {
        "left": {"base": "runs/l", "experts": {"mnist": "runs/mnist"}},
        "right": {"base": "runs/r", "experts": {"kmnist": "runs/k", "fashion": "runs/f"}},
    },
    "settings": {"by": "both"},
    "objective": {"before": 10.0, "after": 40.0},
    "symmetries": [
        {
            "name": "fc1.weight[0]",
            "size": 6,
            "moved": {"left": 0, "right": 5},
            "similarity": {"left": [1.0, 1.0], "right": [0.1, 0.7]},
        },
        {
            "name": "fc2.weight[0]",
            "size": 2,
            "moved": {"left": 0, "right": 2},
            "similarity": {"left": [1.0, 1.0], "right": [-0.3, 0.3]},
        },
        {
            "name": "fc3.weight[0]",
            "size": 9,
            "moved": {"left": 0, "right": 0},
            "similarity": {"left": None, "right": None},
        },
    ],
}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_units_are_read_by_symmetry_and_group_without_the_reference(tmp_path: Path) -> None:
    record = read_alignment(write(tmp_path / "align.json", CONTENT))
    assert record.name == str(tmp_path)
    assert record.groups == {"left": ("mnist",), "right": ("kmnist", "fashion")}
    assert (record.before, record.after) == (10.0, 40.0)
    assert record.units == (
        AlignedUnits("fc1.weight[0]", 6, "right", 5, 0.1, 0.7),
        AlignedUnits("fc2.weight[0]", 2, "right", 2, -0.3, 0.3),
        AlignedUnits("fc3.weight[0]", 9, "right", 0, None, None),
    )


def test_similarity_is_the_mean_over_the_units_that_were_compared(tmp_path: Path) -> None:
    record = read_alignment(write(tmp_path / "align.json", CONTENT))
    units = [(0.1, 0.7)] * 6 + [(-0.3, 0.3)] * 2
    expected = tuple(sum(pair[i] for pair in units) / len(units) for i in (0, 1))
    assert record.similarity() == pytest.approx(expected)
    nothing = {**CONTENT, "symmetries": CONTENT["symmetries"][2:]}
    assert read_alignment(write(tmp_path / "none.json", nothing)).similarity() is None


def damaged(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content = copy.deepcopy(CONTENT)
    change(content)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (damaged(lambda c: c.pop("objective")), r"got a damaged one \(KeyError: 'objective'"),
        (damaged(lambda c: c["groups"].update(left=3)), r"got a damaged one \(TypeError"),
        (damaged(lambda c: c["symmetries"][0]["moved"].pop("right")), r"\(KeyError: 'right'"),
        (damaged(lambda c: c["symmetries"][0].update(similarity=[1])), "damaged"),
        (
            damaged(lambda c: c["symmetries"][1]["similarity"].update(right=[0.1, float("nan")])),
            "nan is no finite number",
        ),
        (damaged(lambda c: c.update(format_version=2)), "format_version 1; got 2"),
        (damaged(lambda c: c.update(format_version=True)), "format_version 1; got True"),
    ],
)
def test_a_damaged_record_is_refused_by_name(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "align.json", content)
    with pytest.raises(InputError, match=message) as caught:
        read_alignment(path)
    assert str(path) in str(caught.value)
