"""Draws what each step brings from the tables of RESULTS.md: the README's picture.

python benchmarks/main_picture.py
"""

from __future__ import annotations

import re
from pathlib import Path

from lit_merge.report.figures import stage_bars

HERE = Path(__file__).parent
STEPS = {
    "average": ("average",),
    "average + TACT": ("average + TACT",),
    "least squares + scale and shift, closed form": (
        "least squares + scale and shift",
        "least squares + scale and shift, closed form",
    ),
    "+ learned": (
        "+ all weights instead, 300 steps, 22 November 2026",
        "+ learned, 100 steps",
    ),
}
"""The bars, and the rows of the tables that they stand for."""
CONTROLS = {
    "the unmerged base, corrected": (
        "control: base + TACT + learned, 300 steps",
        "control: the unmerged base + TACT + learned, 100 steps",
    ),
    "all weights distilled from the average": ("control: all weights distilled from the average",),
}
TEXT, VISION = "MiniLM on four text tasks: least squares", "Vision: local and non-local"


def rows_of(page: str, heading: str) -> tuple[list[str], dict[str, list[str]]]:
    """Return the columns and the rows, by name, of the first table below a heading."""
    section = page[page.index(f"## {heading}") :]
    table = []
    for line in section[section.index("|") :].splitlines():
        if not line.startswith("|"):
            break
        table.append([re.sub(r"\*+", "", cell).strip() for cell in line.strip("|").split("|")])
    return table[0], {row[0]: row[1:] for row in table[2:]}


def value(cell: str) -> float:
    """Return the number that a cell begins with."""
    found = re.match(r"[\d.]+", cell)
    assert found is not None, cell
    return float(found[0])


def panel(rows: dict[str, list[str]], column: int) -> dict[str, tuple[float, float]]:
    """Return the bars of one column."""
    found = {}
    for step, names in STEPS.items():
        name = next(name for name in names if name in rows)
        found[step] = (value(rows[name][column]), 0.0)
    return found


def main() -> None:
    """Write the picture."""
    page = (HERE / "RESULTS.md").read_text()
    panels, controls = {}, {}
    columns, rows = rows_of(page, TEXT)
    cases = [("MiniLM, four text tasks", rows, 0)]
    columns, rows = rows_of(page, VISION)
    cases += [(name, rows, place) for place, name in enumerate(columns[1:])]
    for title, of, column in cases:
        panels[title] = panel(of, column)
        controls[title] = {
            control: (value(of[name][column]), 0.0)
            for control, names in CONTROLS.items()
            for name in names
            if name in of
        }
    (HERE / "plots").mkdir(exist_ok=True)
    stage_bars(HERE / "plots/steps.svg", panels, controls=controls, replace=True)


if __name__ == "__main__":
    main()
