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
    "least squares + scale and shift, closed form": ("least squares + scale and shift",),
    "+ learned": ("+ all weights instead, 300 steps", "least squares + learned"),
}
"""The bars, and the rows of the tables that they stand for."""
CONTROLS = {
    "the unmerged base, corrected": (
        "control: base + TACT + learned, 300 steps",
        "control: base + TACT + learned",
    ),
    "all weights distilled from the average": (
        "control: the same by Muon",
        "control: all weights distilled from the average",
    ),
}
TEXT, VISION = "Text: four tasks with heads of their own", "Vision: local and non-local"


def rows_of(page: str, heading: str) -> tuple[list[str], dict[str, list[str]]]:
    """Return the columns and the rows, by name, of the first table below a heading."""
    section = page[page.index(f"## {heading}") :]
    table = []
    for line in section[section.index("|") :].splitlines():
        if not line.startswith("|"):
            break
        table.append([re.sub(r"\*+", "", cell).strip() for cell in line.strip("|").split("|")])
    return table[0], {row[0]: row[1:] for row in table[2:]}


def value(cell: str) -> tuple[float, float]:
    """Return the mean that a cell begins with, and its deviation, 0 of one seed."""
    found = re.match(r"([\d.]+)(?: ± ([\d.]+))?", cell)
    assert found is not None, cell
    return float(found[1]), float(found[2] or 0.0)


def panel(rows: dict[str, list[str]], column: int) -> dict[str, tuple[float, float]]:
    """Return the bars of one column."""
    found = {}
    for step, names in STEPS.items():
        name = next(name for name in names if name in rows)
        found[step] = value(rows[name][column])
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
            control: value(of[name][column])
            for control, names in CONTROLS.items()
            for name in [name for name in names if name in of][:1]
        }
    (HERE / "plots").mkdir(exist_ok=True)
    stage_bars(HERE / "plots/steps.svg", panels, controls=controls, replace=True)


if __name__ == "__main__":
    main()
