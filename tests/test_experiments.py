"""The tables and claims of ``make bench``, on evaluations that were made up."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lit_merge.evaluation import Evaluation, EvaluationRow
from lit_merge.evaluation.file import write_evaluation

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("experiments_results", "experiments_claims"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("experiments_results")


def write(folder: Path, models: dict[str, tuple[str, float, float, int | None]]) -> Path:
    """Write a run whose models have (kind, accuracy, NLL, stage) on one task."""
    rows = [
        EvaluationRow(name, kind, "mr", accuracy, 100, nll, stage)  # type: ignore[arg-type]
        for name, (kind, accuracy, nll, stage) in models.items()
    ]
    (folder / "steps").mkdir(parents=True)
    write_evaluation(folder / "evaluation.json", Evaluation(tuple(rows)))
    (folder / "steps/done.json").write_text(json.dumps({"a": {"seconds": 7}, "b": {"seconds": 3}}))
    return folder


def sentiment(folder: Path, gain: float) -> Path:
    return write(
        folder,
        {
            "expert mr": ("expert", 0.9, 0.3, None),
            "average": ("merged", 0.8, 0.41, None),
            "task arithmetic, α = 0.5": ("merged", 0.8, 0.4, None),
            "task arithmetic, α = 1.0": ("merged", 0.8, 0.8, None),
            "gradient matching, α = 0.5": ("merged", 0.8, 0.4, None),
            "gradient matching, α = 1.0": ("merged", 0.8 + gain, 0.4, None),
        },
    )


def test_numbers_are_means_with_the_deviation_of_a_sample(results: Any) -> None:
    assert results.number([1.0, 3.0]).text(2) == "2.00 ± 1.41"
    assert results.number([0.5]).text(1, times=100) == "50.0"


def test_claims_are_held_against_what_was_measured(results: Any, tmp_path: Path) -> None:
    folders = [sentiment(tmp_path / f"sentiment-{s}", gain) for s, gain in enumerate((0.02, -0.02))]
    runs = results.read_runs([*folders, tmp_path / "missing"])
    assert runs.seconds().mean == 10
    assert results.curves(runs) == {
        "task arithmetic": {
            0.5: "task arithmetic, α = 0.5",
            1.0: "task arithmetic, α = 1.0",
        },
        "gradient matching": {
            0.5: "gradient matching, α = 0.5",
            1.0: "gradient matching, α = 1.0",
        },
    }
    claims = importlib.import_module("experiments_claims").claims_of({"sentiment": runs})
    lines = [line.strip("| ").split(" | ") for line in claims.splitlines()[2:]]
    found = {text: (measured, holds) for text, measured, holds in lines}
    nll = "Gradient matching at α = 1 has at most 0.75 times the NLL of task arithmetic at α = 1"
    assert found[nll] == ("0.50 ± 0.00 times", "yes")
    arithmetic = next(text for text in found if text.startswith("Task arithmetic at α = 1 is more"))
    assert found[arithmetic] == ("100.0 ± 0.0 % above", "yes")
    pair = "gradient matching, α = 1.0 has a higher accuracy than task arithmetic, α = 1.0"
    assert found[pair] == ("0.0 ± 2.8 points better", "within noise")


def test_sections_are_written_between_their_marks_and_nothing_else(
    results: Any, tmp_path: Path
) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text(
        "# R\n<!-- experiments: sentiment -->\nstale\n<!-- end: sentiment -->\nby hand\n"
    )
    claims = importlib.import_module("experiments_claims").claims_of
    folders = {"sentiment": [sentiment(tmp_path / "sentiment-0", 0.0)]}
    results.write_results(folders, tmp_path, claims=claims)
    text = page.read_text()
    assert "stale" not in text
    assert "by hand" in text
    assert "| task arithmetic, NLL | 0.400 | 0.800 |" in text
    assert text.count("<!-- experiments: sentiment -->") == 1
    assert (tmp_path / "plots/alpha.svg").stat().st_size > 5000


def test_targets_are_held_against_the_experts_and_the_controls(
    results: Any, tmp_path: Path
) -> None:
    run = write(
        tmp_path / "text-0",
        {
            "expert mr": ("expert", 0.8, 0.3, None),
            "linear probe": ("control", 0.76, 0.5, None),
            "average": ("merged", 0.5, 0.9, 1),
            "least squares, one model": ("corrected", 0.76, 0.4, 2),
            "least squares + learned": ("corrected", 0.8, 0.3, 3),
        },
    )
    claims = importlib.import_module("experiments_claims")
    found = {c.text: c.holds for c in claims.text_claims(results.read_runs([run]))}
    assert found == {
        "least squares, one model: at least 93 % of the experts": True,
        "least squares + scale and shift: at least 97 % of the experts": False,
        "least squares + learned: at least 99.5 % of the experts": True,
        "least squares, one model is above the best control (linear probe)": False,
        "least squares + learned is above the best control (linear probe)": True,
    }
