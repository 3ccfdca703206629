"""Writing weights as a folder of ``torch.distributed.checkpoint``, one tensor in memory at a time.

One process writes the whole; a run on any number of ranks reads its shards out of it. There is no
state of an optimizer in it: it serves ``Trainer.test``, ``validate``, ``predict`` and loading into
a model, not going on with a training.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_merge.checkpoint.dcp import LIGHTNING
from lit_merge.checkpoint.lightning_writer import lightning_contents
from lit_merge.checkpoint.tensor_source import Checkpoint
from lit_merge.checkpoint.torch_writer import require_room
from lit_merge.errors import InputError
from lit_merge.output import new_folder

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import MetadataIndex


def write_distributed(
    folder: str | Path,
    weights: Checkpoint,
    *,
    key: str | None = None,
    template: str | Path | None = None,
    replace: bool = False,
) -> tuple[str, ...]:
    """Write weights as a folder that ``dcp.load`` reads, whole or not at all.

    Args:
        folder: The folder.
        weights: The tensors.
        key: The key under which the state dict lies: None for ``dcp.load(model.state_dict())``,
            "model" for Fabric and Lightning's FSDPStrategy, "state_dict" for its
            ModelParallelStrategy.
        template: With a key, a Lightning checkpoint whose names, hyper-parameters and other
            settings go into ``meta.pt``, which Lightning reads; as for
            :func:`~lit_merge.checkpoint.lightning_writer.write_lightning_checkpoint`.
        replace: Whether an existing non-empty folder may be replaced.

    Returns:
        What a user should be told about the template.

    Raises:
        InputError: If there is a template without a key, it is of another model, or the folder may
            not be written.
    """
    if template is not None and key is None:
        raise InputError(
            f"template: must come with a key, as Lightning looks for one; got {template} and no "
            'key. Give key="state_dict", or leave the template out.'
        )
    notes: tuple[str, ...] = ()
    content: dict[str, Any] = {}
    names: Mapping[str, str] = {name: name for name in weights}
    if key is not None:
        content, names, notes = lightning_contents(folder, weights, template)
    with new_folder(folder, replace=replace) as partial:
        require_room(partial, (weights.infos[source] for source in names.values()))
        _save(partial, weights, names, key)
        if key is not None:
            torch.save(content, partial / LIGHTNING)
    return notes


def _save(folder: Path, weights: Checkpoint, names: Mapping[str, str], key: str | None) -> None:
    # Imported here, as it takes a second.
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    class OneAtATime(DefaultSavePlanner):
        """Plans with shapes alone, and reads each tensor when its turn to be written comes."""

        def lookup_object(self, index: MetadataIndex) -> Tensor:
            source = names[index.fqn.removeprefix(f"{key}." if key else "")]
            return weights.tensor(source).clone(memory_format=torch.contiguous_format)

    shapes = {
        name: torch.empty(
            weights.infos[source].shape, dtype=weights.infos[source].dtype, device="meta"
        )
        for name, source in names.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it writes from one process, as is meant
        save(
            {key: shapes} if key else shapes,
            storage_writer=FileSystemWriter(folder),
            planner=OneAtATime(),
            no_dist=True,
        )
