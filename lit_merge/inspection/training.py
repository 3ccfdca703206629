"""What lies in a file of ``torch.save`` beside the weights: the state of a training run.

Of a Lightning checkpoint: where the run was, its hyperparameters, the callbacks that stored a
state, the optimizers' tensors, and the weights that were being trained where ``state_dict`` is
their running average. Nothing is unpickled but tensors and plain containers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_merge.checkpoint import Checkpoint, TensorInfo
from lit_merge.checkpoint.torch_file import load_torch_file
from lit_merge.inspection.contents import Part, sized_part

_LIGHTNING = "pytorch-lightning_version"
_TORCH = ("lightning", "torch")  # sources of checkpoints that torch.save wrote
_WEIGHTS = {
    *("state_dict", "model_state_dict", "model", "module"),
    *("state_dict_ema", "model_ema", "current_model_state"),
}
_OPTIMIZERS = ("optimizer_states", "optimizer", "optimizer_state_dict")
_MOST = 12  # entries of a dict that are shown


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds beside its weights."""

    parts: list[Part] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def training_state(weights: Checkpoint) -> TrainingState:
    """Return what lies beside weights in the file of ``torch.save`` that they are from."""
    if weights.source not in _TORCH or not isinstance(weights.path, Path):
        return TrainingState()
    content = load_torch_file(weights.path)
    if not isinstance(content, Mapping) or all(isinstance(v, Tensor) for v in content.values()):
        return TrainingState()
    file = weights.path.name
    state = TrainingState()
    if weights.metadata.get("weights") is not None:  # two sets: of the other there is the size
        averaged = weights.metadata["weights"] == "averaged"
        other = "trained weights" if averaged else "averaged weights"
        keys = _WEIGHTS - {weights.metadata.get("key", "state_dict")}
        sets = [infos for key in sorted(keys) if (infos := _tensors(content.get(key)))]
        state.parts.extend(sized_part(other, file, infos) for infos in sets)
        state.facts["weights"] = "a running average, and those that were trained"
    _add_optimizers(state, content, file)
    if _LIGHTNING in content:
        _add_lightning(state, content, file)
    else:
        plain = {k: v for k, v in content.items() if isinstance(v, str | int | float | bool)}
        state.facts.update({str(key): plain[key] for key in list(plain)[:_MOST]})
        others = [str(key) for key in content if key not in plain and key not in _WEIGHTS]
        if others and any(isinstance(content.get(key), Mapping) for key in _WEIGHTS):
            state.facts["beside_the_weights"] = others[:_MOST]
    return state


def _add_lightning(state: TrainingState, content: Mapping[str, Any], file: str) -> None:
    """Add where a run of Lightning was, and what its callbacks and its model keep."""
    facts = state.facts
    for key, called in (("epoch", "epoch"), ("global_step", "step"), (_LIGHTNING, "lightning")):
        if key in content:
            facts[called] = content[key]
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        found = content.get(key)
        if isinstance(found, Mapping) and found:
            facts[key] = {str(name): _short(found[name]) for name in list(found)[:_MOST]}
    callbacks = content.get("callbacks")
    if isinstance(callbacks, Mapping) and callbacks:
        facts["callbacks"] = [_class_name(str(name)) for name in callbacks]
        for name, kept in callbacks.items():
            if infos := _tensors(kept):
                part = sized_part(f"callback {_class_name(str(name))}", file, infos)
                state.parts.append(part)
                if part.name.startswith("callback EMA") or "Average" in part.name:
                    facts["weights"] = f"those of training; {part.name} holds an average"
    schedulers = content.get("lr_schedulers")
    if isinstance(schedulers, list) and schedulers:
        facts["lr_schedulers"] = len(schedulers)


def _add_optimizers(state: TrainingState, content: Mapping[str, Any], file: str) -> None:
    found = next((content[key] for key in _OPTIMIZERS if key in content), None)
    optimizers = found if isinstance(found, list) else [found]
    rates = []
    for number, optimizer in enumerate(optimizers):
        if not isinstance(optimizer, Mapping):
            continue
        if infos := _tensors(optimizer.get("state")):
            name = "optimizer" if len(optimizers) == 1 else f"optimizer {number}"
            state.parts.append(sized_part(name, file, infos))
        groups = optimizer.get("param_groups")
        if isinstance(groups, list):
            rates += [
                group["lr"] for group in groups if isinstance(group, Mapping) and "lr" in group
            ]
    if rates:
        state.facts["learning_rates"] = [_short(rate) for rate in rates[:_MOST]]


def _tensors(value: object) -> list[TensorInfo]:
    return [TensorInfo(tuple(tensor.shape), tensor.dtype) for tensor in _walk(value)]


def _walk(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _walk(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _walk(entry)


def _class_name(key: str) -> str:
    """Return the class of a callback by the key of its state.

    >>> _class_name("ModelCheckpoint{'monitor': None}"), _class_name("DiagonalHessian")
    ('ModelCheckpoint', 'DiagonalHessian')
    """
    return key.partition("{")[0].rpartition(".")[2]


def _short(value: object) -> Any:
    """Return a value as JSON has it, a long one by its kind."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else f"tensor {list(value.shape)}"
    if isinstance(value, Mapping):
        return {str(key): _short(value[key]) for key in list(value)[:_MOST]}
    if isinstance(value, list | tuple) and len(value) <= _MOST:
        return [_short(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
