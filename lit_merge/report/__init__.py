"""The report: one HTML page from an evaluation and the records of what it is about.

Everything is in the one file (style, figures as SVG, numbers), nothing is fetched, and every name
is escaped: names of tasks and tensors come from other people's files. This module prepares what
``report.html`` shows; it measures nothing. :mod:`lit_merge.report.figures` draws pictures that
stand alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

import lit_merge
from lit_merge.evaluation import EXPERTS, Evaluation, TableLine
from lit_merge.merge_record import MergeRecord
from lit_merge.report.accuracy_plots import accuracy_panels
from lit_merge.report.alignment_record import AlignmentRecord
from lit_merge.report.comparison_plots import forecast_panels, forecast_section
from lit_merge.report.comparisons import ComparedExperts
from lit_merge.report.drawing import Line, Panel
from lit_merge.report.forecast_record import ForecastRecord, comparisons
from lit_merge.report.overlap_plots import overlap_panels
from lit_merge.report.repeat import as_yaml, evaluation_yaml
from lit_merge.report.scale_plots import scale_panels
from lit_merge.report.scales import CorrectionScales
from lit_merge.report.stage_plots import controls_of, stage_panels, step_names
from lit_merge.report.sweep import merging_of, sweep_of
from lit_merge.report.sweep_plots import mean_panels, sweep_lines, sweep_table, task_panels
from lit_merge.report.tables import (
    accuracy_table,
    alignment_section,
    counted,
    experts_section,
    merge_sections,
    scale_table,
    variance_tables,
)
from lit_merge.report.variance_plots import variance_legend, variance_lines, variance_panels
from lit_merge.terminal import percent

DEFAULT_TITLE = "lit-merge report"


def write_report(
    path: str | Path,
    evaluation: Evaluation | None = None,
    *,
    merges: Sequence[MergeRecord] = (),
    corrections: Sequence[CorrectionScales] = (),
    alignments: Sequence[AlignmentRecord] = (),
    forecasts: Sequence[ForecastRecord] = (),
    experts: Sequence[ComparedExperts] = (),
    evaluated: Mapping[str, MergeRecord] | None = None,
    title: str = DEFAULT_TITLE,
    replace: bool = False,
) -> Path:
    """Write the report, whole or not at all.

    Args:
        path: The HTML file to write.
        evaluation: What was measured; None for a report without measurements.
        merges: Records of merges, as :func:`lit_merge.merge_record.read_merge_record` gives them.
        corrections: Scales of corrected folders, as :func:`lit_merge.report.scales.read_scales`
            gives them.
        alignments: Records of alignments, as
            :func:`lit_merge.report.alignment_record.read_alignment` gives them.
        forecasts: As :func:`lit_merge.report.forecast_record.read_forecast` gives them.
        experts: Experts that were compared (:mod:`lit_merge.report.comparisons`).
        evaluated: How the evaluation's merged models were made, by model, as
            :func:`lit_merge.report.recorded.evaluated_merges` gives it; for the curves over scales
            and for what a forecast is compared with.
        title: The page's title.
        replace: Whether an existing file may be replaced.

    Raises:
        InputError: If the file is there already and ``replace`` is false.
    """
    from lit_merge.output import new_file

    page = render_report(
        evaluation,
        merges=merges,
        corrections=corrections,
        alignments=alignments,
        forecasts=forecasts,
        experts=experts,
        evaluated=evaluated,
        title=title,
    )
    with new_file(path, replace=replace) as partial:
        partial.write_text(page, encoding="utf-8")
    return Path(path)


def render_report(
    evaluation: Evaluation | None = None,
    *,
    merges: Sequence[MergeRecord] = (),
    corrections: Sequence[CorrectionScales] = (),
    alignments: Sequence[AlignmentRecord] = (),
    forecasts: Sequence[ForecastRecord] = (),
    experts: Sequence[ComparedExperts] = (),
    evaluated: Mapping[str, MergeRecord] | None = None,
    title: str = DEFAULT_TITLE,
) -> str:
    """Return the page as text; see :func:`write_report`."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        resources.files("lit_merge.report").joinpath("report.html").read_text(encoding="utf-8")
    )
    evaluation = evaluation or Evaluation(())
    lines = variance_lines(evaluation)
    return template.render(
        title=title,
        subtitle=_subtitle(evaluation, merges, corrections),
        facts=_facts(evaluation),
        notes=list(evaluation.notes),
        table=accuracy_table(evaluation) if evaluation.rows else None,
        stages=_stages(evaluation),
        sweep=_sweep(evaluation, evaluated or {}),
        accuracy_panels=_shown(accuracy_panels(evaluation)),
        variance_panels=_shown(variance_panels(evaluation)),
        variance_keys=_keys(variance_legend(lines), name="variance-key"),
        variance_tables=variance_tables(evaluation, list(lines)),
        corrections=[
            _correction(one, evaluation, name=f"correction-{index}")
            for index, one in enumerate(corrections)
        ],
        alignments=[alignment_section(record) for record in alignments],
        forecasts=[
            _forecast(one, evaluation, evaluated or {}, name=f"forecast-{index}")
            for index, one in enumerate(forecasts)
        ],
        experts=[
            {
                **experts_section(one),
                "panels": _shown(overlap_panels(one.overlap, name=f"experts-{index}"))
                if one.overlap is not None
                else [],
            }
            for index, one in enumerate(experts)
        ],
        merges=merge_sections(merges),
        repeat_evaluation=evaluation_yaml(evaluation),
        provenance=_provenance(evaluation),
        version=lit_merge.__version__,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _stages(evaluation: Evaluation) -> dict[str, Any] | None:
    panels = stage_panels(evaluation)
    if not panels:
        return None
    models = [line.model for line in evaluation.stages()]
    return {
        "panels": _shown(panels),
        "steps": ", ".join(step_names(models)),
        "controls": [
            {"letter": control.letter, "model": control.model, "mean": percent(control.mean)}
            for control in controls_of(evaluation)
        ],
    }


def _sweep(evaluation: Evaluation, evaluated: Mapping[str, MergeRecord]) -> dict[str, Any] | None:
    mergings = {name: merging_of(record) for name, record in evaluated.items()}
    sweep = sweep_of(evaluation, {name: one for name, one in mergings.items() if one is not None})
    if sweep is None:
        return None
    lines = sweep_lines(sweep)
    return {
        "panels": _shown(mean_panels(sweep)),
        "task_panels": _shown(task_panels(sweep, evaluation)),
        "legend": _keys([(line.label, line) for line in lines], name="scale-key"),
        "lines": sweep_table(sweep),
    }


def _forecast(
    forecast: ForecastRecord,
    evaluation: Evaluation,
    evaluated: Mapping[str, MergeRecord],
    *,
    name: str,
) -> dict[str, Any]:
    compared = comparisons(forecast, evaluation, evaluated)
    return {
        **forecast_section(forecast, compared, with_evaluation=bool(evaluation.rows)),
        "panels": _shown(forecast_panels(forecast, compared, name=name)),
    }


def _keys(legend: Sequence[tuple[str, Line]], *, name: str) -> list[dict[str, Any]]:
    return [
        {"label": label, "svg": _markup(line.key(f"{name}-{index}"))}
        for index, (label, line) in enumerate(legend)
    ]


def _correction(
    corrections: CorrectionScales, evaluation: Evaluation, *, name: str
) -> dict[str, Any]:
    return {
        "name": corrections.name,
        "sentence": f"{counted(len(corrections.sites), 'site')}, "
        f"{counted(len(corrections.tasks), 'task')}: {', '.join(corrections.tasks)}.",
        "panels": _shown(scale_panels(corrections, evaluation, name=name)),
        "lines": scale_table(corrections, evaluation),
        "settings": as_yaml(dict(corrections.settings)) if corrections.settings else "",
        "repeat": (corrections.configuration or "").strip(),
    }


def _shown(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    return [{"title": p.title, "description": p.description, "svg": _markup(p.svg)} for p in panels]


def _markup(svg: str) -> str:
    """Mark our own SVG as markup; the names in it were escaped when it was drawn."""
    from markupsafe import Markup

    return Markup(svg)


def _subtitle(
    evaluation: Evaluation, merges: Sequence[MergeRecord], corrections: Sequence[CorrectionScales]
) -> str:
    parts = []
    if evaluation.rows:
        parts.append(counted(len(evaluation.lines()), "model"))
        parts.append(f"{counted(len(evaluation.tasks), 'task')}: {', '.join(evaluation.tasks)}")
    if merges:
        parts.append(counted(len(merges), "merge"))
    if corrections:
        parts.append(counted(len(corrections), "correction"))
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


def _provenance(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [
        {
            "title": key.replace("_", " "),
            "text": value if isinstance(value, str) else as_yaml(value),
            "open": key in {"command", "run", "versions"},
        }
        for key, value in evaluation.provenance.items()
        if key != "configuration"  # shown apart, to be copied
    ]
