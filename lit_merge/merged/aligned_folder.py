"""The folder of aligned experts: their midpoint base, and every expert, proved to be the same.

An expert is the same as before when it gives the same outputs: each is run on the same inputs in
double precision before and after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_merge.alignment.expert_folder import permuted_expert
from lit_merge.alignment.generic_model import InFloat64
from lit_merge.alignment.groups import BASE, OpenGroup, midpoint
from lit_merge.alignment.several_models import Alignment
from lit_merge.alignment.symmetry import Symmetry
from lit_merge.checkpoint import Checkpoint, aligned, alignment, fingerprint, open_state_dict
from lit_merge.correction.forward import run_model
from lit_merge.errors import InputError
from lit_merge.expert import Expert, ExpertInfo, write_expert
from lit_merge.merged.network import expert_network
from lit_merge.streaming.provenance import copy_companions

_TOLERANCE = 1e-5  # of the largest output: how far an aligned expert may be from itself


def write_aligned(
    folder: Path,
    network: nn.Module,
    groups: Mapping[str, OpenGroup],
    symmetries: Sequence[Symmetry],
    found: Alignment,
    heads: Sequence[str],
    inputs: Any,
    *,
    begin: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Write the midpoint of the aligned bases and every aligned expert, and try each of them.

    Args:
        folder: Where to.
        network: The architecture.
        groups: Opened bases and experts; the first group is the reference.
        symmetries: What is permuted.
        found: The permutations by group.
        heads: Names in the network of the tensors that an expert may have in another shape.
        inputs: What the experts are run on, before and after; None where nothing is permuted.
        begin: Called with the description of each stage.

    Returns:
        What to record of each, by task: group, path, fingerprints, and how far its outputs are from
        those before.

    Raises:
        InputError: A tensor is NaN or infinite, or an expert does not compute what it did.
    """
    names, modules = tuple(network.state_dict()), [name for name, _ in network.named_modules()]
    begin("Writing the midpoint of the bases")
    bases = []
    for group, opened in groups.items():
        weights = permuted_expert(
            opened.base, symmetries, found.permutations[group], parameters=names, modules=modules
        ).weights
        renamed = alignment(weights, names)
        bases.append((renamed, {renamed[name]: value for name, value in weights.items()}))
    middle = midpoint(base for _, base in bases)
    first = {name: middle[model_name] for name, model_name in bases[0][0].items()}
    reference = next(iter(groups.values())).base
    info = ExpertInfo(
        head_parameters=reference.info.head_parameters,
        tied_parameters=reference.info.tied_parameters,
        details={"midpoint_of": [str(group.base.path) for group in groups.values()]},
    )
    write_expert(folder / BASE, weights=first, info=info)
    copy_companions(_folder_of(reference), folder / BASE, dtype=None)
    written: dict[str, dict[str, Any]] = {BASE: {"fingerprint": fingerprint(first)}}
    for group, opened in groups.items():
        permutations = found.permutations[group]
        for task, expert in opened.experts.items():
            begin(f"Trying and writing the expert {task}")
            moved = permuted_expert(
                expert, symmetries, permutations, parameters=names, modules=modules
            )
            after = open_state_dict(moved.weights, path=f"{expert.path} (aligned)")
            before = fingerprint(expert.weights)
            difference = 0.0
            if inputs is not None:
                difference = _difference(network, expert.weights, after, heads, inputs, task)
            info = dataclasses.replace(
                expert.info,
                task=expert.info.task or task,
                weights="model.safetensors",
                base_fingerprint=written[BASE]["fingerprint"],
                details={
                    **expert.info.details,
                    "aligned": {
                        "group": group,
                        "fingerprint": before,
                        "base_fingerprint": expert.info.base_fingerprint,
                        "moved_units": sum(num_moved(p) for p in permutations.values()),
                    },
                },
            )
            write_expert(folder / task, info=info, **vars(moved))
            copy_companions(_folder_of(expert), folder / task, dtype=None)
            written[task] = {
                "group": group,
                "path": str(expert.path),
                "fingerprint_before": before,
                "fingerprint": fingerprint(after),
                "difference": difference,
            }
    return written


def _difference(
    network: nn.Module,
    before: Checkpoint,
    after: Checkpoint,
    heads: Sequence[str],
    inputs: Any,
    task: str,
) -> float:
    """Return how far the outputs of a permuted expert are from its own, in double precision.

    Raises:
        InputError: They are further apart than rounding explains.
    """
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    infos = aligned(before, shapes).infos
    own = [n for n in heads if n in infos and infos[n].shape != tuple(shapes.get(n, ()))]
    one, other = (_outputs(network, weights, own, inputs, task=task) for weights in (before, after))
    largest = max(float(value.abs().max()) for value in one)
    apart = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
    difference = apart / largest if largest else apart
    if not difference <= _TOLERANCE:
        raise InputError(
            f"{before.path}: must compute the same when it is permuted; got outputs that differ by "
            f"{difference:.1e} of the largest. Report this with the model, and merge without "
            "alignment."
        )
    return difference


def _outputs(
    network: nn.Module, weights: Checkpoint, own: Sequence[str], inputs: Any, *, task: str
) -> list[Tensor]:
    """Return all floating tensors that an expert gives for inputs, in double precision."""
    expert = expert_network(network, weights, task=task, head_names=own)
    with expert.context.using(0), torch.no_grad(), InFloat64():  # type: ignore[no-untyped-call]
        found = run_model(expert.network.eval().double(), _double(inputs))
    tensors = (leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]


def _double(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: _double(value) for name, value in inputs.items()}
    floating = isinstance(inputs, Tensor) and inputs.is_floating_point()
    return inputs.double() if floating else inputs


def _folder_of(expert: Expert) -> str:
    path = expert.weights.path
    return str(path if path.is_dir() else path.parent)


def num_moved(permutation: Tensor) -> int:
    """Return how many units a permutation moves."""
    return int((permutation != torch.arange(len(permutation))).sum())
