"""One run of a network on example inputs, watched operation by operation.

What a fold must know and no structure tells: what a layer was called with, whether its parameters
are read outside of its own forward (tied weights, functional calls), and whether a convolution's
output goes into one BatchNorm and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_merge.correction.forward import module_at


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: What it has returned.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class LayerTrace:
    """What was seen of a network's layers.

    Attributes:
        calls: The first call of each watched layer that was called, by name.
        read_elsewhere: Watched layers whose parameters another part of the network has read.
        followers: For a watched layer, the name of the BatchNorm that takes its output, where
            nothing else does and that BatchNorm takes nothing else.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    read_elsewhere: set[str] = field(default_factory=set)
    followers: dict[str, str] = field(default_factory=dict)


def trace_layers(
    network: nn.Module, names: Collection[str], run: Callable[[nn.Module], object]
) -> LayerTrace:
    """Run a network once without gradients and return what its layers did.

    Args:
        network: The network, in the mode in which it shall run.
        names: Qualified names of the layers to watch.
        run: Calls the network on example inputs.

    Raises:
        InputError: The network has no layer of such a name.
    """
    watched = {name: module_at(network, name) for name in names}
    norms = {n: m for n, m in network.named_modules() if isinstance(m, _BatchNorm)}
    watch = _Watch(watched, norms)
    with torch.no_grad(), _hooked(watch, {**watched, **norms}), watch:
        run(network)
    return watch.result()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation, with the layers that are running at the time."""

    def __init__(self, watched: Mapping[str, nn.Module], norms: Mapping[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = LayerTrace()
        self.running: list[str] = []
        self.norms = norms
        self.watched = watched
        self.owners = {
            id(tensor): name
            for name, module in watched.items()
            for tensor in module.parameters(recurse=False)
        }
        # The tensors are kept, or another one might get the same id.
        self.outputs: dict[int, tuple[str, Tensor]] = {}
        self.consumers: dict[str, list[str | None]] = {}
        self.norm_calls: dict[str, list[object]] = {}
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, dict(kwargs or {}))):
            if not isinstance(value, Tensor):
                continue
            owner = self.owners.get(id(value))
            if owner is not None and owner not in self.running:
                self.trace.read_elsewhere.add(owner)
            if id(value) in self.outputs:
                source = self.outputs[id(value)][0]
                now = self.running[-1] if self.running else None
                self.consumers.setdefault(source, []).append(now)
        return func(*args, **(kwargs or {}))

    def enter(self, name: str, args: Any, kwargs: Any) -> None:
        self.running.append(name)
        if name in self.norms:
            self.norm_calls.setdefault(name, []).append(args[0] if args else None)

    def leave(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        self.running.pop()
        if name in self.watched:
            self.counts[name] = self.counts.get(name, 0) + 1
            self.trace.calls.setdefault(name, Call(args, dict(kwargs), output))
            if isinstance(output, Tensor):
                self.outputs[id(output)] = (name, output)

    def result(self) -> LayerTrace:
        for source, consumers in self.consumers.items():
            follower = consumers[0]
            if (
                follower is not None
                and set(consumers) == {follower}
                and len(calls := self.norm_calls.get(follower, [])) == 1
                and self.counts[source] == 1
                and calls[0] is self.trace.calls[source].output
            ):
                self.trace.followers[source] = follower
        return self.trace


@contextmanager
def _hooked(watch: _Watch, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Tell the watch when each module begins and ends, inside the block."""

    def before(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: watch.enter(name, args, kwargs)

    def after(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: watch.leave(name, args, kwargs, output)

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
