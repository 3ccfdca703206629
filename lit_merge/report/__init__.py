"""The report: one HTML page from an evaluation and the records of the merges it is about.

Everything is in the one file (style, figures as SVG, numbers), nothing is fetched, and every name
is escaped: names of tasks and tensors come from other people's files. This module prepares what
``report.html`` shows; it measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

import lit_merge
from lit_merge.evaluation import EXPERTS, Evaluation, EvaluationRow, TableLine
from lit_merge.merge_record import MergeRecord
from lit_merge.report.plots import accuracy_panels, variance_panels, variance_series
from lit_merge.terminal import MISSING, accuracy_text, percent

DEFAULT_TITLE = "lit-merge report"


def write_report(
    path: str | Path,
    evaluation: Evaluation | None = None,
    *,
    merges: Sequence[MergeRecord] = (),
    title: str = DEFAULT_TITLE,
    replace: bool = False,
) -> Path:
    """Write the report, whole or not at all.

    Args:
        path: The HTML file to write.
        evaluation: What was measured; None for a report of merges only.
        merges: Records of merges, as :func:`lit_merge.merge_record.read_merge_record` gives them.
        title: The page's title.
        replace: Whether an existing file may be replaced.

    Raises:
        InputError: If the file is there already and ``replace`` is false.
    """
    from lit_merge.output import new_file

    page = render_report(evaluation, merges=merges, title=title)
    with new_file(path, replace=replace) as partial:
        partial.write_text(page, encoding="utf-8")
    return Path(path)


def render_report(
    evaluation: Evaluation | None = None,
    *,
    merges: Sequence[MergeRecord] = (),
    title: str = DEFAULT_TITLE,
) -> str:
    """Return the page as text; see :func:`write_report`."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        resources.files("lit_merge.report").joinpath("report.html").read_text(encoding="utf-8")
    )
    evaluation = evaluation or Evaluation(())
    # Our own SVG is markup; the names in it were escaped when it was drawn.
    panels = {
        name: [
            {"title": p.title, "description": p.description, "svg": Markup(p.svg)} for p in drawn
        ]
        for name, drawn in (
            ("accuracy_panels", accuracy_panels(evaluation)),
            ("variance_panels", variance_panels(evaluation)),
        )
    }
    return template.render(
        title=title,
        subtitle=_subtitle(evaluation, merges),
        facts=_facts(evaluation),
        notes=list(evaluation.notes),
        table=_table(evaluation) if evaluation.rows else None,
        variance_series=variance_series(evaluation),
        variance_tables=_variance_tables(evaluation),
        merges=[_merge(record) for record in merges],
        provenance=_provenance(evaluation),
        version=lit_merge.__version__,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **panels,
    )


def _subtitle(evaluation: Evaluation, merges: Sequence[MergeRecord]) -> str:
    parts = []
    if evaluation.rows:
        parts.append(_counted(len(evaluation.lines()), "model"))
        parts.append(f"{_counted(len(evaluation.tasks), 'task')}: {', '.join(evaluation.tasks)}")
    if merges:
        parts.append(_counted(len(merges), "merge"))
    return " · ".join(parts)


def _facts(evaluation: Evaluation) -> list[str]:
    """Return a sentence for the best model of each kind but the experts."""
    facts: list[str] = []
    best: dict[str, TableLine] = {}
    for line in evaluation.lines():
        if line.normalised is not None and line.model != EXPERTS:
            now = best.setdefault(line.kind, line)
            if line.normalised > (now.normalised or 0.0):
                best[line.kind] = line
    names = {
        "base": "Base",
        "control": "Best control",
        "merged": "Best merged model",
        "corrected": "Best corrected model",
    }
    for kind, line in best.items():
        facts.append(f"{names[kind]}: {line.model}, {percent(line.normalised)}% of the experts.")
    return facts


