"""The report's tables: what the page shows of each record, as dictionaries of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_merge.evaluation import EXPERTS, Evaluation, EvaluationRow, TableLine
from lit_merge.merge_record import MergeRecord, TensorRecord
from lit_merge.report.alignment_record import AlignmentRecord
from lit_merge.report.comparisons import ComparedExperts
from lit_merge.report.overlap_plots import overlap_table
from lit_merge.report.repeat import as_yaml, merge_yaml
from lit_merge.report.scale_plots import factor, plain
from lit_merge.report.scales import CorrectionScales, in_forward_order, relative_shifts
from lit_merge.terminal import MISSING, accuracy_text, percent, perplexity_text

_FINGERPRINT = 12  # digits of a fingerprint
_SHORT = 24  # lines of a table that is shown without a click


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


def accuracy_table(evaluation: Evaluation) -> dict[str, Any]:
    """Return the table of all models over all tasks."""
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
                "nll": loss_text(line.nll),
                "perplexity": perplexity_text(line.perplexity),
                "best_normalised": rival and line.normalised == best.normalised,
                "cells": [
                    {
                        "accuracy": accuracy_text(cell),
                        "interval": _interval(cell),
                        "best": rival and cell is not None and cell.accuracy == top,
                        "nll": loss_text(None if cell is None else cell.nll),
                        "perplexity": perplexity_text(None if cell is None else cell.perplexity),
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
        "losses": any(row.nll is not None for row in evaluation.rows),
        "language": any(row.perplexity is not None for row in evaluation.rows),
    }


def loss_text(nll: float | None) -> str:
    """Return a negative log-likelihood with three decimals, a dash for None."""
    return MISSING if nll is None else f"{nll:.3f}"


def _interval(row: EvaluationRow | None) -> str:
    if row is None:
        return ""
    low, high = row.interval
    return f"{100 * low:.1f}–{100 * high:.1f}"


def variance_tables(evaluation: Evaluation, models: Sequence[str]) -> list[dict[str, Any]]:
    """Return a table of the variances by site for each task, with a column for each model."""
    tables: list[dict[str, Any]] = []
    for task in dict.fromkeys(row.task for row in evaluation.variances):
        sites: dict[str, dict[str, float]] = {}
        for row in evaluation.variances:
            if row.task == task:
                model = EXPERTS if row.kind == "expert" else row.model
                sites.setdefault(row.site, {})[model] = row.variance
        tables.append(
            {
                "task": task,
                "models": list(models),
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


def scale_table(corrections: CorrectionScales, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return a line for each site and task of a correction."""
    lines: list[dict[str, Any]] = []
    for number, one in enumerate(in_forward_order(corrections, evaluation), 1):
        shifts = relative_shifts(one, corrections.tasks, evaluation)
        for index, task in enumerate(corrections.tasks):
            shift = shifts[index]
            lines.append(
                {
                    "number": number,
                    "site": one.site,
                    "task": task,
                    "channels": one.scale.shape[1],
                    "mean": factor(one.mean[index]),
                    "spread": factor(one.spread[index]),
                    "shift": f"{one.shift_size[index]:.3g}",
                    "relative_shift": MISSING if shift is None else plain(shift),
                    "not_positive": one.not_positive[index],
                }
            )
    return lines


def merge_sections(records: Sequence[MergeRecord]) -> list[dict[str, Any]]:
    """Return what the page says of merges; those that treat all tensors alike share one record."""
    first: dict[tuple[TensorRecord, ...], str] = {}
    sections = []
    for index, record in enumerate(records):
        shown_at = first.setdefault(record.tensors, record.name)
        same_as = "" if first[record.tensors] == record.name else shown_at
        sections.append(_merge_section(record, name=f"merge-{index}", same_as=same_as))
    return sections


def _merge_section(record: MergeRecord, *, name: str, same_as: str) -> dict[str, Any]:
    largest = max(record.traces.values(), default=0.0)
    actions = list(record.actions())
    return {
        "id": name,
        "name": record.name,
        "sentence": f"{counted(len(record.tasks), 'expert')} ({', '.join(record.tasks)}) "
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
            {"name": action, "tensors": f"{tensors:,}", "elements": f"{elements:,}"}
            for action, (tensors, elements) in record.actions().items()
        ],
        "same_as": same_as,
        "record": []
        if same_as
        else [
            {
                "name": tensor.name,
                "action": tensor.action,
                "place": actions.index(tensor.action),
                "shape": " × ".join(map(str, tensor.shape)) or "scalar",
                "dtype": tensor.dtype,
                "reason": tensor.reason,
            }
            for tensor in record.tensors
        ],
        "repeat": merge_yaml(record),
        "provenance": as_yaml(record.provenance),
    }


def experts_section(compared: ComparedExperts) -> dict[str, Any]:
    """Return what the page says of experts that were compared."""
    return {
        "name": compared.name,
        "experts": [
            {
                "task": task,
                "path": entry["path"],
                "estimator": ", ".join(entry[key] for key in ("estimator", "labels") if entry[key])
                or MISSING,
                "num_examples": entry["num_examples"] or MISSING,
                "fingerprint": entry["fingerprint"][:_FINGERPRINT] or MISSING,
            }
            for task, entry in compared.experts.items()
        ],
        "table": overlap_table(compared.overlap)
        if compared.overlap is not None and compared.overlap.layers
        else None,
        "notes": list(compared.notes),
    }


def alignment_section(record: AlignmentRecord) -> dict[str, Any]:
    """Return what the page says of an alignment."""
    tasks = "; ".join(f"{group}: {', '.join(names)}" for group, names in record.groups.items())
    alike = record.similarity()
    order = f"in the order of {record.reference}" if record.units else "as they are, not permuted"
    return {
        "name": record.name,
        "sentence": f"{counted(len(record.groups), 'group')} {order} ({tasks}).",
        "objective": f"Objective: {record.before:.4g} → {record.after:.4g}."
        if record.units
        else "",
        "similarity": ""
        if alike is None
        else f"Mean similarity of the units: {plain(alike[0])} → {plain(alike[1])}.",
        "lines": [
            {
                "symmetry": one.symmetry,
                "size": one.size,
                "group": one.group,
                "moved": one.moved,
                "before": MISSING if one.before is None else plain(one.before),
                "after": MISSING if one.after is None else plain(one.after),
            }
            for one in record.units
        ],
        "open": len(record.units) <= _SHORT,
        "provenance": as_yaml(dict(record.provenance)) if record.provenance else "",
    }


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> counted(1, "task"), counted(2, "task")
    ('1 task', '2 tasks')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"
