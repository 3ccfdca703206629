"""The experts of merges, compared from their files, where these still are and are still the same.

``merge.json`` names every expert by path and fingerprint. Merges of the same experts share one
comparison, so that a sweep over many scales reads them once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_merge.errors import InputError
from lit_merge.merge_record import MergeRecord
from lit_merge.overlap import Overlap, overlap_of_inputs
from lit_merge.parameters import ParametersPolicy
from lit_merge.report.recorded import place_now
from lit_merge.streaming.inputs import MergeInputs
from lit_merge.streaming.open_inputs import open_inputs, tasks_of
from lit_merge.streaming.progress import merge_progress


@dataclass(frozen=True)
class ComparedExperts:
    """Experts that were merged, or were given by themselves.

    Attributes:
        name: What to call them: the merges that they are in, or "experts".
        experts: What is known of each, by task: path, estimator, labels, number of examples and
            fingerprint, as texts.
        overlap: What they have in common; None where their files cannot be read any more.
        notes: Why not, and what else a reader should know.
    """

    name: str
    experts: Mapping[str, Mapping[str, str]]
    overlap: Overlap | None
    notes: tuple[str, ...] = ()


def compare_merged(
    merges: Sequence[MergeRecord], *, progress: bool = True
) -> tuple[ComparedExperts, ...]:
    """Compare the experts of merges, each set of experts once.

    Files that are gone, have changed or cannot be read any more are said in the notes.

    Args:
        merges: The records of the merges.
        progress: Whether to show progress on the standard error.
    """
    groups: dict[str, list[MergeRecord]] = {}
    for record in merges:
        groups.setdefault(_identity(record), []).append(record)
    return tuple(_compare(records, progress=progress) for records in groups.values())


def compare_experts(
    base: str | None, experts: Sequence[str], *, progress: bool = True
) -> ComparedExperts:
    """Compare expert folders that a user names.

    Args:
        base: What they were fine-tuned from; None to show their curvature alone.
        experts: The folders.
        progress: Whether to show progress on the standard error.

    Raises:
        InputError: As :func:`lit_merge.overlap.expert_overlap`.
    """
    paths = tasks_of(experts)
    with open_inputs(base, paths, None) as inputs, merge_progress(shown=progress) as shown:
        overlap = overlap_of_inputs(inputs, start=shown.start)
        known = _known(inputs, {task: str(path) for task, path in paths.items()})
    return ComparedExperts("experts", known, overlap, overlap.notes)


def _compare(records: Sequence[MergeRecord], *, progress: bool) -> ComparedExperts:
    record = records[0]
    content = record.provenance
    shown = [one.name for one in records[:3]]
    more = f" and {len(records) - 3} more" if len(records) > 3 else ""
    name = ", ".join(shown) + more
    try:
        base, experts = _paths(record)
        policy = ParametersPolicy(**content.get("policy", {}))
        with open_inputs(base, experts, None) as inputs, merge_progress(shown=progress) as bars:
            changed = _changed(content, inputs)
            if changed:
                raise InputError(f"{changed}: changed since the merge, left out.")
            overlap = overlap_of_inputs(inputs, policy=policy, start=bars.start)
            known = _known(inputs, experts)
    except (InputError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, InputError) else "its record is incomplete"
        note = f"The experts were not compared: {reason}"
        return ComparedExperts(name, _recorded(content), None, (note,))
    return ComparedExperts(name, known, overlap, overlap.notes)


def _paths(record: MergeRecord) -> tuple[str | None, dict[str, str]]:
    base = record.provenance.get("base")
    experts = record.provenance["experts"]
    return (
        None if base is None else place_now(base["path"], record.name),
        {task: place_now(experts[task]["path"], record.name) for task in record.tasks},
    )


def _changed(content: Mapping[str, Any], inputs: MergeInputs) -> str:
    """Return the path of the first input that is not what was merged; empty when all are."""
    for task, fingerprint in inputs.fingerprints.items():
        if content["experts"][task].get("fingerprint") != fingerprint:
            return str(content["experts"][task]["path"])
    base = content.get("base")
    if base is not None and base.get("fingerprint") != inputs.base_fingerprint:
        return str(base["path"])
    return ""


def _identity(record: MergeRecord) -> str:
    """Return what merges of the same experts, base and policy have in common."""
    content = record.provenance
    base, experts = content.get("base") or {}, content.get("experts") or {}
    prints = {task: _text(entry, "fingerprint") for task, entry in experts.items()}
    return repr((_text(base, "fingerprint"), prints, content.get("policy")))


def _known(inputs: MergeInputs, paths: Mapping[str, str]) -> dict[str, dict[str, str]]:
    known = {}
    for task, info in inputs.infos.items():
        entry = {
            "estimator": info.estimator,
            "labels": info.labels,
            "num_examples": info.num_examples,
            "fingerprint": inputs.fingerprints.get(task),
        }
        known[task] = {"path": paths[task], **_texts(entry)}
    return known


def _recorded(content: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    experts = content.get("experts")
    if not isinstance(experts, Mapping):
        return {}
    return {
        task: {"path": _text(entry, "path"), **_texts(entry)}
        for task, entry in experts.items()
        if isinstance(entry, Mapping)
    }


def _texts(entry: Mapping[str, Any]) -> dict[str, str]:
    keys: tuple[str, ...] = ("estimator", "labels", "num_examples", "fingerprint")
    return {key: _text(entry, key) for key in keys}


def _text(entry: object, key: str) -> str:
    value = entry.get(key) if isinstance(entry, Mapping) else None
    return "" if value is None else str(value)
