"""A PEFT LoRA adapter as an expert: its own folder, and beside its files what was measured.

``hessian.safetensors`` is that of the whole model, base plus adapter, under the base's names.
``expert.json`` says ``weights: "."``: PEFT loads the folder as before, and
:func:`lit_merge.expert.open_expert` opens it over a base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from torch import Tensor

from lit_merge.checkpoint import (
    AdapterCheckpoint,
    Checkpoint,
    RenamedCheckpoint,
    alignment,
    fingerprint,
    open_checkpoint,
)
from lit_merge.errors import InputError
from lit_merge.expert import add_to_expert, open_expert
from lit_merge.expert.contents import renamed
from lit_merge.expert.factors import factor_names
from lit_merge.expert.info import ExpertInfo, current_versions, read_info
from lit_merge.output import new_file

_INFO = "expert.json"


@contextmanager
def open_over(
    path: str | Path,
    base: str | Path | None,
    *,
    weights: Literal["averaged", "raw"] = "averaged",
) -> Iterator[tuple[Checkpoint, Checkpoint | None]]:
    """Open a checkpoint, over its base where it is an adapter, and close both afterwards.

    Args:
        path: An adapter's folder where there is a base; without, any whole model.
        base: What the adapter was trained on, or None.
        weights: Which weights of a checkpoint that holds two.

    Yields:
        The checkpoint, and the base.

    Raises:
        InputError: An adapter has no base, or there is a base and the checkpoint is no adapter.
    """
    with ExitStack() as stack:
        below = None
        if base is not None:
            opened_base = open_expert(base)
            stack.callback(opened_base.close)
            below = opened_base.weights
        opened = stack.enter_context(open_checkpoint(path, weights=weights, base=below))
        if below is not None and not isinstance(opened, AdapterCheckpoint):
            raise InputError(
                f"base: must be left out where the checkpoint is a whole model; got {base} beside "
                f"{path}. Only a LoRA adapter has need of it."
            )
        yield opened, below


def under_names(
    checkpoint: Checkpoint, base: Checkpoint | None, names: Iterable[str]
) -> Checkpoint:
    """Return a view of an adapted model under the names of a module; any other as it is.

    Args:
        checkpoint: What :func:`open_over` gives.
        base: The same; None where the checkpoint is no adapter.
        names: The module's names.
    """
    if base is None:
        return checkpoint
    return RenamedCheckpoint(checkpoint, _names_in_module(checkpoint, base, names))


def add_to_adapter(
    folder: str | Path,
    base: str | Path,
    *,
    info: ExpertInfo,
    names: Iterable[str],
    artifacts: Mapping[str, Mapping[str, Tensor]],
) -> Path:
    """Write what was measured of base plus adapter into the adapter's folder.

    Args:
        folder: The adapter's.
        base: What it was trained on.
        info: What is known, under the module's names.
        names: The module's names.
        artifacts: "hessian", "gram" and "kronecker" by the module's parameter names, "activations"
            by site. What is there already of the same kind is replaced.

    Returns:
        The folder.

    Raises:
        InputError: It is no adapter, or what was measured does not fit the adapted model.
    """
    with open_over(folder, base) as (adapter, below):
        assert below is not None
        own = {new: old for old, new in _names_in_module(adapter, below, names).items()}
        own |= factor_names(own)
        info = dataclasses.replace(
            renamed(info, lambda name: own.get(name, name)),
            weights=".",
            fingerprint=fingerprint(adapter),
            base_fingerprint=fingerprint(below),
            versions=current_versions(),
        )
        path = Path(folder) / _INFO
        if path.is_file():
            info = _completed(info, read_info(path))
        given = {
            kind: tensors
            if kind == "activations"  # whose names are those of modules
            else {own.get(name, name): value for name, value in tensors.items()}
            for kind, tensors in artifacts.items()
        }
        with new_file(path, replace=True) as file:
            file.write_text(info.to_json(), encoding="utf-8")
        return add_to_expert(folder, weights_fingerprint=fingerprint(adapter), base=below, **given)


def _names_in_module(adapter: Checkpoint, base: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """Return a module's name of each tensor of an adapted model.

    What the base has and what only the adapter has (a head) may stand behind different prefixes:
    ``bert.encoder`` and ``classifier`` where the base has ``encoder``.
    """
    known = list(names)
    inner = alignment([name for name in adapter if name in base], known)
    return inner | alignment([name for name in adapter if name not in base], known)


def _completed(info: ExpertInfo, there: ExpertInfo) -> ExpertInfo:
    """Return what is known now, and what was known before where it says nothing."""
    kept = {
        key: getattr(there, key)
        for key in ("task", "estimator", "labels", "num_examples")
        if getattr(info, key) is None
    }
    return dataclasses.replace(info, **kept, details={**there.details, **info.details})
