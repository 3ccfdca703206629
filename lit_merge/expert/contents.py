"""What may stand in an expert folder: the checks of its Hessian, activations and names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lit_merge.checkpoint import Checkpoint, fingerprint, open_state_dict, unwrapped
from lit_merge.checkpoint.tensor_source import require_tensors
from lit_merge.errors import InputError
from lit_merge.expert.info import ExpertInfo

_STATISTICS = ("count", "mean", "m2")


def renamed(info: ExpertInfo, rename: Callable[[str], str]) -> ExpertInfo:
    """Return the info with every name of a parameter replaced."""
    return replace(
        info,
        head_parameters=tuple(map(rename, info.head_parameters)),
        frozen_parameters=tuple(map(rename, info.frozen_parameters)),
        tied_parameters=tuple(tuple(map(rename, group)) for group in info.tied_parameters),
    )


def plain(tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return tensors under the names in which they are stored, without the parts of wrappers.

    Raises:
        InputError: If two names become one, or there is no tensor.
    """
    require_tensors(tensors, what)
    found = {unwrapped(name): value.detach() for name, value in tensors.items()}
    if len(found) < len(tensors):
        raise InputError(
            f"{what}: must have different names; got {len(tensors) - len(found)} that are equal "
            "without what wrappers add (_orig_mod.). Give the state dict of the inner module."
        )
    return found


def check_names(info: ExpertInfo, weights: Checkpoint) -> None:
    """Check that the info speaks of tensors that exist.

    Raises:
        InputError: Naming the entry and the names.
    """
    named = {
        "head_parameters": info.head_parameters,
        "frozen_parameters": info.frozen_parameters,
        "tied_parameters": tuple(n for group in info.tied_parameters for n in group),
    }
    for key, names in named.items():
        unknown = [name for name in names if name not in weights]
        if unknown:
            raise InputError(
                f"{key}: must be names of the weights; got {listed(unknown)}. "
                "Use the names of module.named_parameters()."
            )


def check_owners(
    artifacts: Sequence[Checkpoint], info: ExpertInfo, weights: Checkpoint
) -> tuple[str, ...]:
    """Check that what was measured was measured on these weights.

    Args:
        artifacts: Each with a fingerprint in its metadata, or that of the info.
        info: Of the expert.
        weights: Whose fingerprint is taken, once, if there is any to compare with.

    Returns:
        A note for each artifact of which nothing says whose it is.

    Raises:
        InputError: One belongs to other weights.
    """
    notes, found = [], None
    for artifact in artifacts:
        owner = artifact.metadata.get("fingerprint", info.fingerprint)
        if owner is None:
            notes.append(f"{artifact.path}: no expert.json: curvature taken as it is")
            continue
        found = found or fingerprint(weights)
        if owner != found:
            diagonal = artifact.path.name not in ("gram.safetensors", "kronecker.safetensors")
            fix = 'Run "lit-merge curvature" on' if diagonal else "Gather it again on"
            raise InputError(
                f"{artifact.path}: belongs to weights {owner[:8]}…, but {weights.path} is "
                f"{found[:8]}…. {fix} these weights."
            )
    return tuple(notes)


def check_finite(tensors: Mapping[str, Tensor], what: str, fix: str) -> None:
    """Check that no tensor holds NaN or infinity.

    Raises:
        InputError: Naming the first tensor that does.
    """
    for name, value in tensors.items():
        # torch has no isfinite for the types of one byte.
        values = value.float() if value.dtype.itemsize == 1 else value
        if not bool(torch.isfinite(values).all()):
            raise InputError(
                f"{what}: tensor {name!r} must be finite in {str(value.dtype).split('.')[-1]}; "
                f"got NaN or infinity. {fix}"
            )


def checked_hessian(hessian: Mapping[str, Tensor], weights: Checkpoint) -> dict[str, Tensor]:
    """Return a Hessian as it is stored: under plain names, fp32, on the CPU.

    Args:
        hessian: Sums over examples by parameter name.
        weights: What it belongs to, under plain names.

    Raises:
        InputError: If a value is NaN, infinite or negative, or a tensor does not fit the weights.
    """
    given = plain(hessian, "hessian")
    check_hessian(open_state_dict(given, path="hessian"), weights)
    check_finite(given, "hessian", "Check the loss on the training data.")
    stored = {n: v.to(device="cpu", dtype=torch.float32) for n, v in given.items()}
    check_finite(stored, "hessian", "Give a Hessian that float32 can hold.")
    for name, value in stored.items():
        check_not_negative(name, value)
    return stored


def check_not_negative(name: str, value: Tensor) -> None:
    """Check that a tensor of a Hessian can be a sum of squares.

    Raises:
        InputError: It has a negative entry.
    """
    if bool((value < 0).any()):
        raise InputError(
            f"hessian: tensor {name!r} must not be negative; got {float(value.min()):g}. "
            "Give sums of squared gradients."
        )


def check_hessian(hessian: Checkpoint, weights: Checkpoint) -> None:
    """Check, from headers alone, that a Hessian fits weights, of which it may lack some.

    Raises:
        InputError: If a name is not in the weights, or a shape or type differs.
    """
    fix = 'Run "lit-merge curvature" on these weights.'
    for name, info in hessian.infos.items():
        file = hessian.file_of(name)
        if name not in weights:
            raise InputError(
                f"{file}: must have the names of {weights.path}; got {name!r}, which is not "
                f"there. {fix}"
            )
        wanted = weights.infos[name].shape
        if info.shape != wanted:
            raise InputError(
                f"{file}: tensor {name!r} must have the shape {list(wanted)} of "
                f"{weights.file_of(name)}; got {list(info.shape)}. {fix}"
            )
        if not info.dtype.is_floating_point:
            raise InputError(
                f"{file}: tensor {name!r} must be of a floating type; got {info.dtype}. {fix}"
            )


def checked_activations(activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return activation statistics as they are stored: under plain names, on the CPU.

    Raises:
        InputError: If a value is NaN or infinite, or a site is not complete.
    """
    stored = {name: value.cpu() for name, value in plain(activations, "activations").items()}
    check_finite(stored, "activations", "Check the model's outputs on the data.")
    check_activations(open_state_dict(stored, path="activations"))
    return stored


def check_activations(statistics: Checkpoint) -> None:
    """Check, from headers alone, that each site has a count [], a mean [C] and an m2 [C].

    Raises:
        InputError: Naming the first tensor that does not belong or has another shape.
    """
    fix = "Gather the activation statistics again."
    for name, info in statistics.infos.items():
        site, _, kind = name.rpartition(".")
        absent = [k for k in _STATISTICS if f"{site}.{k}" not in statistics]
        if kind not in _STATISTICS or absent:
            lacking = f" without {absent[0]}" if kind in _STATISTICS else ""
            raise InputError(
                f"{statistics.path}: must hold count, mean and m2 of each site; got {name!r}"
                f"{lacking}. {fix}"
            )
        shape = () if kind == "count" else statistics.infos[f"{site}.mean"].shape
        if info.shape != shape or (kind != "count" and len(shape) != 1):
            wanted = "no axes" if kind == "count" else "one axis, the channels of the mean"
            raise InputError(
                f"{statistics.path}: tensor {name!r} must have {wanted}; "
                f"got shape {list(info.shape)}. {fix}"
            )


def listed(names: Iterable[str]) -> str:
    """Return the first three names, and how many more there are."""
    every = list(names)
    first = ", ".join(every[:3])
    return first if len(every) <= 3 else f"{first} and {len(every) - 3} more"
