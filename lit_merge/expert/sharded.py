"""Expert folders of sharded models: every rank gives its part, the first one writes.

One whole tensor at a time is put together and written, so that no rank needs memory for all of
them. What is checked is what :func:`~lit_merge.expert.write_expert` checks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.checkpoint import (
    Checkpoint,
    SafetensorsWriter,
    StateDict,
    TensorInfo,
    fingerprint,
    open_checkpoint,
    save_tensors,
    unwrapped,
)
from lit_merge.distributed import failing_together, rank
from lit_merge.expert.contents import (
    check_finite,
    check_hessian,
    check_names,
    check_not_negative,
    checked_activations,
    renamed,
)
from lit_merge.expert.info import ExpertInfo, current_versions
from lit_merge.output import new_file, new_folder
from lit_merge.sharding import give_whole, whole


class WholeTensors(Checkpoint):
    """The interface of a checkpoint over sharded tensors, of which one at a time is whole.

    Collective: every rank must read the same tensors in the same order.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors by name, whole or sharded."""
        self.path = Path("<memory>")
        self.source = "memory"
        self.metadata = {}
        self.infos = infos_of(tensors)
        self._tensors = dict(tensors)
        self._last: tuple[str, StateDict] | None = None

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """See :meth:`Checkpoint.read_into`."""
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one is put together
            self._last = name, StateDict({name: whole(self._tensors[name].detach())})
        self._last[1].read_into(name, start, out)


def infos_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Return the shape and type of whole tensors, sharded or not."""
    return {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in tensors.items()}


def write_sharded_expert(
    path: str | Path,
    *,
    weights: Mapping[str, Tensor],
    info: ExpertInfo,
    hessian: Mapping[str, Tensor] | None = None,
    activations: Mapping[str, Tensor] | None = None,
    replace: bool = False,
) -> None:
    """Write an expert folder, whole or not at all, of tensors that may be sharded. Collective.

    Args:
        path: The folder.
        weights: Parameters and buffers by name, in the same order on every rank.
        info: What to record; ``fingerprint`` and ``versions`` are filled in.
        hessian: Σ over ``info.num_examples`` examples, by parameter name, in the weights' shapes.
        activations: Whole; of the first rank.
        replace: Whether an existing non-empty folder may be replaced.

    Raises:
        InputError: On every rank, for what :func:`~lit_merge.expert.write_expert` refuses.
    """
    folder = Path(path)  # of which the other ranks write nothing
    with ExitStack() as stack:
        with failing_together():
            if rank() == 0:
                folder = stack.enter_context(new_folder(path, replace=replace))
                (folder / info.weights).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / info.weights, weights, check=_check_weight, metadata={"format": "pt"})
        with failing_together():
            if rank() == 0:
                with open_checkpoint(folder / info.weights) as opened:
                    info = dataclasses.replace(
                        renamed(info, unwrapped),
                        fingerprint=fingerprint(opened),
                        versions=current_versions(),
                    )
                    check_names(info, opened)
        if hessian is not None:
            write_hessian(folder, hessian, info)
        with failing_together():
            if rank() == 0:
                if activations is not None:
                    statistics = checked_activations(activations)
                    metadata = {"fingerprint": info.fingerprint or ""}
                    save_tensors(folder / "activations.safetensors", statistics, metadata)
                (folder / "expert.json").write_text(info.to_json(), encoding="utf-8")
                stack.close()


def write_whole(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    check: Callable[[str, Tensor], None] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors that may be sharded into one safetensors file on the first rank. Collective.

    Args:
        path: The file; an existing one is overwritten, a partial one is left after an error.
        tensors: By name, in the same order on every rank.
        check: Called with each whole tensor before it is written; raises what is wrong with it.
        metadata: Text by name for the header.

    Raises:
        InputError: On every rank, what ``check`` raised, or if the file cannot be written.
    """
    stored = {unwrapped(name): value for name, value in tensors.items()}
    writer: SafetensorsWriter | None = None
    with failing_together():
        if rank() == 0:
            writer = SafetensorsWriter(path, infos_of(stored), metadata)

    def take(name: str, value: Tensor) -> None:
        assert writer is not None
        if check is not None:
            check(name, value)
        writer.write(name, 0, value)

    give_whole(stored, take)
    with failing_together():
        if writer is not None:
            writer.close()


def write_hessian(folder: Path, hessian: Mapping[str, Tensor], info: ExpertInfo) -> None:
    """Write the curvature of an expert folder's weights into it, over another one. Collective.

    Args:
        folder: An expert folder, of which the first rank writes the file.
        hessian: As for :func:`write_sharded_expert`, under the names of the weights in the folder.
        info: Of the folder; on the first rank.

    Raises:
        InputError: On every rank, if the Hessian does not fit the weights.
    """
    metadata = {"fingerprint": info.fingerprint or "", "reduction": info.reduction}
    wide = {name: value.to(torch.float32) for name, value in hessian.items()}
    with ExitStack() as stack:
        file = folder / "hessian.safetensors"
        with failing_together():
            if rank() == 0:
                file = stack.enter_context(new_file(file, replace=True))
        write_whole(file, wide, check=_check_square, metadata=metadata)
        with failing_together():
            if rank() == 0:
                with (
                    open_checkpoint(file) as written,
                    open_checkpoint(folder / info.weights) as weights,
                ):
                    check_hessian(written, weights)
                stack.close()


def _check_weight(name: str, value: Tensor) -> None:
    fix = "Take a checkpoint from before the training diverged."
    check_finite({name: value}, "weights", fix)


def _check_square(name: str, value: Tensor) -> None:
    check_finite({name: value}, "hessian", "Check the loss on the training data.")
    check_not_negative(name, value)
