"""Imports point one way: the maths knows nothing of Lightning, files or ranks above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lit_merge

ROOT = Path(lit_merge.__file__).parent
LAYERS = (
    ("errors", "output", "strict_json", "counter", "location", "upload"),
    ("heads", "checkpoint"),
    (
        "parameters",
        "expert",
        "curvature",
        "methods",
        "correction",
        "alignment",
        "least_squares",
        "distributed",
        "sharding",
    ),
    ("streaming", "forecast", "passes", "tasks", "overlap"),
    ("callbacks", "merged", "curvature_pass"),
    ("module", "checkpoint_curvature"),
    ("evaluation", "merge_record", "inspection", "export", "align"),
    ("terminal", "report", "recipe"),
    ("cli", "demo"),
)
"""What may import what: a name in one line only those of its own line and above."""


def imported(path: Path) -> set[str]:
    """Return the absolute names that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def files_of(name: str) -> list[Path]:
    folder = ROOT / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [ROOT / f"{name}.py"]


def test_every_module_has_a_layer() -> None:
    names = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert names - {"__init__", "__main__"} == {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("height", range(len(LAYERS)))
def test_a_layer_imports_only_what_is_below_it(height: int) -> None:
    allowed = {name for layer in LAYERS[: height + 1] for name in layer}
    for name in LAYERS[height]:
        for path in files_of(name):
            own = {m.split(".")[1] for m in imported(path) if m.startswith("lit_merge.")}
            assert own <= allowed, f"{path.relative_to(ROOT)} imports {sorted(own - allowed)}"


@pytest.mark.parametrize(
    "name",
    [
        "methods",
        "curvature",
        "correction",
        "alignment",
        "least_squares",
        "checkpoint",
        "expert",
        "parameters",
        "streaming",
    ],
)
def test_the_maths_and_the_files_know_nothing_of_lightning(name: str) -> None:
    for path in files_of(name):
        roots = {module.split(".")[0] for module in imported(path)}
        assert not roots & {"lightning", "timm", "transformers", "datasets"}, path
