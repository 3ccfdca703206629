"""Experts, checkpoints and single files of curvature: what is in them, and what does not fit.

A merge refuses an expert at the first thing that is wrong. An inspection says what is wrong and
goes on with the parts that can be read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, cast

from lit_merge.checkpoint import Checkpoint, fingerprint, is_inside, open_checkpoint
from lit_merge.errors import InputError
from lit_merge.expert import Expert, ExpertInfo, open_expert
from lit_merge.expert.contents import listed
from lit_merge.expert.info import read_info
from lit_merge.inspection.contents import Inspection, Kind, Part, part_of, tensors_of
from lit_merge.inspection.hessian import HessianValues, quality_of, read_hessian, summary_of
from lit_merge.inspection.training import training_state
from lit_merge.inspection.values import Reading, read_weights
from lit_merge.strict_json import parse_json

MEASURED = {
    "hessian.safetensors": "hessian",
    "activations.safetensors": "activations",
    "gram.safetensors": "gram",
    "kronecker.safetensors": "kronecker",
}
"""What an expert folder holds beside the weights, by file."""

_INFO = "expert.json"
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHOWN = 5  # sites of activation statistics


def inspect_weights(path: Path, reading: Reading) -> Inspection:
    """Find out what an expert or a checkpoint holds.

    Raises:
        InputError: There is nothing at the path of which a part could be read.
    """
    try:
        expert = open_expert(path)
    except InputError as error:
        found = _in_pieces(path, error, reading)
        if found is None:
            raise
        return found
    try:
        return _whole(path, expert, reading)
    finally:
        expert.close()


def inspect_measured(path: Path, reading: Reading) -> Inspection:
    """Find out what a file of curvature or activation statistics holds by itself.

    Raises:
        InputError: It cannot be read.
    """
    kind = MEASURED[path.name]
    with open_checkpoint(path) as measured:
        facts = dict(measured.metadata)
        traces: Mapping[str, float] = {}
        curvature, warnings = None, [*_other_owner(path, measured)]
        if kind == "hessian":
            reading.expect(measured)
            found = read_hessian(measured, reading)
            traces, warnings = found.traces, [*warnings, *found.warnings]
            curvature = summary_of(_info_beside(path), found)
        elif kind == "activations":
            facts |= _site_facts(measured)
        return Inspection(
            path=str(path),
            kind=cast(Kind, kind),
            source=measured.source,
            parts=(part_of(kind, measured, path),),
            tensors=tensors_of(measured, traces),
            curvature=curvature,
            facts=facts,
            warnings=tuple(warnings),
        )


def value_remarks(weights: Checkpoint, reading: Reading) -> tuple[list[str], list[str]]:
    """Read weights and return the notes and the warnings that their values give cause for."""
    values = read_weights(weights, reading)
    warnings = [
        f"{weights.file_of(name)}: tensor {name!r} holds {count:,} values that are NaN or infinite."
        " Take a checkpoint from before the training diverged."
        for name, count in list(values.not_finite.items())[:_SHOWN]
    ]
    if len(values.not_finite) > _SHOWN:
        warnings.append(f"{len(values.not_finite) - _SHOWN} more tensors hold NaN or infinity.")
    notes = [f"equal, tied or stored twice: {', '.join(group)}" for group in values.equal]
    return notes, warnings


def _whole(path: Path, expert: Expert, reading: Reading) -> Inspection:
    weights = expert.weights
    parts = [part_of("weights", weights, path)]
    facts: dict[str, Any] = {}
    known = expert.info.fingerprint is not None
    if known:
        facts |= _info_facts(expert.info)
    if isinstance(weights.path, Path) and weights.path.is_file():
        state = training_state(weights)
        parts += state.parts
        facts |= state.facts
    if reading.reads(weights):
        reading.expect(weights)
    traces: Mapping[str, float] = {}
    curvature = None
    warnings: list[str] = []
    if expert.hessian is not None:
        parts.append(part_of("hessian", expert.hessian, path))
        reading.expect(expert.hessian)
        found = read_hessian(expert.hessian, reading)
        traces, curvature = found.traces, summary_of(expert.info, found)
        warnings += found.warnings
    for name in ("activations", "gram", "kronecker"):
        measured = getattr(expert, name)
        if measured is not None:
            parts.append(part_of(name, measured, path))
    if expert.activations is not None:
        facts |= _site_facts(expert.activations)
    notes = list(expert.notes)
    if reading.reads(weights):
        told, wrong = value_remarks(weights, reading)
        notes += told
        warnings += wrong
    return Inspection(
        path=str(path),
        kind="expert" if known or curvature is not None else "checkpoint",
        source=weights.source,
        fingerprint=fingerprint(weights),
        parts=tuple(parts),
        tensors=tensors_of(weights, traces),
        curvature=curvature,
        facts=facts,
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def _in_pieces(path: Path, refused: InputError, reading: Reading) -> Inspection | None:
    """Return what can be read of an expert that was refused; None if that is nothing."""
    folder = path / "expert" if (path / "expert" / _INFO).is_file() else path
    if path.is_file():
        if not (path.parent / _INFO).is_file():
            return None
        folder = path.parent
    if not folder.is_dir():
        return None
    warnings, facts = [str(refused)], {}
    info = ExpertInfo()
    if (folder / _INFO).is_file():
        with suppress(InputError):  # that is what was refused
            info = read_info(folder / _INFO)
            facts = _info_facts(info)
    with ExitStack() as stack:
        parts: list[Part] = []
        weights = None
        with suppress(InputError):
            weights = stack.enter_context(open_checkpoint(folder / info.weights))
        if weights is None:
            with suppress(InputError):
                weights = stack.enter_context(open_checkpoint(folder))
        if weights is not None:
            parts.append(part_of("weights", weights, path))
            reading.expect(weights)
        else:
            found, missing = _shards_left(folder, stack)
            parts += [part_of("shard", shard, path) for shard in found]
            if missing:
                warnings.append(f"{folder}: lacks {listed(missing)}. Copy the missing shards.")
        values: HessianValues | None = None
        for file, name in MEASURED.items():
            with suppress(InputError):
                measured = stack.enter_context(open_checkpoint(folder / file))
                parts.append(part_of(name, measured, path))
                if name == "hessian":
                    reading.expect(measured)
                    values = read_hessian(measured, reading)
                    warnings += values.warnings
        if not parts:
            return None
        notes: list[str] = []
        if weights is not None:
            notes, wrong = value_remarks(weights, reading)
            warnings += wrong
        return Inspection(
            path=str(path),
            kind="expert" if (folder / _INFO).is_file() or values is not None else "checkpoint",
            source=weights.source if weights is not None else "huggingface",
            fingerprint=None if weights is None else fingerprint(weights),
            parts=tuple(parts),
            tensors=() if weights is None else tensors_of(weights, values.traces if values else {}),
            curvature=None if values is None else summary_of(info, values),
            facts=facts,
            notes=tuple(notes),
            warnings=tuple(warnings),
        )


def _shards_left(folder: Path, stack: ExitStack) -> tuple[list[Checkpoint], list[str]]:
    """Return the shards of an index that are there and open, and the names of the others."""
    index = next((folder / name for name in _INDICES if (folder / name).is_file()), None)
    if index is None:
        return [], []
    try:
        content = parse_json(index.read_bytes())
    except (OSError, ValueError):
        return [], []
    files = content.get("weight_map") if isinstance(content, dict) else None
    names = dict.fromkeys(files.values()) if isinstance(files, dict) else {}
    found, missing = [], []
    for name in names:
        if not isinstance(name, str) or not is_inside(name):
            continue
        try:
            found.append(stack.enter_context(open_checkpoint(folder / name)))
        except InputError:
            missing.append(name)
    return found, missing


def _other_owner(path: Path, measured: Checkpoint) -> Sequence[str]:
    """Return a warning where a file belongs to other weights than those that lie beside it."""
    owner = measured.metadata.get("fingerprint")
    if not owner:
        return ()
    try:
        with open_checkpoint(path.parent / _info_beside(path).weights) as weights:
            found = fingerprint(weights)
    except InputError:  # no weights beside it: nothing to compare with
        return ()
    if found == owner:
        return ()
    return (
        f"{path}: belongs to weights {owner[:8]}…, but those beside it are {found[:8]}…. "
        "Gather it again on these weights.",
    )


def _info_beside(path: Path) -> ExpertInfo:
    with suppress(InputError):
        if (path.parent / _INFO).is_file():
            return read_info(path.parent / _INFO)
    return ExpertInfo()


def _site_facts(statistics: Checkpoint) -> dict[str, Any]:
    """Return how many sites there are statistics of, and over how many positions."""
    sites = [name.removesuffix(".mean") for name in statistics if name.endswith(".mean")]
    counts = [
        int(statistics.tensor(f"{site}.count"))
        for site in sites
        if f"{site}.count" in statistics and statistics.infos[f"{site}.count"].numel == 1
    ]
    facts: dict[str, Any] = {"sites": len(sites)}
    if counts:
        facts["positions_per_site"] = max(counts)
        empty = [site for site, count in zip(sites, counts, strict=False) if count == 0]
        if empty:
            facts["sites_without_data"] = listed(empty)
    return facts


def _info_facts(info: ExpertInfo) -> dict[str, Any]:
    """Return the entries of ``expert.json`` that are shown as they are."""
    left_out = {"weights", "fingerprint", "reduction"}
    facts = {
        key: value
        for key, value in dataclasses.asdict(info).items()
        if value not in (None, (), {}) and key not in left_out
    }
    if quality_of(info) is not None:  # it stands with the curvature
        del facts["details"]["curvature"]["quality"]
    return facts
