"""What the tensors of a PEFT adapter are, told by their names; and which weights they change."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from lit_merge.checkpoint.state_dict import alignment
from lit_merge.checkpoint.tensor_source import Checkpoint
from lit_merge.errors import InputError

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>(?:embedding_)?[AB])(?:\.(?P<rest>.+))?")
_SAMPLE, _CHUNK = 64, 1 << 20  # elements
_FIX = "Save the adapter again with PEFT's save_pretrained()."


@dataclass(frozen=True)
class AdapterTensors:
    """What is stored in an adapter, by PEFT's names without ``base_model.model.``.

    Attributes:
        factors: The stored names of A and B by module.
        tables: The modules of which they are an embedding's.
        biases: The stored name of B's bias by module.
        others: The stored names of tensors that replace the base's, by name.
    """

    factors: Mapping[str, tuple[str, str]]
    tables: frozenset[str]
    biases: Mapping[str, str]
    others: Mapping[str, str]


def sort_tensors(own: Checkpoint) -> AdapterTensors:
    """Return what the tensors of an adapter are, by their names."""
    found: dict[str, dict[str, str]] = {"A": {}, "B": {}}
    tables: set[str] = set()
    biases: dict[str, str] = {}
    others: dict[str, str] = {}
    for stored in own:
        name = stored.removeprefix(_PREFIX)
        match = _FACTOR.fullmatch(name)
        if match is None:
            plain = _plain(name, own, stored)
            if plain is not None:
                others[plain] = _only(own, others.get(plain), stored)
            continue
        module, factor, rest = _module(match["module"]), match["factor"], match["rest"]
        is_table = factor.startswith("embedding_")
        if rest == "bias" and factor == "B":
            biases[module] = stored
        elif rest == (None if is_table else "weight"):
            found[factor[-1]][module] = stored
            tables |= {module} if is_table else set()
        else:
            adapter = (rest or "").removesuffix(".weight").removesuffix(".bias")
            raise InputError(
                f"{own.path}: must hold one adapter, without its name; got {stored!r} (adapter "
                f"{adapter!r}). Save each adapter into a folder of its own with PEFT's "
                "save_pretrained()."
            )
    for module in (*found["A"], *found["B"], *biases):
        lacking = next((f for f in ("A", "B") if module not in found[f]), None)
        if lacking is not None:
            raise InputError(
                f"{own.path}: must hold both factors of {module!r}; got no lora_{lacking}. {_FIX}"
            )
    factors = {module: (found["A"][module], found["B"][module]) for module in found["A"]}
    return AdapterTensors(factors, frozenset(tables), biases, others)


def _plain(name: str, own: Checkpoint, stored: str) -> str | None:
    """Return the model's own name of a tensor that is no factor; None for a copy of the base's.

    Raises:
        InputError: It belongs to an adapter of another kind.
    """
    components = name.split(".")
    strange = [c for c in components if c.startswith("lora_") or c == "token_adapter"]
    if strange:
        raise InputError(
            f"{own.path}: must hold only lora_A, lora_B and whole tensors; got {stored!r}. Apply "
            "the adapter to its base with the library that made it, and give the whole model as "
            "the expert."
        )
    if "original_module" in components:
        return None
    return _module(re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", name))


def _only(own: Checkpoint, first: str | None, second: str) -> str:
    """Return the stored name of a tensor that may be stored twice, which PEFT does with biases."""
    if first is not None and not torch.equal(own.tensor(first), own.tensor(second)):
        raise InputError(
            f"{own.path}: {first!r} and {second!r}, which mean one tensor, must be equal; got "
            f"different values. {_FIX}"
        )
    return second if first is None else first


def _module(name: str) -> str:
    """Return a name without the wrappers that PEFT puts around adapted layers."""
    return ".".join(c for c in name.split(".") if c != "base_layer")


def names_in_base(parts: AdapterTensors, base: Checkpoint) -> dict[str, str]:
    """Return the base's name of the weight of each adapted module, and of each whole tensor.

    Raises:
        InputError: The base lacks an adapted weight.
    """
    weights = {module: f"{module}.weight" for module in parts.factors}
    every = dict.fromkeys((*weights.values(), *parts.others))
    aligned = alignment(every, base)
    names = {name: aligned[name] for name in parts.others}
    whole = set(names.values())
    for module, weight in weights.items():
        names[module] = aligned[weight]
        if names[module] in base or names[module] in whole:
            continue
        if any(name.endswith(f"{module}.in_proj_weight") for name in base):
            raise InputError(
                f"{base.path}: must have no adapter of nn.MultiheadAttention; got one of "
                f"{module!r}. Releases of PEFT differ in whether they add its out_proj update once "
                "or twice: apply it to its base with the one that trained it, by "
                "merge_and_unload()."
            )
        raise InputError(
            f"{base.path}: must have the weight of {module!r}, which an adapter changes; got "
            f"tensors like {', '.join(repr(name) for name in list(base)[:3])}. Give the base that "
            "the adapter was trained on (a weight that is tied and stored under another name "
            "cannot be adapted alone)."
        )
    return names


def tied_copies(base: Checkpoint, adapted: Collection[str]) -> dict[str, str]:
    """Return which tensors of a base are copies of adapted ones, tied weights stored twice.

    Equal in shape, type and every value, and not constant, as no two weights are by chance.

    Returns:
        The adapted tensor's name by that of its copy.
    """
    known = {_sample(base, name): name for name in adapted}
    copies: dict[str, str] = {}
    for name in base:
        first = None if name in adapted else known.get(_sample(base, name))
        if first is not None and _equal(base, first, name):
            copies[name] = first
    return copies


def _sample(base: Checkpoint, name: str) -> tuple[object, ...]:
    """Return shape, type and some values of a weight; the name alone where these are constant."""
    info = base.infos[name]
    if not info.dtype.is_floating_point:
        return (name,)
    middle = info.numel // 2  # the first row may be a padding token's
    values = base.read(name, middle, min(middle + _SAMPLE, info.numel)).double().tolist()
    return (info.shape, info.dtype, *values) if len(set(values)) > 1 else (name,)


def _equal(base: Checkpoint, one: str, two: str) -> bool:
    numel = base.infos[one].numel
    return all(
        torch.equal(
            base.read(one, start, min(start + _CHUNK, numel)),
            base.read(two, start, min(start + _CHUNK, numel)),
        )
        for start in range(0, numel, _CHUNK)
    )


def require_no_factors(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint holds no factors of LoRA as tensors to merge.

    Raises:
        InputError: It is the state dict of a PEFT model, or a Hessian of one.
    """
    for name in checkpoint:
        if _FACTOR.fullmatch(name):
            raise InputError(
                f"{checkpoint.file_of(name)}: must hold whole weights; got the LoRA factor "
                f"{name!r}. Factors are not merged one by one: the product of merged factors is "
                "not the merged product. Save the adapter with PEFT's save_pretrained() and give "
                "that folder, or apply it with merge_and_unload()."
            )
