"""A corrected folder in its architecture, and what its corrections do for one task."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.checkpoint import Checkpoint
from lit_merge.correction import RescaleShift, Site
from lit_merge.correction.folding import SiteAffine
from lit_merge.correction.site import input_of
from lit_merge.errors import InputError
from lit_merge.export.example_inputs import made_up_inputs, task_inputs
from lit_merge.export.leftover import HookedCorrection
from lit_merge.export.origin import base_entry
from lit_merge.merged.folder import CORRECTION, MergedParts, open_merged
from lit_merge.merged.network import MergedNetwork
from lit_merge.module import MergeModule
from lit_merge.tasks import ClassificationModule
from lit_merge.tasks.task import Task


@dataclass(frozen=True)
class Corrected:
    """A corrected folder, loaded.

    Attributes:
        path: The folder.
        merge: Contents of the ``merge.json`` of the merge that was corrected.
        architecture: The network that was corrected.
        network: The merged network with heads and corrections, in float32 (float64 where the
            architecture is).
        dtypes: Type of each shared tensor in the folder, by name in the architecture.
        num_classes: Number of classes of each task; None where it is not known.
    """

    path: Path
    merge: Mapping[str, Any]
    architecture: nn.Module
    network: MergedNetwork
    dtypes: Mapping[str, torch.dtype]
    num_classes: tuple[int | None, ...]

    def logits(self, inputs: Any, task: str) -> Tensor:
        """Return the logits of a task over its own classes, ``[B, C]``."""
        index = self.network.tasks.index(task)
        logits: Tensor = self.network(inputs, index)
        return logits[:, : self.num_classes[index]]

    def base_folder(self) -> Path | None:
        """Return the folder of the base, where it is one that lies here."""
        path = base_entry(self.merge).get("path")
        return Path(path) if isinstance(path, str) and Path(path).is_dir() else None


def is_corrected(path: str | Path) -> bool:
    """Return whether a path is a corrected folder."""
    return (Path(path) / CORRECTION).is_file()


def open_corrected(path: str | Path, model: nn.Module | None) -> Corrected:
    """Load a corrected folder into its architecture.

    Args:
        path: The folder.
        model: The architecture, or a ClassificationModule around it; None is an error.

    Raises:
        InputError: There is no architecture, or it is another one, or the folder is damaged.
    """
    if model is None:
        raise InputError(
            f"model: must be given for {path}, as corrections are folded into layers and the "
            f"result is run; got none. Give the network as for lit-merge correct: --model CLASS."
        )
    network = model.model if isinstance(model, ClassificationModule) else model
    network = copy.deepcopy(network).eval()
    if not any(p.dtype == torch.float64 for p in network.parameters()):
        network = network.float()
    module = MergeModule.from_folder(path, network)
    with open_merged(path) as parts:
        dtypes = _dtypes(parts)
        merge = dict(parts.merge)
    merged = module.network.requires_grad_(False).eval()
    return Corrected(Path(path), merge, network, merged, dtypes, merged.num_classes())


def _dtypes(parts: MergedParts) -> dict[str, torch.dtype]:
    assert isinstance(parts.weights, Checkpoint), "opened from a folder"
    return {name: info.dtype for name, info in parts.weights.infos.items()}


def site_affines(corrected: Corrected, task: str) -> tuple[SiteAffine, ...]:
    """Return what a task multiplies and adds at each site.

    Raises:
        InputError: A correction is no scale and shift.
    """
    index = corrected.network.tasks.index(task)
    found = []
    for site in corrected.network.sites:
        correction = corrected.network.corrections.at(site)
        if not isinstance(correction, RescaleShift):
            raise InputError(
                f"{corrected.path}: the correction at {site.name!r} must be a scale and shift to "
                f"be exported; got a {type(correction).__name__}. Use the folder by "
                f"MergeModule.from_folder."
            )
        scale, shift = correction.weight[index], correction.bias[index]
        found.append(SiteAffine(site, scale.detach(), shift.detach()))
    return tuple(found)


def hooked_corrections(
    corrected: Corrected, tasks: Sequence[str], sites: Collection[str]
) -> list[HookedCorrection]:
    """Return the corrections of some tasks that stay between the layers.

    Args:
        corrected: The folder.
        tasks: The tasks.
        sites: Names of the sites.

    Raises:
        InputError: A correction is no scale and shift.
    """
    found = []
    feature = corrected.network.final_feature
    surgery = feature.surgery
    indices = [corrected.network.tasks.index(task) for task in tasks]
    if surgery is not None and bool(surgery.up[indices].any()):
        site = Site(input_of(str(feature.layer)), surgery.down.shape[-1], -1)
        tensors = {"down": surgery.down[indices], "up": surgery.up[indices]}
        found.append(HookedCorrection(site, {k: v.detach() for k, v in tensors.items()}))
    by_task = [site_affines(corrected, task) for task in tasks]
    for affines in zip(*by_task, strict=True):
        if affines[0].site.name in sites:
            scale = torch.stack([affine.scale for affine in affines])
            shift = torch.stack([affine.shift for affine in affines])
            found.append(HookedCorrection(affines[0].site, {"weight": scale, "bias": shift}))
    return found


def example_inputs(
    corrected: Corrected, task: str, examples: Mapping[str, Task] | None
) -> tuple[Any, str]:
    """Return inputs for the proof, and whose they are: "given" or "made up".

    Raises:
        InputError: The examples are of other tasks, or none can be made up.
    """
    if examples:
        if task not in examples:
            raise InputError(
                f"examples: must have the task {task!r}; got {', '.join(examples)}. Add it, or "
                f"leave examples out."
            )
        return task_inputs(examples[task]), "given"
    return made_up_inputs(corrected.architecture, lambda x: corrected.logits(x, task)), "made up"


def in_dtype(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a tensor in another floating type; others stay as they are.

    Raises:
        InputError: A finite value is none in the type.
    """
    if not value.is_floating_point() or value.dtype == dtype:
        return value.detach()
    cast = value.detach().to(dtype)
    if bool((value.isfinite() & ~cast.isfinite()).any()):
        raise InputError(
            f"dtype: tensor {name!r} must fit {str(dtype).removeprefix('torch.')}; got values that "
            f"do not, {value.abs().max():g}. Export in a wider type: --dtype float32."
        )
    return cast
