"""PEFT LoRA adapters read as whole models: the base, and W + ΔW where a layer is adapted.

======================================= =======================================================
in ``adapter_model.safetensors``        means
======================================= =======================================================
``<m>.lora_A.weight``, ``lora_B.weight`` ΔW = scaling · B·A of the weight of module m: a matrix
                                        [out, in], the same transposed (``fan_in_fan_out``), or a
                                        convolution [out, in, …]
``<m>.lora_embedding_A``, ``…_B``       ΔW = scaling · (B·A)ᵀ of a table [tokens, width]
``<m>.lora_B.bias``                     scaling · it is added to the bias of m
any other                               a tensor in the place of the base's (``modules_to_save``,
                                        trained biases, resized embeddings)
======================================= =======================================================

Merging is then merging of ΔW. Never factor by factor: the mean of B and the mean of A have another
product than the mean of B·A.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lit_merge.checkpoint.adapter_config import CONFIG, AdapterConfig, read_adapter_config
from lit_merge.checkpoint.adapter_tensors import (
    AdapterTensors,
    names_in_base,
    sort_tensors,
    tied_copies,
)
from lit_merge.checkpoint.low_rank import add_low_rank
from lit_merge.checkpoint.remote import RemoteSafetensors
from lit_merge.checkpoint.safetensors_file import SafetensorsFile
from lit_merge.checkpoint.state_dict import fingerprint
from lit_merge.checkpoint.tensor_source import Checkpoint, TensorInfo, check_range
from lit_merge.checkpoint.torch_file import open_torch_file
from lit_merge.errors import InputError
from lit_merge.location import Location, RemotePath

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""What PEFT calls the file of an adapter's tensors, in the order in which it looks for them."""

Kind = Literal["linear", "transposed", "embedding", "convolution"]

_FIX = "Save the adapter again with PEFT's save_pretrained()."


@dataclass(frozen=True)
class AdaptedWeight:
    """Which weight is adapted, and how PEFT knows it.

    Attributes:
        module: PEFT's name of the module.
        kind: "linear" for a matrix [out, in], "transposed" for one stored as [in, out] (GPT-2's
            Conv1D), "embedding" for a table [tokens, width], "convolution" for [out, in, …].
    """

    module: str
    kind: Kind

    @property
    def is_transposed(self) -> bool:
        """Whether ΔW is (B·A)ᵀ."""
        return self.kind in ("transposed", "embedding")


@dataclass(frozen=True)
class LowRankUpdate:
    """What an adapter does to one weight.

    Attributes:
        weight: Which.
        down: The stored name of A.
        up: The stored name of B.
        scaling: What B·A is multiplied with.
    """

    weight: AdaptedWeight
    down: str
    up: str
    scaling: float


def adapter_folder(path: Location) -> Location | None:
    """Return the folder of the adapter that a path names (itself or its weights), or None."""
    folder = path.parent if path.name in WEIGHTS else path
    return folder if (folder / CONFIG).is_file() else None


def open_adapter(folder: Location, base: Checkpoint | None) -> AdapterCheckpoint:
    """Open an adapter over its base.

    Raises:
        InputError: There is no base, or as :class:`AdapterCheckpoint`.
    """
    if base is None:
        raise InputError(
            f"{folder}: must hold the weights of a whole model; got a PEFT adapter, which is a "
            "difference to one. Give the model that it was trained on as base: and the adapter as "
            "an expert, or apply it: PeftModel.from_pretrained(...).merge_and_unload()."
        )
    return AdapterCheckpoint(base, folder)


