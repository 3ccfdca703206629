"""Aligning experts whose bases differ: groups of experts by base, brought into one order of units.

Fine-tuning hardly reorders units, so each group is permuted as a whole: its base is matched with
the first group's, and its experts follow. The folder that is written holds

============================ ======================================================================
``base/``                    the midpoint of the aligned bases, from which to merge
``<task>/``                  each expert, complete: weights, Hessian, activation statistics,
                             ``expert.json``
``permutations.safetensors`` ``<group>/<symmetry>``, int64: the new unit u is the old ``p[u]``
``align.json``               groups, symmetries, what was matched and how well
============================ ======================================================================

Every expert is run before and after on the same inputs, and must give the same outputs. With
``by="none"`` nothing is permuted: the folder holds the midpoint of the bases and the experts as
they are, and no permutations.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.alignment.activation_matching import gather_cross_moments
from lit_merge.alignment.groups import (
    BASE,
    ExpertGroup,
    OpenGroup,
    check_groups,
    head_names,
    open_groups,
)
from lit_merge.alignment.proof import Proof
from lit_merge.alignment.settings import AlignSettings, Choice
from lit_merge.alignment.several_models import Alignment, By, Likeness, align_state_dicts, pairs_of
from lit_merge.alignment.symmetries import search_symmetries
from lit_merge.alignment.symmetry import Symmetry
from lit_merge.checkpoint import (
    aligned,
    load_into,
    save_tensors,
)
from lit_merge.errors import InputError
from lit_merge.expert import Expert
from lit_merge.expert.info import current_versions
from lit_merge.heads import detect_heads
from lit_merge.merged.aligned_folder import num_moved, write_aligned
from lit_merge.output import new_folder, require_free
from lit_merge.streaming.progress import stages
from lit_merge.tasks import ClassificationModule, MultiTaskDataModule, Task

__all__ = ["AlignResult", "ExpertGroup", "align"]

FORMAT_VERSION = 1
RECORD = "align.json"
PERMUTATIONS = "permutations.safetensors"

_TRACED = 4  # examples with which a model is traced, proved and compared with itself


@dataclass(frozen=True)
class AlignResult:
    """What was aligned.

    Attributes:
        path: The folder that was written.
        groups: Names of the groups; the first is the reference.
        symmetries: What could be permuted.
        rejected: Symmetries that the proof rejected, with its error.
        alignment: The permutations by group, and how well they match.
        differences: By task, how far the aligned expert's outputs are from its own before, as a
            share of the largest.
    """

    path: Path
    groups: tuple[str, ...]
    symmetries: tuple[Symmetry, ...]
    rejected: Mapping[str, float]
    alignment: Alignment
    differences: Mapping[str, float]


def align(
    model: nn.Module,
    groups: Mapping[str, ExpertGroup],
    output: str | Path,
    *,
    tasks: Mapping[str, Task] | None = None,
    by: Choice = "auto",
    example_inputs: Any = None,
    input_shape: Sequence[int] | None = None,
    calibration_examples: int = 256,
    batch_size: int = 64,
    likeness: Likeness = "covariance",
    activation_weight: float = 10.0,
    curvature: bool = False,
    cycle_consistent: bool = False,
    seed: int = 0,
    replace: bool = False,
    progress: bool = True,
) -> AlignResult:
    """Bring groups of experts with a base each into the order of the first group's units.

    Args:
        model: The architecture: a network, or a ClassificationModule, whose network is taken; it
            stays as it is, and its weights do not matter.
        groups: Base and experts by group; the first group is the reference.
        output: The folder to write.
        tasks: Where unlabelled examples come from, for matching by activations.
        by: What is matched: "weights", "activations", "both"; "auto" is "activations" with tasks,
            "weights" without; "none" permutes nothing.
        example_inputs: A few inputs to trace the model with; None for some of the tasks' examples,
            or else for random inputs of input_shape, or as a model of transformers or timm tells.
        input_shape: Shape of one input without the batch, such as (3, 224, 224).
        calibration_examples: How many examples of each task are used.
        batch_size: How many of them at a time.
        likeness: What activations are compared by: "covariance", in which large ones count for
            more, or "correlation".
        activation_weight: For "both": how often the activations count.
        curvature: Whether to weight the comparison of weights by the bases' Hessians.
        cycle_consistent: Whether every base is matched with all others, not with the first alone.
        seed: Of random inputs and choices, and of the order in which symmetries are visited.
        replace: Whether an existing folder may be replaced.
        progress: Whether to show on the standard error what is being done.

    Returns:
        What was aligned.

    Raises:
        InputError: A group has no experts, two have the same task, a tensor is missing or NaN, the
            architectures differ, an option is out of range, the model has no symmetry that can be
            proved, or an aligned expert does not compute what it did.
    """
    require_free(output, replace=replace)
    network = model.model if isinstance(model, ClassificationModule) else model
    check_groups(groups)
    options = AlignSettings(
        by=by,
        likeness=likeness,
        activation_weight=activation_weight,
        curvature=curvature,
        cycle_consistent=cycle_consistent,
        calibration_examples=calibration_examples,
        batch_size=batch_size,
        seed=seed,
    )
    chosen = _what_to_match(by, tasks)
    calibration, inputs = {}, None
    if chosen != "none":
        calibration = _calibration(tasks or {}, calibration_examples, seed)
        inputs = example_inputs
        if inputs is None:
            inputs = _example_inputs(network, input_shape, calibration, seed)
    with open_groups(groups) as opened, stages(shown=progress) as begin:
        heads = tuple(
            dict.fromkeys((*detect_heads(network), *head_names(opened, network.state_dict())))
        )
        if chosen == "none":
            proof, found = Proof(()), Alignment.of_nothing(tuple(groups))
        else:
            proof, found = _matched(
                network, opened, heads, inputs, calibration, chosen, options, begin
            )
        with new_folder(output, replace=replace) as folder:
            written = write_aligned(
                folder, network, opened, proof.proved, found, heads, inputs, begin=begin
            )
            settings = {
                "by": chosen,
                "likeness": likeness,
                "activation_weight": activation_weight,
                "curvature": curvature,
                "cycle_consistent": cycle_consistent,
                "seed": seed,
                "tasks": list(calibration),
                "calibration_examples": calibration_examples,
            }
            record = _record(found, proof, groups, written, settings)
            text = json.dumps(record, indent=2, ensure_ascii=False)
            (folder / RECORD).write_text(text + "\n", encoding="utf-8")
            flat = {
                f"{group}/{name}": permutation
                for group, own in found.permutations.items()
                for name, permutation in own.items()
            }
            if flat:
                save_tensors(folder / PERMUTATIONS, flat)
    differences = {task: entry["difference"] for task, entry in written.items() if task != BASE}
    return AlignResult(
        Path(output), tuple(groups), proof.proved, proof.rejected, found, differences
    )


def _what_to_match(by: Choice, tasks: Mapping[str, Task] | None) -> By:
    """Return what "auto" stands for, or the choice.

    Raises:
        InputError: Activations are to be matched without tasks.
    """
    if by in ("activations", "both") and not tasks:
        raise InputError(
            f"tasks: must be given to match by {by!r}; got none. Name tasks with unlabelled "
            'examples, or match by weights: by="weights".'
        )
    return by if by != "auto" else "activations" if tasks else "weights"


def _matched(
    network: nn.Module,
    groups: Mapping[str, OpenGroup],
    heads: Sequence[str],
    inputs: Any,
    calibration: Mapping[str, Any],
    by: By,
    options: AlignSettings,
    begin: Callable[[str], None],
) -> tuple[Proof, Alignment]:
    """Return the symmetries of the bases, proved, and the permutations that match them.

    Args:
        network: The architecture.
        groups: Opened bases and experts; the first group is the reference.
        heads: Names of tensors that are not compared.
        inputs: What the model is traced with.
        calibration: Inputs by task, to match activations.
        by: What is matched.
        options: How.
        begin: Called with the description of each stage.

    Raises:
        InputError: There is no symmetry, or a base does not fit the network.
    """
    bases = {name: _loaded(network, group.base, heads) for name, group in groups.items()}
    begin("Looking for permutation symmetries, and proving each")
    proof = search_symmetries(next(iter(bases.values())), inputs)
    if not proof.proved:
        raise InputError(
            f"model: must have permutation symmetries that can be proved; got none in "
            f'{type(network).__name__}. Merge without alignment: by="none".'
        )
    size, cycle = options.batch_size, options.cycle_consistent
    activations = None
    if by != "weights":
        begin(f"Running the bases of {', '.join(groups)} on examples of {', '.join(calibration)}")
        activations = gather_cross_moments(
            tuple(bases.values()),
            (batch for every in calibration.values() for batch in _batches(every, size)),
            proof.proved,
            pairs=pairs_of(len(bases), cycle_consistent=cycle),
        )
    begin(f"Matching the units of {', '.join(groups)} in {len(proof.proved)} symmetries")
    found = align_state_dicts(
        {name: base.state_dict() for name, base in bases.items()},
        proof.proved,
        by=by,
        activations=activations,
        likeness=options.likeness,
        activation_weight=options.activation_weight,
        hessians=_base_hessians(groups, tuple(network.state_dict())) if options.curvature else None,
        cycle_consistent=cycle,
        left_out=heads,
        seed=options.seed,
    )
    return proof, found


def _calibration(tasks: Mapping[str, Task], count: int, seed: int) -> dict[str, Any]:
    """Return the inputs of some examples of each task."""
    if not tasks:
        return {}
    data = MultiTaskDataModule(dict(tasks))
    return {
        task: data.calibration_batch(task, num_examples=count, seed=seed)[0] for task in data.tasks
    }


def _batches(inputs: Any, size: int) -> Iterator[Any]:
    """Yield batched inputs, a tensor or a mapping of tensors, in parts."""
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    for start in range(0, len(first), size):
        if isinstance(inputs, Mapping):
            yield {name: value[start : start + size] for name, value in inputs.items()}
        else:
            yield inputs[start : start + size]


def _example_inputs(
    network: nn.Module, shape: Sequence[int] | None, calibration: Mapping[str, Any], seed: int
) -> Any:
    """Return a few inputs: of the tasks, of a given shape, or what the model tells of itself."""
    if calibration:
        return next(_batches(next(iter(calibration.values())), _TRACED))
    if shape is None:
        dummy = getattr(network, "dummy_inputs", None)  # transformers
        if isinstance(dummy, Mapping) and dummy:
            return dict(dummy)
        settings = getattr(network, "pretrained_cfg", None)  # timm
        shape = settings.get("input_size") if isinstance(settings, Mapping) else None
    if not shape:
        raise InputError(
            f"input_shape: must say what {type(network).__name__} takes, as there are no tasks; "
            "got none. Give the shape of one input, [3, 224, 224] for instance, or tasks."
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(_TRACED, *shape, generator=generator)


def _loaded(network: nn.Module, base: Expert, heads: Sequence[str]) -> nn.Module:
    """Return the network with the weights of a base; its head is of no account."""
    copy = deepcopy(network)
    load_into(copy, aligned(base.weights, copy.state_dict()), ignore=heads)
    return copy.eval()


def _base_hessians(
    groups: Mapping[str, OpenGroup], parameters: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """Return the bases' mean Hessians by group, under the model's names."""
    found = {}
    for name, group in groups.items():
        if group.base.hessian is None:
            raise InputError(
                f"{group.base.path}: must have a Hessian to weight the matching by it; got no "
                'hessian.safetensors. Run "lit-merge curvature" on the bases, or leave curvature '
                "out."
            )
        hessian = aligned(group.base.hessian, parameters)
        count = group.base.info.num_examples or 1
        found[name] = {entry: hessian.tensor(entry) / count for entry in hessian}
    return found


def _record(
    found: Alignment,
    proof: Proof,
    groups: Mapping[str, ExpertGroup],
    written: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what ``align.json`` says."""
    return {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "reference": next(iter(groups)),
        "groups": {name: dataclasses.asdict(group) for name, group in groups.items()},
        "settings": dict(settings),
        "objective": {"before": found.before, "after": found.after},
        "symmetries": [
            {
                "name": s.name,
                "size": s.size,
                "inside": s.inside,
                "tensors": sorted({axis.name for axis in s.axes}),
                "moved": {g: num_moved(p[s.name]) for g, p in found.permutations.items()},
                "similarity": {g: own[s.name] for g, own in found.similarity.items()},
            }
            for s in proof.proved
        ],
        "proof": {"error": proof.error, "rejected": dict(proof.rejected)},
        "written": {task: dict(entry) for task, entry in written.items()},
        "versions": current_versions(),
    }
