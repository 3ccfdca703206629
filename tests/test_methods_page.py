"""The page of methods names every method, with settings that exist and the defaults as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lit_merge import methods
from lit_merge.methods import MergeMethod, ParameterSlice

PAGE = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
NAMES = sorted(set(methods.__all__) - {MergeMethod.__name__, ParameterSlice.__name__})
CALLS = sorted(
    {" ".join(call.split()) for call in re.findall(rf"`((?:{'|'.join(NAMES)})\([^`]*\))`", PAGE)}
)


def built(call: str) -> MergeMethod:
    method = eval(call, {name: getattr(methods, name) for name in NAMES})
    assert isinstance(method, MergeMethod)
    return method


def section(title: str) -> str:
    """Return the page from a heading to the next of its level."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_in_the_table_and_explained(name: str) -> None:
    assert f"`{name}`" in section("What they need and cost")
    assert f"`{name}(" in section("What they compute")


@pytest.mark.parametrize("call", CALLS)
def test_settings_on_the_page_exist(call: str) -> None:
    assert repr(built(call)).startswith(call.partition("(")[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_that_explain_a_method_are_its_defaults(name: str) -> None:
    calls = re.findall(rf"`({name}\([^`]*\))`", section("What they compute"))
    if name == "WeightedAverage":  # has no default
        assert calls
    else:
        assert [built(" ".join(call.split())) for call in calls] == [getattr(methods, name)()]
