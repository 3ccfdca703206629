"""The final feature of a merged network: what reaches its head, where all tasks part.

It is the last thing that the tasks share, so it can be compared with the experts', and corrected
by :class:`~lit_merge.correction.surgery.RepresentationSurgery` whatever the architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lit_merge.correction import TaskContext, TaskRouter
from lit_merge.correction.surgery import RepresentationSurgery
from lit_merge.errors import InputError


class FinalFeature(nn.Module):
    """Reads the inputs of a network's first head layer, and corrects them.

    Args:
        layer: Name of the layer; None where the network's head is not known.
        context: Holds the tasks of the running batch.

    Attributes:
        surgery: What corrects the feature; None for nothing.
    """

    def __init__(self, layer: str | None, context: TaskContext) -> None:
        super().__init__()
        self.layer = layer
        self.context = context
        self.surgery: RepresentationSurgery | None = None
        self._read: list[Tensor] | None = None

    def attach(self, network: nn.Module, *, num_tasks: int, surgery_rank: int) -> None:
        """Put it before the head of a network.

        Args:
            network: The network.
            num_tasks: Number of tasks.
            surgery_rank: Rank of the surgery; 0 for none.

        Raises:
            InputError: If surgery is wanted and the network's head, or its width, is not known.
        """
        if self.layer is None:
            if surgery_rank:
                raise self._no_head("surgery_rank", network)
            return
        layer = network.get_submodule(self.layer)
        if surgery_rank:
            width = _input_width(layer)
            if width is None:
                raise InputError(
                    f"surgery_rank: must meet a linear head; got {self.layer!r}, a "
                    f"{type(layer).__name__}. Leave it 0."
                )
            self.surgery = RepresentationSurgery(num_tasks, width, surgery_rank)
        layer.register_forward_pre_hook(_BeforeHead(self), with_kwargs=True)

    def require(self, option: str, network: nn.Module) -> None:
        """Check that there is a final feature.

        Args:
            option: What needs it, for the message.
            network: The network, for the message.

        Raises:
            InputError: If the network's head is not known.
        """
        if self.layer is None:
            raise self._no_head(option, network)

    @contextmanager
    def reading(self) -> Iterator[list[Tensor]]:
        """Collect the corrected feature ``[B, ..., C]`` of every forward in the block."""
        before, self._read = self._read, []
        try:
            yield self._read
        finally:
            self._read = before

    def forward(self, feature: Tensor) -> Tensor:
        """Return the corrected feature, ``[B, ..., C]``."""
        if self.surgery is not None:
            ids = self.context.ids_for(feature, where="representation surgery")
            feature = self.surgery(feature, ids)
        if self._read is not None:
            self._read.append(feature)
        return feature

    @staticmethod
    def _no_head(option: str, network: nn.Module) -> InputError:
        return InputError(
            f"{option}: must meet a network whose head is known; got a {type(network).__name__} "
            "without per-task tensors or a last layer of a usual name. Call it head, or leave "
            f"{option} 0."
        )


def only_feature(seen: Sequence[Tensor], num_examples: int) -> Tensor:
    """Return what a single forward has read.

    Args:
        seen: What :meth:`FinalFeature.reading` has collected.
        num_examples: Number of examples of the forward.

    Raises:
        InputError: If the head did not run once, on every example.
    """
    if len(seen) != 1 or len(seen[0]) != num_examples:
        raise InputError(
            f"feature_weight: the first layer of the head must run once and take the feature of "
            f"each of the {num_examples} examples as its first argument; got "
            f"{[tuple(one.shape) for one in seen]}. Set it to 0."
        )
    return seen[0]


class _BeforeHead:
    """The hook before the head: an object and no closure, so that copies and pickles follow."""

    def __init__(self, feature: FinalFeature) -> None:
        self.feature = feature

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not args or not isinstance(args[0], Tensor):
            return None
        return (self.feature(args[0]), *args[1:]), kwargs


def _input_width(layer: nn.Module) -> int | None:
    """Return the number of features that a linear layer takes, or one per task the widest of."""
    layers = list(layer.heads.values()) if isinstance(layer, TaskRouter) else [layer]
    widths = {one.in_features if isinstance(one, nn.Linear) else None for one in layers}
    return widths.pop() if len(widths) == 1 else None
