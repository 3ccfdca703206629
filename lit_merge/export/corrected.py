"""One task's plain model out of a corrected folder: its corrections are folded into the weights.

What cannot be folded is written as ``corrections.safetensors`` beside ``correction.py``, which
needs torch alone::

    import correction
    correction.apply(model, "corrections.safetensors")

Every export is proved: corrected and exported model run on the same inputs, in float32, and must
give the same logits up to 1e-5 of the largest. In ``export.json`` "correction" says

====================== =============================================================================
folded                 names of the sites that are in the weights
left                   the other sites, with the reason
code, file             names of the two files; null where nothing is left
error                  largest difference of logits, in units of the largest (or of 1)
examples, inputs       how many examples it was measured on, and whose: "given" or "made up"
====================== =============================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from lit_merge.checkpoint import Checkpoint, TensorInfo
from lit_merge.checkpoint.tensor_source import StateDict
from lit_merge.correction.folding import Folding, fold_corrections
from lit_merge.errors import InputError
from lit_merge.export.corrected_folder import (
    Corrected,
    example_inputs,
    hooked_corrections,
    in_dtype,
    open_corrected,
    site_affines,
)
from lit_merge.export.example_inputs import num_examples
from lit_merge.export.leftover import CORRECTIONS, HookedCorrection, written_corrections
from lit_merge.export.origin import merge_origin, recorded_expert, write_companions
from lit_merge.export.proof import CODE, prove
from lit_merge.export.task import (
    ExportFormat,
    ExportResult,
    require_format,
    under_expert_names,
    write_model,
    write_records,
)
from lit_merge.merged.plain_network import plain_network, tied_names
from lit_merge.merged.task_model import require_task
from lit_merge.output import new_folder
from lit_merge.streaming.progress import merge_progress
from lit_merge.streaming.request import dtype_of
from lit_merge.tasks.classification import read_logits
from lit_merge.tasks.task import Task

Fold = Literal["possible", "require"]


def export_corrected(
    merged: str | Path,
    task: str,
    output: str | Path,
    *,
    model: nn.Module | None,
    examples: Mapping[str, Task] | None = None,
    fold: Fold = "possible",
    format: ExportFormat = "safetensors",
    dtype: str | None = None,
    replace: bool = False,
    progress: bool = True,
) -> ExportResult:
    """Write one task's plain model with its corrections in the weights.

    The arguments are those of :func:`lit_merge.export.export_task`.

    Raises:
        InputError: The folder or the network is not as it should be, there is no such task, a site
            cannot be folded though it must, the proof fails, or the output is not free.
    """
    number = dtype_of(dtype)
    require_format(format)
    require_fold(fold)
    corrected = open_corrected(merged, model)
    require_task(task, corrected.network.tasks, path=merged)
    plain = plain_network(
        corrected.architecture,
        corrected.network.shared_state(),
        corrected.network.head_state().get(task, {}),
        task=task,
    )
    inputs, whose = example_inputs(corrected, task, examples)
    folding = _with_surgery(
        fold_corrections(
            plain, site_affines(corrected, task), lambda network: read_logits(network, inputs)
        ),
        hooked_corrections(corrected, (task,), ()),
    )
    if folding.left and fold == "require":
        raise InputError(
            f"fold: every site must fold into the weights of {type(plain).__name__}; got "
            f'{_listed(folding.left)}. Correct at other sites, or leave fold at "possible".'
        )
    weights = FoldedModel(corrected, folding, task=task, dtype=number)
    with (
        new_folder(output, replace=replace) as folder,
        merge_progress(shown=progress) as shown,
    ):
        expert = recorded_expert(corrected.merge, task, base=None)
        named = under_expert_names(weights, expert)
        error = _write_and_prove(folder, corrected, folding, inputs, task=task, names=named)
        classes = corrected.num_classes[corrected.network.tasks.index(task)]
        notes = (
            *expert.notes,
            *_notes(folding, dtype),
            *write_model(
                folder, named, weights, corrected.merge, expert,
                task=task, output=output, format=format, shown=shown,
            ),
            *write_companions(
                folder, corrected.base_folder(), expert,
                infos=weights.infos, classes=classes, differs=True,
            ),
        )  # fmt: skip
        write_records(
            folder,
            weights,
            named,
            corrected.merge,
            task=task,
            entries={
                **merge_origin(corrected.merge, corrected.path, task),
                "base": None,
                "mask": None,
                "correction": {
                    "folded": list(folding.folded),
                    "left": dict(folding.left),
                    "code": CODE if folding.left else None,
                    "file": CORRECTIONS if folding.left else None,
                    "error": error,
                    "examples": num_examples(inputs),
                    "inputs": whose,
                },
                "names": "merged" if expert.config is None else "expert",
                "format": format,
                "dtype": dtype,
                "notes": list(notes),
            },
        )
        num_bytes = sum(info.nbytes for info in weights.infos.values())
    return ExportResult(Path(output), task, num_bytes, None, notes, error)


class FoldedModel(StateDict):
    """A task's folded network as a checkpoint.

    Args:
        corrected: What it was made of.
        folding: The folded network.
        task: The task.
        dtype: The type of floating tensors; None for the folder's, tensor by tensor.

    Attributes:
        head: Shape and type of the task's own tensors.
        shared: Shape and type of the merged model's.
        tied: Groups of names that are one tensor.

    Raises:
        InputError: A value does not fit the type.
    """

    def __init__(
        self, corrected: Corrected, folding: Folding, *, task: str, dtype: torch.dtype | None
    ) -> None:
        state = {
            name: in_dtype(value, dtype or corrected.dtypes.get(name, value.dtype), name)
            for name, value in folding.network.state_dict().items()
        }
        super().__init__(state, path=corrected.path)
        own = corrected.network.head_state().get(task, {})
        self.head = {name: self.infos[name] for name in own}
        self.shared: dict[str, TensorInfo] = {
            name: TensorInfo(tuple(value.shape), value.dtype)
            for name, value in corrected.network.shared_state().items()
        }
        self.tied = tied_names(folding.network)


def require_fold(fold: str) -> None:
    """Check the word for what happens where a site cannot be folded.

    Raises:
        InputError: There is no such word.
    """
    if fold not in get_args(Fold):
        raise InputError(
            f"fold: must be one of {', '.join(get_args(Fold))}; got {fold!r}. Correct it."
        )


def _with_surgery(folding: Folding, surgery: Sequence[HookedCorrection]) -> Folding:
    """Return a folding that names representation surgery among what is left."""
    reasons = {s.site.name: "representation surgery is not linear" for s in surgery}
    return replaced(folding, left={**folding.left, **reasons})


def _write_and_prove(
    folder: Path,
    corrected: Corrected,
    folding: Folding,
    inputs: Any,
    *,
    task: str,
    names: Checkpoint,
) -> float:
    """Write what is left of the corrections, and return how exact the exported model is."""
    network, sites = corrected.network, corrected.network.sites
    left = hooked_corrections(corrected, (task,), folding.left)
    with written_corrections(folder, folding.network, left, names):
        return prove(
            lambda: corrected.logits(inputs, task),
            lambda: read_logits(folding.network, inputs),
            task=task,
            sites=sites,
            networks=(network.network, folding.network),
        )


def _notes(folding: Folding, dtype: str | None) -> tuple[str, ...]:
    notes = []
    if folding.left:
        notes.append(
            f"{len(folding.left)} of {len(folding.left) + len(folding.folded)} sites cannot be "
            f"folded and need {CODE}: {_listed(folding.left)}"
        )
    if dtype in ("bfloat16", "float16"):
        notes.append(f"the error is that of the weights before they were rounded to {dtype}")
    return tuple(notes)


def _listed(left: Mapping[str, str]) -> str:
    shown = [f"{name} ({reason})" for name, reason in list(left.items())[:3]]
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return ", ".join(shown) + more