class AdapterCheckpoint(Checkpoint):
    """A base with a LoRA adapter added to it, computed where it is read.

    Adapted tensors are float32 (float64 over a float64 base), so that ΔW is not rounded to the
    base's type; all others are as they are stored. Only the rows that a range touches are computed.

    Args:
        base: What the adapter was trained on; it stays open when this is closed.
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).

    Attributes:
        config: What ``adapter_config.json`` says.
        updates: What is added, by the base's name of the weight; to all names of a tied one.
        adapted: The names of all tensors that are not simply the base's.

    Raises:
        InputError: It is no plain LoRA adapter, is damaged, or does not fit the base.
    """

    def __init__(self, base: Checkpoint, folder: Location) -> None:
        self.config: AdapterConfig = read_adapter_config(folder)
        self._base = base
        self._own = _open_weights(folder)
        self.path = self._own.path
        self.source = "adapter"
        self.metadata = {"base_model": self.config.base_model}
        # A few tensors at a time: chunk after chunk of one weight needs the same factors.
        self._factors = lru_cache(maxsize=4)(self._read_factors)
        try:
            parts = sort_tensors(self._own)
            names = names_in_base(parts, base)
            self._replaced = {names[name]: stored for name, stored in parts.others.items()}
            updates = self._updates(parts, names)
            # As PEFT merges them: into the one parameter that both names have.
            copies = tied_copies(base, updates.keys() - self._replaced.keys())
            self.updates = updates | {copy: updates[name] for copy, name in copies.items()}
            self._biases = self._bias_updates(parts, names)
        except BaseException:
            self._own.close()
            raise
        self.adapted = frozenset((*self._replaced, *self.updates, *self._biases))
        self.infos = {name: self._info(name) for name in dict.fromkeys((*base, *self._replaced))}

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read the base's range and add ΔW's; see :meth:`Checkpoint.read_into`."""
        source, stored = self._under(name)
        stop = start + out.numel()
        check_range(self.infos[name], name, start, stop)
        if source.infos[stored].dtype == out.dtype:
            source.read_into(stored, start, out)
        else:
            out.copy_(source.read(stored, start, stop))
        if not out.numel():
            return
        if name in self.updates:
            left, right = self._factors(name)
            add_low_rank(out, left, right, start)
        if name in self._biases:
            added, scaling = self._biases[name]
            out += scaling * self._own.read(added, start, stop).to(out.dtype)

    def file_of(self, name: str) -> Location:
        """Return the adapter's file for what it changes, the base's for the rest."""
        return self.path if name in self.adapted else self._base.file_of(name)

    @property
    def description(self) -> str:
        """What a user should be told about how it is taken."""
        trained_on = f", trained on {self.config.base_model!r}" if self.config.base_model else ""
        return (
            f"LoRA adapter of {len(self.updates)} weights{trained_on}: taken as {self._base.path} "
            "with B·A added, never factor by factor"
        )

    def digest(self) -> str:
        """Return the fingerprint of the adapter's own tensors and of the base."""
        parts = (fingerprint(self._own), fingerprint(self._base), *self._scalings())
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def close(self) -> None:
        """Close the adapter's own file."""
        self._factors.cache_clear()
        self._own.close()

    def _scalings(self) -> Iterable[str]:
        updates = self.updates.values()
        return sorted(f"{update.weight.module}={update.scaling!r}" for update in updates)

    def _under(self, name: str) -> tuple[Checkpoint, str]:
        """Return where the values lie to which the updates are added, and under which name."""
        if name in self._replaced:
            return self._own, self._replaced[name]
        return self._base, name

    def _info(self, name: str) -> TensorInfo:
        source, stored = self._under(name)
        info = source.infos[stored]
        if name in self.updates or name in self._biases:
            wide = torch.float64 if info.dtype == torch.float64 else torch.float32
            return TensorInfo(info.shape, wide)
        return info

    def _read_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return left [rows, r], which carries the scaling, and right [r, width] of a ΔW."""
        update, dtype = self.updates[name], self.infos[name].dtype
        up = self._own.tensor(update.up).to(dtype).flatten(1)
        down = self._own.tensor(update.down).to(dtype).flatten(1)
        if update.weight.is_transposed:
            return (down.T * update.scaling).contiguous(), up.T.contiguous()
        return up * update.scaling, down

    def _updates(self, parts: AdapterTensors, names: Mapping[str, str]) -> dict[str, LowRankUpdate]:
        shapes = {}
        for module, (down, up) in parts.factors.items():
            name = names[module]
            source, stored = self._under(name)
            wanted = source.infos[stored].shape
            for holder, tensor in ((self._own, down), (self._own, up), (source, stored)):
                _require_numbers(holder, tensor)
            kinds = self._fitting_kinds(module, parts, wanted)
            if not kinds:
                low, high = self._own.infos[down].shape, self._own.infos[up].shape
                raise InputError(
                    f"{self.path}: {down!r} {list(low)} and {up!r} {list(high)} must multiply to "
                    f"the shape {list(wanted)} of tensor {name!r} in {self._base.path}; got other "
                    "shapes. Give the base that the adapter was trained on."
                )
            shapes[module] = kinds
        chosen = self._without_ambiguity(shapes)
        updates: dict[str, LowRankUpdate] = {}
        for module, (down, up) in parts.factors.items():
            rank = self.config.rank_of(module)
            if self._own.infos[down].shape[0] != rank:
                raise InputError(
                    f"{self.path}: {down!r} must have the rank {rank} that {CONFIG} gives it; got "
                    f"{self._own.infos[down].shape[0]}. Its scaling would be wrong. Correct r or "
                    "rank_pattern, or save the adapter again."
                )
            weight = AdaptedWeight(module, chosen[module])
            scaling = self.config.scaling_of(module)
            updates[names[module]] = LowRankUpdate(weight, down, up, scaling)
        return updates

    def _fitting_kinds(
        self, module: str, parts: AdapterTensors, wanted: tuple[int, ...]
    ) -> tuple[Kind, ...]:
        """Return the kinds of weights of this shape that the factors can have been made for."""
        down, up = (self._own.infos[name].shape for name in parts.factors[module])
        if len(down) < 2 or len(up) != len(down) or down[0] != up[1] or not down[0]:
            return ()
        if len(down) > 2:
            fits = wanted == (up[0], *down[1:]) and all(size == 1 for size in up[2:])
            return ("convolution",) if fits else ()
        if module in parts.tables:
            return ("embedding",) if wanted == (down[1], up[0]) else ()
        kinds: list[Kind] = ["linear"] if wanted == (up[0], down[1]) else []
        if wanted == (down[1], up[0]):
            kinds.append("transposed")
        return tuple(kinds)

    def _without_ambiguity(self, kinds: Mapping[str, tuple[Kind, ...]]) -> dict[str, Kind]:
        """Return the kind of each module; that of square weights is what the config says."""
        said: Kind = "transposed" if self.config.fan_in_fan_out else "linear"
        contrary = "linear" if self.config.fan_in_fan_out else "transposed"
        against = next((module for module, found in kinds.items() if found == (contrary,)), None)
        chosen: dict[str, Kind] = {}
        for module, found in kinds.items():
            if len(found) > 1 and against is not None:
                raise InputError(
                    f"{self.path}: must be for layers that all store their weights as "
                    f"fan_in_fan_out={self.config.fan_in_fan_out} in {CONFIG} says; got {against!r}"
                    f", which does not, so that nothing tells which way round the square {module!r}"
                    " is. Apply the adapter to its base with merge_and_unload()."
                )
            chosen[module] = said if len(found) > 1 else found[0]
        return chosen

    def _bias_updates(
        self, parts: AdapterTensors, names: Mapping[str, str]
    ) -> dict[str, tuple[str, float]]:
        updates = {}
        for module, stored in parts.biases.items():
            name = re.sub("weight$", "bias", names[module])
            shape = self._own.infos[stored].shape
            if name not in self._base or self._base.infos[name].shape != shape:
                raise InputError(
                    f"{self.path}: {stored!r} must be added to a bias {list(shape)} of "
                    f"{self._base.path}; got none named {name!r} of this shape. Give the base that "
                    "the adapter was trained on."
                )
            updates[name] = stored, self.config.scaling_of(module)
        return updates


def _require_numbers(holder: Checkpoint, name: str) -> None:
    dtype = holder.infos[name].dtype
    if not dtype.is_floating_point or dtype.itemsize == 1:  # codes, with scales elsewhere
        raise InputError(
            f"{holder.file_of(name)}: tensor {name!r} must be float64, float32, float16 or bfloat16"
            f" for an adapter; got {dtype}. Give the base before it was quantized."
        )


def _open_weights(folder: Location) -> Checkpoint:
    for file in (folder / name for name in WEIGHTS):
        if not file.is_file():
            continue
        if isinstance(file, RemotePath):
            return RemoteSafetensors(file)
        return SafetensorsFile(file) if file.suffix == ".safetensors" else open_torch_file(file)
    raise InputError(f"{folder}: must hold {WEIGHTS[0]} beside {CONFIG}; got no such file. {_FIX}")
