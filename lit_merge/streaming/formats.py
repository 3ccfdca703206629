"""In what form the merged weights are handed out: what is done after the stream has ended.

The stream writes safetensors. Other forms are made of these, tensor by tensor, and take their
place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lit_merge.checkpoint import AdapterCheckpoint, Checkpoint, open_checkpoint
from lit_merge.checkpoint.adapter_writer import adapted_weights, largest_rank, write_adapter
from lit_merge.checkpoint.dcp_writer import write_distributed
from lit_merge.checkpoint.lightning_writer import write_lightning_checkpoint
from lit_merge.errors import InputError
from lit_merge.streaming.inputs import MergeInputs
from lit_merge.streaming.plan import MergePlan
from lit_merge.streaming.request import Request
from lit_merge.streaming.shards import INDEX, shards_of

_CHECKPOINT = "model.ckpt"
_META = "meta.pt"  # what Lightning writes beside the parts of a distributed checkpoint


def require_format(inputs: MergeInputs, request: Request) -> None:
    """Check, before anything is read, that the weights can be written as was asked.

    Raises:
        InputError: They cannot.
    """
    if request.rank is not None and request.format != "adapter":
        raise InputError(
            f"rank: must come with format: adapter; got {request.rank} and format "
            f"{request.format}. Leave it out."
        )
    if request.format != "adapter":
        return
    if inputs.base is None:
        raise InputError(
            "format: must have a base to write an adapter of; got adapter and no base. Give the "
            "base."
        )
    if not any(isinstance(expert, AdapterCheckpoint) for expert in inputs.experts.values()):
        raise InputError(
            "format: must have an expert that is an adapter, to know which layers to adapt; got "
            "adapter and whole models. Write a whole model: format: safetensors."
        )


def convert(
    folder: Path,
    inputs: MergeInputs,
    plan: MergePlan,
    request: Request,
    *,
    before_removal: Callable[[], None],
) -> tuple[str, tuple[str, ...]]:
    """Bring the weights in a folder into the form that was asked for.

    Args:
        folder: Holds safetensors files.
        inputs: What was merged.
        plan: What was done.
        request: What was asked for.
        before_removal: Called when the new form is written, before the safetensors files go.

    Returns:
        The file of the weights, in the folder, and what a user should be told.

    Raises:
        InputError: The form has no place for what was merged.
    """
    files = list(shards_of(plan.infos, request.shard_bytes))
    weights = files[0] if len(files) == 1 else INDEX
    notes: tuple[str, ...] = ()
    if request.format == "safetensors":
        return weights, notes
    with open_checkpoint(folder) as merged:
        if request.format == "lightning":
            path = inputs.reference.path
            by_lightning = inputs.reference.source == "lightning" and isinstance(path, Path)
            template = str(path) if by_lightning else None
            notes = write_lightning_checkpoint(folder / _CHECKPOINT, merged, template)
            weights = _CHECKPOINT
        elif request.format == "distributed":
            notes = _write_distributed(folder, merged, inputs)
            weights = "."
        else:
            notes = _write_adapter(folder, merged, inputs, request)
            weights = "."
    before_removal()
    for file in (*files, *([INDEX] if len(files) > 1 else ())):
        (folder / file).unlink()
    return weights, notes


def _write_distributed(folder: Path, merged: Checkpoint, inputs: MergeInputs) -> tuple[str, ...]:
    path = inputs.reference.path
    by_lightning = isinstance(path, Path) and (path / _META).exists()
    parts = folder / "parts"
    notes = write_distributed(
        parts,
        merged,
        key="state_dict" if by_lightning else None,
        template=str(path) if by_lightning else None,
    )
    for part in list(parts.iterdir()):
        part.rename(folder / part.name)
    parts.rmdir()
    return notes


def _write_adapter(
    folder: Path, merged: Checkpoint, inputs: MergeInputs, request: Request
) -> tuple[str, ...]:
    experts: Sequence[Checkpoint] = list(inputs.experts.values())
    first = next(expert for expert in experts if isinstance(expert, AdapterCheckpoint))
    assert inputs.base is not None  # require_format has seen to it
    rank = request.rank or largest_rank(experts)
    written = write_adapter(
        folder,
        inputs.base,
        merged,
        rank=rank,
        weights=adapted_weights(experts),
        base_model=first.config.base_model,
        task_type=first.config.task_type,
    )
    return (
        f"the merged update was cut to rank {rank} by its singular values, with a relative error "
        f"of {100 * written.relative_error:.3g} %; truncation.json has it by weight",
    )
