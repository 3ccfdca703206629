"""Files without tensors: evaluations, forecasts, configurations, and the runs of recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lit_merge.errors import InputError
from lit_merge.evaluation.file import read_evaluation, read_json_object
from lit_merge.inspection.contents import Inspection

STEPS = "steps"
YAML = (".yaml", ".yml")

_DONE = "done.json"
_MOST = 24  # entries of a folder that are listed
# What a configuration has and no other's has, in the order in which it is looked for.
_COMMANDS: tuple[tuple[str, frozenset[str], frozenset[str]], ...] = (
    ("run", frozenset({"steps"}), frozenset()),
    ("evaluate", frozenset({"models"}), frozenset()),
    ("curvature", frozenset({"checkpoint"}), frozenset()),
    ("fit", frozenset({"data", "model"}), frozenset()),
    (
        "correct",
        frozenset({"model", "tasks"}),
        frozenset(
            {"trainer", "least_squares", "trainable", "lr", "temperature", "holdout", "heads"}
        ),
    ),
    ("export", frozenset({"merged"}), frozenset({"task", "tasks", "examples", "fold"})),
    ("correct", frozenset({"merged"}), frozenset()),
    ("forecast", frozenset({"experts"}), frozenset({"scales", "weighting", "plot"})),
    ("align", frozenset({"groups", "by"}), frozenset()),
    ("merge", frozenset({"groups", "method"}), frozenset()),
    ("align", frozenset({"groups"}), frozenset()),
    ("merge", frozenset({"experts"}), frozenset()),
)


def inspect_record(path: Path) -> Inspection:
    """Find out what a JSON file of lit-merge says.

    Raises:
        InputError: It is none of them, or damaged.
    """
    content = read_json_object(path)
    if "rows" in content:
        return _evaluation(path)
    if {"planned", "curve", "weighting"} <= content.keys():
        return _forecast(path, content)
    raise InputError(
        f"{path}: must be a record of lit-merge (evaluation.json, forecast.json, merge.json, "
        f"align.json, correction.json, export.json, expert.json); got the keys "
        f"{sorted(content)[:8]}. Name a checkpoint, a folder or one of these."
    )


def inspect_configuration(path: Path) -> Inspection:
    """Find out which command a YAML file is for.

    Raises:
        InputError: It is no YAML, or the options of none of the commands.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: must be YAML; got {reason}. Correct the file.") from error
    command = command_of(content) if isinstance(content, Mapping) else None
    if command is None:
        keys = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise InputError(
            f"{path}: must hold the options of a lit-merge command; got {keys!r}. "
            'Print one to start from: "lit-merge merge --print_config".'
        )
    facts: dict[str, Any] = {
        "command": f"lit-merge {command} --config {path}",
        "options": [str(key) for key in content],
    }
    if command == "run":
        facts["variables"] = [str(key) for key in content.get("variables") or {}]
        facts["steps"] = len(content["steps"] or ())
    else:
        facts |= {key: content[key] for key in ("output", "base", "merged") if content.get(key)}
        if isinstance(content.get("method"), Mapping):
            facts["method"] = content["method"].get("class_path")
        for key in ("experts", "groups", "models", "tasks"):
            if isinstance(content.get(key), Mapping):
                facts[key] = [str(name) for name in content[key]]
    return Inspection(path=str(path), kind="configuration", source="yaml", facts=facts)


def command_of(content: Mapping[str, Any]) -> str | None:
    """Return the command whose options a configuration holds, None where none is known.

    >>> command_of({"base": "b", "experts": {}, "method": {}}), command_of({"models": {}})
    ('merge', 'evaluate')
    """
    for command, every, any_of in _COMMANDS:
        if every <= content.keys() and (not any_of or any_of & content.keys()):
            return command
    return None


def inspect_run(folder: Path) -> Inspection:
    """Find out what the run of a recipe has done, and what lies in its folder.

    Raises:
        InputError: Its record of what is done is damaged.
    """
    steps = folder / STEPS
    done = read_json_object(steps / _DONE) if (steps / _DONE).is_file() else {}
    names = sorted(file.stem for file in steps.glob("*.yaml"))
    open_steps = [name for name in names if name not in done]
    try:
        seconds = sum(float(entry.get("seconds", 0.0)) for entry in done.values())
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{steps / _DONE}: must hold an object for each step; got a damaged record ({error}). "
            "Remove the file: all steps are then done again."
        ) from error
    listed = sorted(p.name for p in folder.iterdir() if p.name != STEPS and p.name[0] != ".")
    facts: dict[str, Any] = {
        "steps": {name: _step_text(done.get(name)) for name in names},
        "seconds": round(seconds, 1),
        "contents": listed[:_MOST],
    }
    notes = []
    if len(listed) > _MOST:
        notes.append(f"{len(listed) - _MOST} more files and folders")
    if open_steps:
        notes.append(f"begun and not finished: {', '.join(open_steps)}; run the recipe again")
    notes.append("every step can be repeated by hand: its file begins with its command")
    return Inspection(
        path=str(folder), kind="run", source="folder", facts=facts, notes=tuple(notes)
    )


def _step_text(entry: Mapping[str, Any] | None) -> str:
    return "not finished" if entry is None else f"{entry.get('command')}, {entry.get('seconds')} s"


def _evaluation(path: Path) -> Inspection:
    found = read_evaluation(path)
    facts: dict[str, Any] = {
        "models": list(dict.fromkeys(row.model for row in found.rows)),
        "tasks": list(found.tasks),
        "accuracy": {
            line.model: f"{100 * line.accuracy:.1f} %"
            for line in found.lines()
            if line.accuracy is not None
        },
    }
    if "command" in found.provenance:
        facts["command"] = found.provenance["command"]
    bad = sum(row.nll is not None and row.nll != row.nll for row in found.rows)
    warnings = (f"{path}: {bad} log-likelihoods are NaN.",) if bad else ()
    return Inspection(
        path=str(path),
        kind="evaluation",
        source="json",
        facts=facts,
        notes=found.notes,
        warnings=warnings,
    )


def _forecast(path: Path, content: Mapping[str, Any]) -> Inspection:
    try:
        best = content["best"]
        facts: dict[str, Any] = {
            "method": content["method"],
            "tasks": list(content["num_examples"]),
            "planned_scale": content["planned"]["scale"],
            "expected_total": float(content["planned"]["total"]),
        }
        if best is not None:
            facts |= {"best_scale": best["scale"], "total_at_best": float(best["total"])}
        notes = tuple(str(note) for note in content.get("notes", ()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: must hold a forecast; got a damaged one ({type(error).__name__}: {error}). "
            "Forecast again."
        ) from error
    return Inspection(path=str(path), kind="forecast", source="json", facts=facts, notes=notes)
