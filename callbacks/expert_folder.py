"""What the callbacks put into an expert folder: the module's weights, and what is known of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_merge.checkpoint import alignment, fingerprint, plain_names
from lit_merge.distributed import broadcast, failing_together, is_sharded, rank
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, add_to_expert, open_expert, write_expert
from lit_merge.expert.factors import factor_names
from lit_merge.expert.sharded import WholeTensors, write_hessian, write_sharded_expert
from lit_merge.parameters import detect_heads


def plain_names_of(module: nn.Module) -> dict[str, str]:
    """Return the plain name of each tensor of a module: without what torch.compile puts into it."""
    return plain_names(name for name, v in module.state_dict().items() if isinstance(v, Tensor))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module's state dict under plain names, not copied."""
    state = module.state_dict()
    return {plain: state[name] for name, plain in plain_names_of(module).items()}


def describe(module: nn.Module) -> ExpertInfo:
    """Return what a module itself tells: its heads, frozen and tied parameters."""
    parameters = list(module.named_parameters(remove_duplicate=False))
    uses: dict[int, list[str]] = {}
    for name, parameter in parameters:
        uses.setdefault(id(parameter), []).append(name)
    return ExpertInfo(
        head_parameters=detect_heads(module),
        frozen_parameters=tuple(n for n, p in parameters if not p.requires_grad),
        tied_parameters=tuple(tuple(names) for names in uses.values() if len(names) > 1),
        details={"module": f"{type(module).__module__}.{type(module).__qualname__}"},
    )


def fingerprint_of(module: nn.Module) -> str:
    """Return the fingerprint of a module's weights. Collective if they are sharded."""
    weights = weights_of(module)
    return fingerprint(WholeTensors(weights) if _any_sharded(weights) else weights)


def save_expert(
    path: Path,
    *,
    module: nn.Module,
    info: ExpertInfo,
    join: bool,
    replace_folder: bool,
    hessian: Mapping[str, Tensor] | None = None,
    activations: Mapping[str, Tensor] | None = None,
    gram: Mapping[str, Tensor] | None = None,
    kronecker: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an expert folder, or add to one that has the same weights. Collective.

    The first rank writes. Of sharded weights every rank gives its part, tensor by tensor.

    Args:
        path: The folder.
        module: Where the weights are taken from.
        info: What is known about the expert; entries that are None say nothing.
        join: Whether the folder is an expert folder of these weights, to be added to; their names
            may differ by a prefix. The same on every rank.
        replace_folder: Whether any other folder may be replaced.
        hessian: Σ over the training examples, by parameter name; sharded if the weights are.
        activations: Statistics by site.
        gram: Gram matrices by parameter name; only where the weights are whole.
        kronecker: Kronecker factors by parameter name and side; only where the weights are whole.

    Raises:
        InputError: On every rank, if the folder may not be written, or a value is not finite.
    """
    state = module.state_dict()
    weights = {name: state[name] for name in plain_names_of(module)}
    artifacts = {
        "hessian": hessian,
        "activations": activations,
        "gram": gram,
        "kronecker": kronecker,
    }
    given = {kind: tensors for kind, tensors in artifacts.items() if tensors is not None}
    if join:
        _join(path, module, info, given)
        return
    write = write_sharded_expert if _any_sharded(weights) else _write_on_first
    write(path, weights=weights, info=info, replace=replace_folder, **given)


def _write_on_first(path: Path, **contents: Any) -> None:
    with failing_together():
        if rank() == 0:
            write_expert(path, **contents)


def _join(
    path: Path,
    module: nn.Module,
    info: ExpertInfo,
    artifacts: Mapping[str, Mapping[str, Tensor]],
) -> None:
    plain = plain_names_of(module)
    found = fingerprint_of(module)
    there, aligned = info, dict[str, str]()
    with failing_together():
        if rank() == 0:
            expert = open_expert(path)
            there, aligned = expert.info, alignment(plain.values(), expert.weights)
            expert.close()
    aligned = broadcast(aligned)

    def names(group: Iterable[str]) -> tuple[str, ...]:
        return tuple(aligned[plain[name]] for name in group)

    changes: dict[str, Any] = {
        "details": {**there.details, **info.details},
        "head_parameters": names(info.head_parameters),
        "frozen_parameters": names(info.frozen_parameters),
        "tied_parameters": tuple(names(group) for group in info.tied_parameters),
    }
    for key in ("task", "estimator", "labels", "num_examples"):
        if getattr(info, key) is not None:
            changes[key] = getattr(info, key)
    new_names = {name: aligned[known] for name, known in plain.items()}
    new_names |= factor_names(new_names)
    given: dict[str, Any] = {
        kind: tensors
        if kind == "activations"  # whose names are those of modules
        else {new_names[name]: value for name, value in tensors.items()}
        for kind, tensors in artifacts.items()
    }
    if "hessian" in given and _any_sharded(weights_of(module)):
        write_hessian(path, given.pop("hessian"), replace(there, fingerprint=found))
    with failing_together():
        if rank() == 0:
            add_to_expert(path, weights_fingerprint=found, info_changes=changes, **given)


def _any_sharded(tensors: Mapping[str, Tensor]) -> bool:
    return any(map(is_sharded, tensors.values()))


def run_of(path: Path) -> str | None:
    """Return the identifier of the run that wrote an expert folder, None if nothing tells."""
    try:
        expert = open_expert(path)
    except InputError:
        return None
    expert.close()
    run = expert.info.details.get("run")
    return run if isinstance(run, str) else None


def with_details(info: ExpertInfo, **details: Any) -> ExpertInfo:
    """Return the same information with more details."""
    return replace(info, details={**info.details, **details})
