"""The base that a merge was made with, found again: where ``merge.json`` says, or where one says.

Adapters and masks are differences to it. Another base would silently give another model, so its
fingerprint must be the recorded one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_merge.checkpoint import Checkpoint, fingerprint
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from lit_merge.location import locate


@contextmanager
def open_recorded_base(
    merge: Mapping[str, Any], base: str | Path | None = None, *, source: str | Path
) -> Iterator[Checkpoint]:
    """Open the base of a merge, and close it at the end of the block.

    Args:
        merge: Contents of ``merge.json``.
        base: Where the base is now; None for where it was.
        source: The file, for messages.

    Raises:
        InputError: The record names no base, the base is gone, or its weights are others.
    """
    entry = merge.get("base")
    known = entry if isinstance(entry, Mapping) else {}
    recorded, wanted = known.get("path"), known.get("fingerprint")
    if not isinstance(recorded, str) or not isinstance(wanted, str):
        raise InputError(
            f"{source}: must name the base and its fingerprint; got {entry!r}. Merge again."
        )
    path = recorded if base is None else base
    if not locate(path).exists():
        raise InputError(
            f"{path}: must be the base that {source} names; got no such file or folder. Say where "
            f"it is now: lit-merge export --merged {Path(source).parent} --base PATH."
        )
    expert = open_expert(path)
    try:
        found = fingerprint(expert.weights)
        if found != wanted:
            raise InputError(
                f"{path}: must be the base that {source} names, weights {wanted[:8]}…; got "
                f"{found[:8]}…. Name the base that was merged onto: --base PATH."
            )
        yield expert.weights
    finally:
        expert.close()


@contextmanager
def open_base(
    merge: Mapping[str, Any], base: str | Path | None, *, source: str | Path | None
) -> Iterator[Checkpoint]:
    """Open the base of a merged folder, or of a merge in memory.

    Args:
        merge: Contents of ``merge.json``.
        base: The base of the merge in memory.
        source: The merged folder; None for a merge in memory.

    Raises:
        InputError: If there is none, or not the recorded one.
    """
    if source is not None:
        with open_recorded_base(merge, source=source) as weights:
            yield weights
        return
    if base is None:
        raise InputError(
            'base: must be given for coefficients: "layer", which go along task vectors; got none. '
            "Give the model that the experts were fine-tuned from."
        )
    expert = open_expert(base)
    try:
        yield expert.weights
    finally:
        expert.close()
