"""Folders that lit-merge has written, with the record of how, and PEFT adapters."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_merge.checkpoint import Checkpoint, fingerprint, open_state_dict
from lit_merge.checkpoint.adapter import WEIGHTS as ADAPTER_WEIGHTS
from lit_merge.checkpoint.adapter_config import read_adapter_config
from lit_merge.checkpoint.adapter_tensors import sort_tensors
from lit_merge.checkpoint.bit_masks import scale_of, share_of_ones
from lit_merge.checkpoint.safetensors_file import SafetensorsFile
from lit_merge.checkpoint.torch_file import open_torch_file
from lit_merge.errors import InputError
from lit_merge.evaluation.file import read_json_object
from lit_merge.expert import open_expert
from lit_merge.inspection.contents import Inspection, Kind, part_of, tensors_of
from lit_merge.inspection.hessian import read_hessian, summary_of
from lit_merge.inspection.values import Reading
from lit_merge.inspection.weights import inspect_weights, value_remarks
from lit_merge.merge_record import method_text
from lit_merge.merged.folder import CORRECTION, MERGE, open_merged

ALIGN = "align.json"
EXPORT = "export.json"

_EXPERT = "expert.json"
_HESSIAN = "hessian.safetensors"


def inspect_merged(folder: Path, reading: Reading) -> Inspection:
    """Find out what a merged or a corrected folder holds.

    Raises:
        InputError: Its record is damaged, or its files do not belong together.
    """
    kind: Kind = "corrected" if (folder / CORRECTION).is_file() else "merged"
    if kind == "merged" and _lacks_weights(folder):
        return _adapter_of_merge(folder, reading)
    with ExitStack() as stack:
        merged = stack.enter_context(open_merged(folder))
        weights = _as_checkpoint(merged.weights)
        parts = [part_of("weights", weights, folder)]
        parts += [part_of(f"head {t}", _as_checkpoint(h), folder) for t, h in merged.heads.items()]
        parts += [part_of(f"mask {task}", mask, folder) for task, mask in merged.masks.items()]
        if merged.corrections is not None:
            parts.append(part_of("corrections", merged.corrections, folder))
        if merged.surgery is not None:
            parts.append(part_of("surgery", merged.surgery, folder))
        if reading.reads(weights):
            reading.expect(weights)
        traces: Mapping[str, float] = {}
        curvature, warnings = None, [str(text) for text in merged.merge.get("warnings", ())]
        if (folder / _EXPERT).is_file() and (folder / _HESSIAN).is_file():  # an expert again
            expert = stack.enter_context(closing(open_expert(folder)))
            assert expert.hessian is not None, "it is there"
            parts.append(part_of("hessian", expert.hessian, folder))
            reading.expect(expert.hessian)
            found = read_hessian(expert.hessian, reading)
            traces, curvature = found.traces, summary_of(expert.info, found)
            warnings += found.warnings
        facts: dict[str, Any] = {"tasks": list(merged.tasks)}
        if merged.record is not None:
            record = merged.record.as_dict()
            facts |= {key: record[key] for key in ("correction", "calibrated", "settings")}
            facts["sites"] = len(merged.record.sites)
            if merged.record.solved:
                facts["solved_layers"] = len(merged.record.solved)
        facts |= _merge_facts(merged.merge, folder)
        if merged.masks:
            shares = {t: share_of_ones(m, weights.infos) for t, m in merged.masks.items()}
            facts["mask_shares"] = shares
            facts["mask_scales"] = {task: scale_of(mask) for task, mask in merged.masks.items()}
        notes = [str(note) for note in merged.merge.get("notes", ())]
        if reading.reads(weights):
            told, wrong = value_remarks(weights, reading)
            notes += told
            warnings += wrong
        return Inspection(
            path=str(folder),
            kind=kind,
            source=weights.source,
            fingerprint=fingerprint(weights),
            parts=tuple(parts),
            tensors=tensors_of(weights, traces),
            curvature=curvature,
            facts=facts,
            notes=tuple(notes),
            warnings=tuple(warnings),
        )


def inspect_aligned(folder: Path) -> Inspection:
    """Find out what ``lit-merge align`` has written: the base and every expert, by their headers.

    Raises:
        InputError: Its record is damaged, or an expert cannot be opened.
    """
    content = read_json_object(folder / ALIGN)
    try:
        tasks = {name: list(group["experts"]) for name, group in content["groups"].items()}
        facts: dict[str, Any] = {
            "reference": content["reference"],
            "groups": tasks,
            "objective": {key: float(content["objective"][key]) for key in ("before", "after")},
            "symmetries": len(content["symmetries"]),
            "settings": dict(content.get("settings", {})),
        }
        moved = {
            group: sum(int(one["moved"].get(group, 0)) for one in content["symmetries"])
            for group in tasks
            if group != content["reference"]
        }
        facts["moved"] = moved
        rejected = dict(content.get("proof", {}).get("rejected", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{folder / ALIGN}: must hold the record of an alignment; got a damaged one "
            f"({type(error).__name__}: {error}). Align again."
        ) from error
    parts, source = [], "safetensors"
    for name in ("base", *(task for group in tasks.values() for task in group)):
        with closing(open_expert(folder / name)) as expert:
            source = expert.weights.source
            parts.append(part_of(name, expert.weights, folder))
            if expert.hessian is not None:
                parts.append(part_of(f"hessian {name}", expert.hessian, folder))
    notes = [f"not a symmetry after all: {name} ({why})" for name, why in rejected.items()]
    return Inspection(
        path=str(folder),
        kind="aligned",
        source=source,
        parts=tuple(parts),
        facts=facts,
        notes=tuple(notes),
    )


def inspect_exported(folder: Path, reading: Reading) -> Inspection:
    """Find out what ``lit-merge export`` has written: weights, and where they are from.

    Raises:
        InputError: Its record or its weights cannot be read.
    """
    record = read_json_object(folder / EXPORT)
    left_out = {"format_version", "fingerprint", "notes", "created", "head"}
    facts = {key: value for key, value in record.items() if key not in left_out and value}
    found = inspect_weights(_multi_task(folder, record), reading)
    warnings = list(found.warnings)
    named = record.get("fingerprint")
    if found.fingerprint is not None and named not in (None, found.fingerprint):
        warnings.append(
            f"{folder}: was exported as weights {str(named)[:8]}…, but holds "
            f"{found.fingerprint[:8]}…. They were changed since, or copied over."
        )
    return replace(
        found,
        path=str(folder),
        kind="exported",
        facts=facts,
        notes=(*found.notes, *(str(note) for note in record.get("notes", ()))),
        warnings=tuple(warnings),
    )


def inspect_adapter(folder: Path, reading: Reading) -> Inspection:
    """Find out what a PEFT LoRA adapter holds, without the model that it was trained on.

    Raises:
        InputError: It is no LoRA adapter that lit-merge knows.
    """
    config = read_adapter_config(folder)
    file = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise InputError(
            f"{folder}: must hold {ADAPTER_WEIGHTS[0]} beside its configuration; got no such file. "
            "Copy the whole adapter."
        )
    opened = SafetensorsFile(file) if file.suffix == ".safetensors" else open_torch_file(file)
    with opened as own:
        parts = sort_tensors(own)
        scalings = {module: config.scaling_of(module) for module in parts.factors}
        facts: dict[str, Any] = {
            "base_model": config.base_model or "not recorded",
            "rank": config.rank,
            "alpha": config.alpha,
            "scaling": sorted(set(scalings.values())),
            "adapted_modules": len(parts.factors),
            "replaced_tensors": len(parts.others),
        }
        if config.task_type:
            facts["task_type"] = config.task_type
        kinds = sorted({module.rpartition(".")[2] for module in parts.factors})
        facts["module_names"] = kinds
        notes: list[str] = []
        warnings: list[str] = []
        if reading.reads(own):
            reading.expect(own)
            notes, warnings = value_remarks(own, reading)
        untrained = [m for m, (_, up) in parts.factors.items() if not own.tensor(up).any()]
        if untrained:
            warnings.append(
                f"{own.path}: B is zero in {len(untrained)} of {len(parts.factors)} modules "
                f"({untrained[0]}), so that nothing is added there. Check that they were trained."
            )
        return Inspection(
            path=str(folder),
            kind="adapter",
            source="peft",
            fingerprint=fingerprint(own),
            parts=(part_of("adapter", own, folder),),
            tensors=tensors_of(own),
            facts=facts,
            notes=tuple(notes),
            warnings=tuple(warnings),
        )


def _lacks_weights(folder: Path) -> bool:
    """Return whether a merge was written as the adapter that is beside its record."""
    return (folder / "adapter_config.json").is_file()


def _adapter_of_merge(folder: Path, reading: Reading) -> Inspection:
    found = inspect_adapter(folder, reading)
    merge = read_json_object(folder / MERGE)
    facts = {"tasks": merge.get("tasks", []), **_merge_facts(merge, folder), **found.facts}
    return replace(found, kind="merged", facts=facts)


def _multi_task(folder: Path, record: Mapping[str, Any]) -> Path:
    """Return the file of an export of several tasks in one, or the folder of any other."""
    if record.get("format") == "multi_task" and (folder / str(record.get("file"))).is_file():
        return folder / str(record["file"])
    return folder


def _merge_facts(merge: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the method of a merge, and the entries in which it differs from a plain one."""
    facts: dict[str, Any] = {}
    try:
        if "method" in merge:
            facts["method"] = method_text(merge["method"])
        if merge.get("overrides"):
            facts["overrides"] = {p: _override(entry) for p, entry in merge["overrides"].items()}
        if int(merge.get("leaves", 0)) > len(merge.get("tasks", ())):
            facts["experts_in_all"] = merge["leaves"]  # those of merges that were merged
        if merge.get("traces"):
            facts["traces"] = dict(merge["traces"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{folder}: must hold the record of a merge; got a damaged one "
            f"({type(error).__name__}: {error}). Merge again."
        ) from error
    if merge.get("dtype"):
        facts["dtype"] = merge["dtype"]
    if merge.get("accumulate", "float32") != "float32":
        facts["accumulate"] = merge["accumulate"]
    return facts


def _override(entry: Mapping[str, Any]) -> str:
    """Return what is different for a pattern of tensors, in words."""
    if entry.get("method") is not None:
        return method_text(entry["method"])
    return str(entry["action"]) if entry.get("scale") is None else f"scale={entry['scale']}"


def _as_checkpoint(tensors: Checkpoint | Mapping[str, Tensor]) -> Checkpoint:
    return tensors if isinstance(tensors, Checkpoint) else open_state_dict(tensors)
