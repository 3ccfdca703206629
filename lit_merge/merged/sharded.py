"""A merged network whose parameters are sharded over the ranks: FSDP2 by Lightning's strategy.

Weights, heads, corrections and surgery all belong to it, so that the gradients of all of them are
brought together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lit_merge.distributed import is_dtensor, reshard, shard_parameters
from lit_merge.errors import InputError
from lit_merge.merged.network import MergedNetwork
from lit_merge.sharding import local_part, own_part, whole


def shard(merged: MergedNetwork, mesh: Any) -> None:
    """Shard a network over the ranks with different data of a mesh. Collective.

    Blocks that repeat are made whole one after the other, the rest together.

    Args:
        merged: The network, the same on every rank; changed.
        mesh: The device mesh of Lightning's ModelParallelStrategy.

    Raises:
        InputError: If ranks should share a layer, or there are coefficients, which move whole
            weights.
    """
    if "tensor_parallel" in mesh.mesh_dim_names and mesh["tensor_parallel"].size() > 1:
        raise InputError(
            f"strategy: must not share layers between processes; got tensor_parallel_size="
            f"{mesh['tensor_parallel'].size()}. Set it to 1."
        )
    data = mesh["data_parallel"]
    if data.size() == 1:
        return
    if merged.coefficients is not None:
        raise InputError(
            'coefficients: must be "none" where weights are sharded, as they move whole weights; '
            'got "layer". Use strategy="ddp".'
        )
    for block in _blocks(merged.network):
        shard_parameters(block, data)
    shard_parameters(merged, data)


@contextmanager
def whole_network(
    merged: MergedNetwork, plain: Callable[[], MergedNetwork]
) -> Iterator[MergedNetwork]:
    """Have a network whole on every rank inside the block; afterwards each keeps its part.

    Collective. Where nothing is sharded, it is the network itself.

    Args:
        merged: The network, sharded or not.
        plain: Makes one of the same architecture, heads and sites, whose tensors do not matter.

    Yields:
        The whole network; what is changed in it ends up in the parts.
    """
    reshard(merged)
    own = merged.state_dict()
    if not any(is_dtensor(value) for value in own.values()):
        yield merged
        return
    made = plain()
    made.load_state_dict({name: whole(value) for name, value in own.items()}, strict=False)
    device = next(iter(own.values())).device
    yield made.to(device)
    changed = made.state_dict()
    with torch.no_grad():
        for name, value in own.items():
            if name in changed:
                local_part(value).copy_(own_part(changed[name], value))


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Return the modules of the longest list of one class in a network, a transformer's blocks."""
    listed = [list(m) for m in network.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    alike = [blocks for blocks in listed if len(blocks) > 1 and len(set(map(type, blocks))) == 1]
    longest = max(alike, key=len, default=[])
    return [block for block in longest if any(True for _ in block.parameters())]
