"""Opening what goes into a merge: files and folders, or state dicts, under one set of names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.checkpoint import (
    AdapterCheckpoint,
    Checkpoint,
    RenamedCheckpoint,
    alignment,
    fingerprint,
    open_state_dict,
    require_no_factors,
)
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, open_expert
from lit_merge.expert.factors import factor_names
from lit_merge.location import Location, RemotePath, locate
from lit_merge.streaming.inputs import MergeInputs
from lit_merge.strict_json import parse_json

# Parts of a path that Lightning and people give to every run alike, and which name no task.
_NO_TASK = re.compile(
    r"expert|checkpoints?|lightning_logs|version_\d+|(pytorch_)?model|last|best|final"
    r"|epoch=\d+.*|step=\d+.*"
)
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@contextmanager
def open_inputs(
    base: str | Path | None,
    experts: Mapping[str, str | Path],
    base_hessian: str | Path | RemotePath | None,
) -> Iterator[MergeInputs]:
    """Open files and folders for a merge, and close them afterwards.

    Args:
        base: A checkpoint or expert folder, or None.
        experts: Expert folders or checkpoints by task name, or PEFT LoRA adapters of the base.
        base_hessian: A Hessian file, or a folder with one; it must belong to the base's weights.

    Raises:
        InputError: As :func:`lit_merge.expert.open_expert`.
    """
    with ExitStack() as stack:
        opened_base = prior = None
        if base_hessian is not None:
            if base is None:
                raise InputError(
                    f"base_hessian: must come with a base; got {str(base_hessian)!r} and no base. "
                    f"Give the base, or leave base_hessian out."
                )
            base_hessian = _hessian_file(base_hessian)
        notes: list[str] = []
        if base is not None:
            opened = open_expert(base, hessian=base_hessian)
            stack.callback(opened.close)
            opened_base = opened.weights
            require_no_factors(opened_base)
            prior = opened.hessian if base_hessian is not None else None
            notes += opened.notes if prior is not None else ()
        weights: dict[str, Checkpoint] = {}
        hessians: dict[str, Checkpoint] = {}
        infos: dict[str, ExpertInfo] = {}
        fingerprints: dict[str, str] = {}
        grams: dict[str, Checkpoint] = {}
        kronecker: dict[str, Checkpoint] = {}
        merges: dict[str, int] = {}
        reference = opened_base
        for task, path in experts.items():
            expert = open_expert(path, base=opened_base)
            stack.callback(expert.close)
            require_no_factors(expert.weights)
            reference = expert.weights if reference is None else reference
            names = alignment(expert.weights, reference)
            is_adapter = isinstance(expert.weights, AdapterCheckpoint)  # under the base's names
            weights[task] = (
                expert.weights if is_adapter else RenamedCheckpoint(expert.weights, names)
            )
            if expert.hessian is not None:
                hessians[task] = RenamedCheckpoint(expert.hessian, names)
            if expert.gram is not None:
                grams[task] = RenamedCheckpoint(expert.gram, names)
            if expert.kronecker is not None:
                kronecker[task] = RenamedCheckpoint(expert.kronecker, factor_names(names))
            leaves = merged_experts(path)
            if leaves is not None:
                merges[task] = leaves
            infos[task] = _renamed(expert.info, names)
            fingerprints[task] = fingerprint(expert.weights)
            notes += expert.notes
        yield MergeInputs(
            base=opened_base,
            experts=weights,
            hessians=hessians,
            base_hessian=prior,
            infos=infos,
            fingerprints=fingerprints,
            base_fingerprint=None if opened_base is None else fingerprint(opened_base),
            notes=tuple(notes),
            grams=grams,
            kronecker=kronecker,
            merges=merges,
        )


def merged_experts(path: str | Path) -> int | None:
    """Return how many experts a merged folder is made of; None for what is no merged folder.

    Raises:
        InputError: Its merge.json is damaged.
    """
    file = locate(path) / "merge.json"
    if not file.is_file():
        return None
    if (locate(path) / "masks").is_dir():
        raise InputError(
            f"{path}: must be one model to be merged; got a merge with a mask per task. Write a "
            f'task\'s model first: "lit-merge export --merged {path} --task …".'
        )
    try:
        content = parse_json(file.read_bytes())
        return int(content.get("leaves", len(content["tasks"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: must hold the record of a merge; got a damaged one "
            f"({type(error).__name__}: {error}). Merge again."
        ) from error


def inputs_in_memory(
    base: Mapping[str, Tensor] | None,
    experts: Mapping[str, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]],
    hessians: Mapping[str, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]] | None,
    base_hessian: Mapping[str, Tensor] | None,
) -> MergeInputs:
    """Make inputs of state dicts.

    Tensors of the base that share memory are taken as tied where they are equal in every expert and
    no Hessian tells them apart. Experts in a list are called "0", "1" and so on.

    Raises:
        InputError: An input is no state dict, or Hessians do not fit the experts.
    """
    by_task = _by_task(experts, "experts")
    weights: dict[str, Checkpoint] = {}
    named = base
    for (task, state), label in zip(by_task.items(), _labels(experts, "experts"), strict=True):
        named = named if named is not None else state
        opened = open_state_dict(state, path=label)
        weights[task] = RenamedCheckpoint(opened, alignment(opened, named))
    curvature: dict[str, Checkpoint] = {}
    if hessians is not None:
        given = _by_task(hessians, "hessians")
        alike = isinstance(hessians, Mapping) == isinstance(experts, Mapping)
        if not alike or set(given) != set(by_task):
            raise InputError(
                f"hessians: must be given as the experts are, one per expert "
                f"({', '.join(by_task)}); got {', '.join(given)}. Use the same task names, or "
                f"lists of the same order."
            )
        for (task, state), label in zip(given.items(), _labels(hessians, "hessians"), strict=True):
            curvature[task] = _hessian_in_memory(state, label, weights[task])
    opened_base = None if base is None else open_state_dict(base, path="base")
    prior = None
    if base_hessian is not None:
        if opened_base is None:
            raise InputError(
                "base_hessian: must come with a base; got None as base. Give the base, or leave "
                "base_hessian out."
            )
        prior = _hessian_in_memory(base_hessian, "base_hessian", opened_base)
    tied = tuple(
        group
        for group in _shared_memory(named or {})
        if all(_equal_in(expert, group) for expert in weights.values())
        and all(sum(name in hessian for name in group) <= 1 for hessian in curvature.values())
    )
    infos = {task: ExpertInfo(tied_parameters=tied) for task in by_task}
    return MergeInputs(opened_base, weights, curvature, prior, infos)


def tasks_of(
    experts: Mapping[str, str | Path] | Sequence[str | Path],
) -> dict[str, str | Path]:
    """Return the paths of experts by task name.

    In a list, an expert is called by the last part of its path that names something: ``runs/svhn``
    and ``runs/svhn/version_0/checkpoints/expert`` are both "svhn".

    Raises:
        InputError: There is no expert, or a name is missing, used twice, or cannot be a file's
            name.
    """
    if (
        isinstance(experts, str | Path)
        or not isinstance(experts, Mapping | Sequence)
        or not experts
    ):
        raise InputError(
            f"experts: must be one path or more, by task name or in a list; got {experts!r}. Give "
            f"the experts to merge."
        )
    if isinstance(experts, Mapping):
        named = dict(experts)
    else:
        named = {}
        for path in experts:
            task = _task_of(path)
            if task in named:
                raise InputError(
                    f"experts: must have a name for each; got {str(named[task])!r} and "
                    f"{str(path)!r}, both of which are called {task!r}. Give a mapping from task "
                    f"name to path."
                )
            named[task] = path
    for task, path in named.items():
        if not isinstance(task, str) or not re.fullmatch(r"[^\s./\\\0][^/\\\0]*", task):
            raise InputError(
                f"experts: must have task names that can name a file; got {task!r}. Use letters, "
                f"digits, '-' and '_'."
            )
        if not isinstance(path, str | Path):
            raise InputError(
                f"experts[{task!r}]: must be a path; got {path!r}. Give a folder or checkpoint "
                f"file."
            )
    return named


def _task_of(path: str | Path) -> str:
    absolute = Path(path).absolute()
    last = absolute.stem if absolute.suffix in _SUFFIXES else absolute.name
    for part in (last, *reversed(absolute.parent.parts)):
        if not _NO_TASK.fullmatch(part) and part != absolute.anchor:
            return part
    raise InputError(
        f"experts: must be in folders that name their tasks; got {str(path)!r}. Give a mapping "
        f"from task name to path."
    )


def _hessian_file(path: str | Path | RemotePath) -> Location:
    named = locate(path)
    if not named.is_dir():
        return named
    expert = open_expert(path)
    expert.close()
    if expert.hessian is None:
        raise InputError(
            f"{path}: must hold hessian.safetensors for a base_hessian; got none. Run "
            f'"lit-merge curvature" on the base, or leave base_hessian out.'
        )
    return expert.hessian.path


def _by_task(
    states: Mapping[str, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]], what: str
) -> dict[str, Mapping[str, Tensor]]:
    if not isinstance(states, Mapping | Sequence) or not states:
        raise InputError(
            f"{what}: must be state dicts, by task name or in a list; got {states!r}. Give one or "
            f"more."
        )
    named = states.items() if isinstance(states, Mapping) else enumerate(states)
    by_task = {str(key): state for key, state in named}
    for key, state in by_task.items():
        if not isinstance(state, Mapping):
            raise InputError(
                f"{what}[{key!r}]: must be a dict of tensors by name; got a "
                f"{type(state).__name__}. Give module.state_dict()."
            )
    return by_task


def _labels(states: Mapping[str, object] | Sequence[object], what: str) -> list[str]:
    keys = list(states) if isinstance(states, Mapping) else range(len(states))
    return [f"{what}[{key!r}]" for key in keys]


def _hessian_in_memory(state: Mapping[str, Tensor], label: str, weights: Checkpoint) -> Checkpoint:
    opened = open_state_dict(state, path=label)
    hessian = RenamedCheckpoint(opened, alignment(opened, weights))
    for name, info in hessian.infos.items():
        if name not in weights:
            raise InputError(
                f"{label}: must have the names of {weights.path}; got {name!r}, which is not "
                f"there. Give the Hessian of these weights."
            )
        wanted = weights.infos[name].shape
        if info.shape != wanted or not info.dtype.is_floating_point:
            raise InputError(
                f"{label}: tensor {name!r} must be of a floating type and of the shape "
                f"{list(wanted)} of {weights.path}; got {info.dtype}, {list(info.shape)}. Give the "
                f"Hessian of these weights."
            )
    return hessian


def _shared_memory(state: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    groups: dict[object, list[str]] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.numel() and not value.is_meta:
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
            groups.setdefault(key, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _equal_in(weights: Checkpoint, names: Sequence[str]) -> bool:
    present = [weights.tensor(name) for name in names if name in weights]
    return all(torch.equal(present[0], other) for other in present[1:])


def _renamed(info: ExpertInfo, names: Mapping[str, str]) -> ExpertInfo:
    def new(group: Iterable[str]) -> tuple[str, ...]:
        return tuple(names.get(name, name) for name in group)

    return replace(
        info,
        head_parameters=new(info.head_parameters),
        frozen_parameters=new(info.frozen_parameters),
        tied_parameters=tuple(new(group) for group in info.tied_parameters),
    )
