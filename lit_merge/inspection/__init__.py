"""What a path holds: kind, tensors, sizes, types, a summary of its curvature, and what is wrong.

Headers tell most of it. Weights and Hessian are read once in chunks, for the trace, the zeros, NaN,
and tensors that are the same. Nothing is unpickled but tensors.

=============== ===================================================================================
module          holds
=============== ===================================================================================
contents        what an inspection says
weights         experts, checkpoints, single files of curvature
training        what a Lightning or torch checkpoint holds beside its weights
folders         merged, corrected, aligned and exported folders, adapters
records         evaluations, forecasts, configurations, runs of recipes
hessian, values reading every value once
surroundings    leftovers of runs that were stopped
comparison      several experts side by side
=============== ===================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lit_merge.checkpoint.adapter import adapter_folder
from lit_merge.checkpoint.adapter_config import CONFIG as ADAPTER
from lit_merge.errors import InputError
from lit_merge.inspection.comparison import compare
from lit_merge.inspection.contents import CurvatureSummary, Inspection, Part, TensorSummary
from lit_merge.inspection.folders import (
    ALIGN,
    EXPORT,
    inspect_adapter,
    inspect_aligned,
    inspect_exported,
    inspect_merged,
)
from lit_merge.inspection.records import (
    STEPS,
    YAML,
    inspect_configuration,
    inspect_record,
    inspect_run,
)
from lit_merge.inspection.surroundings import leftovers
from lit_merge.inspection.values import Reading
from lit_merge.inspection.weights import MEASURED, inspect_measured, inspect_weights
from lit_merge.location import is_remote
from lit_merge.merged.folder import CORRECTION, MERGE

__all__ = ["CurvatureSummary", "Inspection", "Part", "TensorSummary", "compare", "inspect_path"]

_OF_FOLDER = (MERGE, CORRECTION, ALIGN, EXPORT, ADAPTER, "expert.json", "config.json")
_CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_KNOWN = (
    "checkpoints (.safetensors, .ckpt, .pt, .pth, .bin; Hugging Face, timm and distributed "
    "folders; PEFT adapters), what lit-merge writes (expert, merged, corrected, aligned and "
    "exported folders, evaluation.json, forecast.json, runs of recipes) and YAML configurations"
)


def inspect_path(
    path: str | Path,
    *,
    advance: Callable[[int, int], None] | None = None,
    values: bool = True,
) -> Inspection:
    """Find out what a path holds.

    Args:
        path: A file or folder of any kind that lit-merge reads or writes, or the URL of a
            checkpoint.
        advance: Called with the bytes read so far and in all while values are read.
        values: Whether to read the weights' values, for NaN and equal tensors; those of a Hessian
            are read in any case.

    Raises:
        InputError: If there is nothing at the path, or nothing that lit-merge knows, or it is too
            damaged to say anything about.
    """
    reading = Reading(advance, values=values)
    if is_remote(path):
        return inspect_weights(Path(path), reading)
    named = Path(path)
    if not named.exists():
        raise InputError(f"{path}: must exist; got no such file or folder. Check the path.")
    found = _inspect_folder(named, reading) if named.is_dir() else _inspect_file(named, reading)
    return replace(found, warnings=(*found.warnings, *leftovers(named)))


def _inspect_folder(folder: Path, reading: Reading) -> Inspection:
    if (folder / CORRECTION).is_file() or (folder / MERGE).is_file():
        return inspect_merged(folder, reading)
    if (folder / ALIGN).is_file():
        return inspect_aligned(folder)
    if (folder / EXPORT).is_file():
        return inspect_exported(folder, reading)
    if (folder / STEPS).is_dir() and any((folder / STEPS).glob("*.yaml")):
        return inspect_run(folder)
    if (folder / ADAPTER).is_file():
        return inspect_adapter(folder, reading)
    return inspect_weights(folder, reading)


def _inspect_file(file: Path, reading: Reading) -> Inspection:
    if file.name in _OF_FOLDER:
        return _inspect_folder(file.parent, reading)
    if file.name in MEASURED:
        return inspect_measured(file, reading)
    adapter = adapter_folder(file)
    if isinstance(adapter, Path) and adapter != file:
        return inspect_adapter(adapter, reading)
    if file.suffix in YAML:
        return inspect_configuration(file)
    if file.suffix == ".json" and not file.name.endswith(".index.json"):
        return inspect_record(file)
    try:
        return inspect_weights(file, reading)
    except InputError as error:
        if file.suffix in _CHECKPOINTS or file.name.endswith(".index.json"):
            raise
        raise InputError(
            f"{file}: must be something that lit-merge knows; got another kind of file. "
            f"Known are {_KNOWN}."
        ) from error
