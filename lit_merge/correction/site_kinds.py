"""Sites that a model's list of layers does not show: blocks, residual branches, attention contexts.

One run on a few examples shows them for any architecture, without a list of architectures:

- a **block** is one of several modules of one class that stand in a list (``nn.ModuleList`` or
  ``nn.Sequential``), the innermost such (ResNet blocks, not stages), and elsewhere a module that
  adds a branch itself; its output is the residual stream;
- a **branch** is what a module has returned when it is added to a tensor of the same shape that the
  surrounding module was given or has computed itself; a projected shortcut counts as one, too;
- an **attention context** is what the first linear layer after a softmax (or a fused attention) in
  the same attention module is given: the heads' values before they are mixed.

Which axis of such an activation holds the channels tells the latest layer of a known kind that has
returned the same shape (the next one, where there was none before).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_merge.correction.forward import Forward, evaluation_mode, first_tensor, run_model
from lit_merge.correction.site import Site, channel_layout, input_layout, input_of, is_linear
from lit_merge.correction.wrappers import bare, named_bare_modules

_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_ATTENTIONS = frozenset({"softmax", "_softmax", "scaled_dot_product_attention"})
_LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class _Call:
    """A module that has returned.

    Attributes:
        name: Its name.
        output: What it has returned, or the first of several.
        layout: Number and axis of its channels, where its kind tells.
    """

    name: str
    output: Tensor
    layout: tuple[int, int] | None


class TracedRun:
    """One run of a model on a few examples, watched.

    Args:
        model: The network; left as it was.
        example_inputs: At least two examples, as the network takes them.
        forward: Runs the model on them.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, *, forward: Forward = run_model
    ) -> None:
        self._modules = dict(named_bare_modules(model))
        self._calls: list[_Call] = []
        self._given: list[Tensor] = []  # what modules have computed something from
        self._branches: list[str] = []
        self._adding: list[str] = []  # the modules that have added them
        self._contexts: list[str] = []
        self._running: list[str] = []
        self._attended: str | None = None  # where the last softmax was, until a linear layer runs
        watch = _Watch({**dict.fromkeys(_ADDITIONS, self._add), **self._on_attention()})
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(model))
            for name, module in self._modules.items():
                begin = module.register_forward_pre_hook(self._begin(name, module), prepend=True)
                end = module.register_forward_hook(self._end(name, module))
                stack.callback(begin.remove)
                stack.callback(end.remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(watch)
            forward(bare(model), example_inputs)

    def blocks(self) -> tuple[str, ...]:
        """Return the names of the blocks that have run once."""
        times = Counter(call.name for call in self._calls)
        found = [name for name in repeated_modules(self._modules) if times[name] == 1]
        around = {above for name in found for above in _above(name)}
        adding = [n for n in dict.fromkeys(self._adding) if n and times[n] == 1 and n not in around]
        found += [name for name in adding if not {name, *_above(name)} & {*found}]
        return tuple(found)

    def branches(self) -> tuple[str, ...]:
        """Return the names of the modules whose outputs were added to a residual stream."""
        return tuple(dict.fromkeys(self._branches))

    def contexts(self) -> tuple[str, ...]:
        """Return the names of the sites between attention and its output projection."""
        return tuple(input_of(name) for name in dict.fromkeys(self._contexts))

    def site(self, name: str) -> Site | None:
        """Return a site with its channels as they were in the run; None if they cannot be told."""
        site = Site(name, 0, -1)
        module = self._modules[site.module]
        layout = input_layout(module) if site.before else channel_layout(module)
        if layout is None and not site.before:
            layout = self._layout_of_output(name)
        return None if layout is None else Site(name, *layout)

    def _layout_of_output(self, name: str) -> tuple[int, int] | None:
        last = max((n for n, call in enumerate(self._calls) if call.name == name), default=None)
        if last is None:
            return None
        output = self._calls[last].output
        if not output.is_floating_point() or output.ndim < 2:
            return None
        for call in (*reversed(self._calls[: last + 1]), *self._calls[last + 1 :]):
            if call.layout is not None and call.output.shape == output.shape:
                axis = call.layout[1]
                return output.shape[axis], axis
        return None

    def _begin(self, name: str, module: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if self._attended is not None and is_linear(module):
                around, self._attended = self._attended.rpartition(".")[0], None
                if not around or name.startswith(around + "."):
                    self._contexts.append(name)
            self._running.append(name)

        return hook

    def _end(self, name: str, module: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._running.pop()
            tensor, given = first_tensor(output), first_tensor(args)
            if given is not None and given is not tensor:
                self._given.append(given)
            if tensor is not None:
                self._calls.append(_Call(name, tensor, channel_layout(module)))

        return hook

    def _add(self, args: Sequence[Any]) -> None:
        if len(args) < 2 or not all(isinstance(value, Tensor) for value in args[:2]):
            return
        if args[0].shape != args[1].shape or args[0].ndim < 2:
            return
        inside = self._running[-1] + "." if self._running and self._running[-1] else ""
        for value in args[:2]:
            if any(given is value for given in self._given):  # the stream that branches start from
                continue
            # One tensor has passed through several modules when some of them do nothing (dropout):
            # the innermost of a known kind is the one whose weights can take up a correction.
            made = [c for c in self._calls if c.output is value and c.name.startswith(inside)]
            known = [call for call in made if call.layout is not None]
            call = known[0] if known else made[-1] if made else None
            if call is not None and not isinstance(self._modules[call.name], nn.Embedding):
                self._branches.append(call.name)
                self._adding.append(inside[:-1])

    def _on_attention(self) -> dict[str, Callable[[Sequence[Any]], None]]:
        def attended(args: Sequence[Any]) -> None:
            self._attended = self._running[-1] if self._running else ""

        return dict.fromkeys(_ATTENTIONS, attended)


class _Watch(TorchFunctionMode):
    """Tells of calls of torch functions by their names."""

    def __init__(self, told: dict[str, Callable[[Sequence[Any]], None]]) -> None:
        super().__init__()
        self.told = told

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        told = self.told.get(getattr(func, "__name__", ""))
        if told is not None:
            told(args)
        return func(*args, **(kwargs or {}))


def repeated_modules(modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """Return the names of the repeated modules in a model's lists, see this file's beginning.

    Args:
        modules: The modules of the model by name, in the order of registration.
    """
    listed = {
        name: (parent, type(module))
        for name, module in modules.items()
        if isinstance(modules.get(parent := name.rpartition(".")[0]), _LISTS)
        and name
        and _is_container(module)
    }
    together = Counter(listed.values())
    several = {kind for (_, kind), count in together.items() if count > 1}
    found = [name for name, (_, kind) in listed.items() if kind in several]
    outer = {above for name in found for above in _above(name)}
    return tuple(name for name in found if name not in outer)


def _is_container(module: nn.Module) -> bool:
    has_children = next(module.children(), None) is not None
    return has_children and next(module.parameters(), None) is not None


def _above(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
