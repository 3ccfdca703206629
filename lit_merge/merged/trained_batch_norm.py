"""BatchNorm in a fit that trains the weights before it: by each batch, as in any training.

A layer whose BatchNorm keeps its running statistics has no normalisation in training: a step that
makes a channel ten times as large makes all behind it ten times as large. Here the batch norms that
all tasks share normalise by the statistics of each batch, its tasks mixed in equal shares, and keep
the running average that evaluation uses. Per-task scales and shifts come behind.

Each rank normalises by its own batch; whenever the model is measured, all ranks take the mean of
their running statistics. DistributedDataParallel gives all ranks the first one's at every step
unless it is told ``broadcast_buffers=False``; sharded modules do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lit_merge.correction.batch_norm import anchor_batch_norm
from lit_merge.distributed import make_equal
from lit_merge.merged.expert_lessons import Surroundings
from lit_merge.merged.network import MergedNetwork
from lit_merge.merged.sharded import whole_network


def running_statistics(network: MergedNetwork) -> dict[str, Tensor]:
    """Return the buffers of the shared batch norms by their names in the merged network."""
    return {
        f"network.{name}.{own}": value
        for name, norm in network.shared_batch_norms().items()
        for own, value in norm.named_buffers()
    }


def anchor_shared(
    merged: MergedNetwork,
    plain: Callable[[], MergedNetwork],
    batches: Mapping[int, Sequence[Any]],
    surroundings: Surroundings,
) -> None:
    """Make the shared batch norms ready to normalise by the batch, with the outputs they have.

    Least squares leave batch norms that only add an offset, and a merge's running statistics are
    not those of what reaches them. Collective.

    Args:
        merged: The network, sharded or not; changed.
        plain: Makes one of the same architecture, whose tensors do not matter.
        batches: This rank's calibration examples of each task, by task index.
        surroundings: Where they run.

    Raises:
        InputError: If an activation is not finite.
    """
    if not merged.shared_batch_norms():
        return
    with whole_network(merged, plain) as network:
        norms = network.shared_batch_norms()
        anchor_batch_norm(
            network.network,
            norms,
            batches,
            context=network.context,
            forward=surroundings.run,
        )
        for norm in norms.values():
            for value in norm.state_dict().values():
                make_equal(value)


def share_running_statistics(
    network: MergedNetwork, mean_over_ranks: Callable[[Tensor], Tensor]
) -> None:
    """Give all ranks the mean of their running statistics. Collective.

    Args:
        network: The network; changed.
        mean_over_ranks: Returns the mean of a tensor over the ranks.
    """
    for value in running_statistics(network).values():
        if value.is_floating_point():
            value.copy_(mean_over_ranks(value.clone()))
