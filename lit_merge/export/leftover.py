"""The corrections that cannot be folded, as files beside the weights that need torch alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_merge.checkpoint import Checkpoint, save_tensors
from lit_merge.correction import Site
from lit_merge.export.proof import import_file, write_code

CORRECTIONS = "corrections.safetensors"


@dataclass(frozen=True)
class HookedCorrection:
    """A correction that stays between the layers.

    Attributes:
        site: Where.
        tensors: ``weight`` and ``bias`` ``[T, C]``, or ``down`` ``[T, r, C]`` and ``up``
            ``[T, C, r]``.
    """

    site: Site
    tensors: Mapping[str, Tensor]

    def moved(self, old: str, new: str) -> HookedCorrection:
        """Return it for a model in whose names one prefix stands for another."""
        inner = self.site.name.removeprefix(old).removeprefix(".") if old else self.site.name
        site = replace(self.site, name=f"{new}.{inner}" if new else inner)
        return HookedCorrection(site, self.tensors)


@contextmanager
def written_corrections(
    folder: Path, network: nn.Module, left: Sequence[HookedCorrection], names: Checkpoint
) -> Iterator[None]:
    """Write corrections as files, which correct the network in the block.

    Args:
        folder: Where to write them; without any, nothing is written.
        network: The network.
        left: The corrections.
        names: The network's weights under the names that they are written with.
    """
    if not left:
        yield
        return
    old, new = _exchanged_prefix(network.state_dict(), names)
    moved = [correction.moved(old, new) for correction in left]
    text = {"format": "pt", "sites": json.dumps(sites_entry(moved))}
    save_tensors(folder / CORRECTIONS, tensors_by_name(moved), text)
    code = import_file(write_code(folder))
    handles = code.apply(_under(network, old, new), folder / CORRECTIONS)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors_by_name(corrections: Sequence[HookedCorrection]) -> dict[str, Tensor]:
    """Return the tensors of corrections by their names in a file."""
    return {
        f"{correction.site.name}/{key}": value
        for correction in corrections
        for key, value in correction.tensors.items()
    }


def sites_entry(corrections: Sequence[HookedCorrection]) -> list[dict[str, Any]]:
    """Return what correction.py has to know of corrections, as JSON primitives."""
    return [
        {"name": c.site.name, "channel_dim": c.site.channel_dim, "tensors": list(c.tensors)}
        for c in corrections
    ]


def _exchanged_prefix(own: Mapping[str, Tensor], written: Checkpoint) -> tuple[str, str]:
    """Return which prefix of the names another one was written for; "" for none."""
    pairs = zip(own, written, strict=True)  # renaming keeps the order
    old, new = next(((a, b) for a, b in pairs if a != b), ("", ""))
    while old and new and old.rpartition(".")[2] == new.rpartition(".")[2]:
        old, new = old.rpartition(".")[0], new.rpartition(".")[0]
    return old, new


def _under(network: nn.Module, old: str, new: str) -> nn.Module:
    """Return the network as its tensors' written names see it."""
    found = network.get_submodule(old)
    for part in reversed(new.split(".") if new else ()):
        outer = nn.Module()
        outer.add_module(part, found)
        found = outer
    return found
