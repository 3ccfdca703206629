from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def project() -> dict:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return toml.loads((ROOT / "pyproject.toml").read_text())


def test_the_packages_listed_are_those_on_disk() -> None:
    on_disk = {
        ".".join(folder.relative_to(ROOT).parts)
        for folder in [ROOT / "lit_merge", *(ROOT / "lit_merge").glob("*/")]
        if any(folder.glob("*.py"))
    }
    listed = project()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(on_disk)


def test_packages_have_no_folders_below_that_the_list_would_lose() -> None:
    below = [
        file
        for package in ("lit_merge", "callbacks")
        for file in (ROOT / package).glob("*/*/**/*.py")
    ]
    assert below == []


def test_the_callbacks_are_linked_into_the_package() -> None:
    link = ROOT / "lit_merge" / "callbacks"
    assert link.is_symlink()
    assert str(link.readlink()) == "../callbacks"
    assert project()["tool"]["setuptools"]["package-dir"]["lit_merge.callbacks"] == "callbacks"


def test_the_callbacks_are_imported_from_the_top_level_folder() -> None:
    import lit_merge.callbacks

    assert Path(lit_merge.callbacks.__file__).resolve() == ROOT / "callbacks" / "__init__.py"


@pytest.mark.parametrize("name", ["callbacks", "somewhere.callbacks"])
def test_the_callbacks_refuse_a_second_name(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "callbacks" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError, match=r'import "lit_merge\.callbacks", not'):
        spec.loader.exec_module(module)


def test_callbacks_import_each_other_by_their_full_name() -> None:
    relative = [
        file.name
        for file in (ROOT / "callbacks").glob("*.py")
        if any(line.startswith("from .") for line in file.read_text().splitlines())
    ]
    assert relative == []
