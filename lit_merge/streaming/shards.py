"""The weights of a merge on disk: one file, or shards with an index where they are too large."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from lit_merge.checkpoint import SafetensorsWriter, TensorInfo

if TYPE_CHECKING:
    from typing_extensions import Self

SHARD_BYTES = 5_000_000_000
"""Size of a shard, as transformers has it."""

INDEX = "model.safetensors.index.json"


def shards_of(
    infos: Mapping[str, TensorInfo], size: int = SHARD_BYTES
) -> dict[str, dict[str, TensorInfo]]:
    """Return which tensors go into which file, in order.

    Args:
        infos: The tensors.
        size: Bytes of a shard, at most, unless one tensor alone has more.

    Returns:
        Tensors by the name of their file; one ``model.safetensors`` where they fit.
    """
    groups: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in infos.items():
        if groups[-1] and filled + info.nbytes > size:
            groups.append({})
            filled = 0
        groups[-1][name] = info
        filled += info.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def write_index(folder: Path, shards: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Write the index of several shards; of one file there is none."""
    if len(shards) == 1:
        return
    content = {
        "metadata": {
            "total_size": sum(i.nbytes for infos in shards.values() for i in infos.values())
        },
        "weight_map": {name: file for file, infos in shards.items() for name in infos},
    }
    path = folder / INDEX
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class ShardedWriter:
    """Files whose tensors are written in any order, in pieces, by several threads and processes.

    Args:
        folder: Where; it must exist.
        shards: Tensors by file, as from :func:`shards_of`.
        metadata: Text by name for the headers, besides the format.
    """

    def __init__(
        self,
        folder: Path,
        shards: Mapping[str, Mapping[str, TensorInfo]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._writers: dict[str, SafetensorsWriter] = {}
        text = {"format": "pt", **(metadata or {})}
        with ExitStack() as stack:
            for file, infos in shards.items():
                writer = SafetensorsWriter(folder / file, infos, text, shared=True)
                stack.enter_context(writer)
                self._writers |= dict.fromkeys(infos, writer)
            self._open = stack.pop_all()

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        for writer in set(self._writers.values()):
            writer.sync()

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write elements of a tensor from ``start`` on."""
        self._writers[name].write(name, start, values)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)
