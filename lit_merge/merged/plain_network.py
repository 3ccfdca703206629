"""One task of a merged network as the plain network that its architecture is."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from lit_merge.correction import TaskContext, TaskRouter, install_heads


def plain_network(
    architecture: nn.Module, shared: Mapping[str, Tensor], own: Mapping[str, Tensor], *, task: str
) -> nn.Module:
    """Return one task's network without routers and corrections, in evaluation mode.

    Args:
        architecture: The network; copied.
        shared: The tensors that all tasks share, by name in the architecture.
        own: The tensors of the task's own, of any width.
        task: The task's name.

    Raises:
        InputError: The task's own tensors do not fit the architecture.
    """
    network = copy.deepcopy(architecture)
    if own:
        names = install_heads(network, {task: own}, TaskContext(), tasks=(task,))
        for name in names:
            router = network.get_submodule(name)
            assert isinstance(router, TaskRouter)
            parent, _, child = name.rpartition(".")
            (layer,) = router.heads.values()
            setattr(network.get_submodule(parent), child, layer)
    network.load_state_dict({**shared, **own})
    return network.requires_grad_(False).eval()


def tied_names(network: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the groups of names in a network's state dict that are one tensor."""
    groups: dict[int, list[str]] = {}
    for name, value in network.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)