@dataclass(frozen=True)
class _Best:
    """The highest shares among the models that a merge competes with."""

    by_task: tuple[float, ...]
    normalised: float

    @classmethod
    def of(cls, lines: Sequence[TableLine], num_tasks: int) -> _Best:
        rivals = [line for line in lines if line.kind in {"merged", "corrected"}]
        return cls(
            by_task=tuple(
                max((c.accuracy for line in rivals if (c := line.cells[task])), default=2.0)
                for task in range(num_tasks)
            ),
            normalised=max((line.normalised or 0.0 for line in rivals), default=2.0),
        )


def _table(evaluation: Evaluation) -> dict[str, Any]:
    lines = evaluation.lines()
    best = _Best.of(lines, len(evaluation.tasks))
    rows: list[dict[str, Any]] = []
    for index, line in enumerate(lines):
        rival = line.kind in {"merged", "corrected"}
        rows.append(
            {
                "model": line.model,
                "kind": line.kind,
                "new_kind": index > 0 and lines[index - 1].kind != line.kind,
                "accuracy": percent(line.accuracy),
                "normalised": percent(line.normalised),
                "nll": MISSING if line.nll is None else f"{line.nll:.3f}",
                "best_normalised": rival and line.normalised == best.normalised,
                "cells": [
                    {
                        "accuracy": accuracy_text(cell),
                        "interval": _interval(cell),
                        "best": rival and cell is not None and cell.accuracy == top,
                    }
                    for cell, top in zip(line.cells, best.by_task, strict=True)
                ],
            }
        )
    sizes = {
        task: sorted({row.num_examples for row in evaluation.rows if row.task == task})
        for task in evaluation.tasks
    }
    return {
        "tasks": [
            {"name": task, "sizes": " / ".join(map(str, counts))} for task, counts in sizes.items()
        ],
        "lines": rows,
    }


def _interval(row: EvaluationRow | None) -> str:
    if row is None:
        return ""
    low, high = row.interval
    return f"{100 * low:.1f}–{100 * high:.1f}"


def _variance_tables(evaluation: Evaluation) -> list[dict[str, Any]]:
    tables: list[dict[str, Any]] = []
    models = [series.model for series in variance_series(evaluation)]
    for task in dict.fromkeys(row.task for row in evaluation.variances):
        sites: dict[str, dict[str, float]] = {}
        for row in evaluation.variances:
            if row.task == task:
                model = EXPERTS if row.kind == "expert" else row.model
                sites.setdefault(row.site, {})[model] = row.variance
        tables.append(
            {
                "task": task,
                "models": models,
                "sites": [
                    {
                        "name": site,
                        "numbers": [f"{values[m]:.3g}" if m in values else MISSING for m in models],
                    }
                    for site, values in sites.items()
                ],
            }
        )
    return tables


def _merge(record: MergeRecord) -> dict[str, Any]:
    largest = max(record.traces.values(), default=0.0)
    return {
        "name": record.name,
        "sentence": f"{_counted(len(record.tasks), 'expert')} ({', '.join(record.tasks)}) "
        f"merged by {record.method}.",
        "warnings": [*record.warnings, *record.notes],
        "traces": [
            {
                "task": task,
                "value": f"{trace:.4g}",
                "share": percent(trace / largest) + " %" if largest > 0 else MISSING,
            }
            for task, trace in record.traces.items()
        ],
        "actions": [
            {"name": name, "tensors": f"{tensors:,}", "elements": f"{elements:,}"}
            for name, (tensors, elements) in record.actions().items()
        ],
        "record": [
            {
                "name": tensor.name,
                "action": tensor.action,
                "shape": " × ".join(map(str, tensor.shape)) or "scalar",
                "dtype": tensor.dtype,
                "reason": tensor.reason,
            }
            for tensor in record.tensors
        ],
        "provenance": _yaml(record.provenance),
    }


def _provenance(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [
        {
            "title": key.replace("_", " "),
            "text": value if isinstance(value, str) else _yaml(value),
            "open": key in {"command", "run", "versions"},
        }
        for key, value in evaluation.provenance.items()
    ]


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100).strip()


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
