"""What can be solved in a network, and what stands around it: found out by running it once.

A layer can be solved when it runs once in a forward and really is the linear map that its class
promises. Two neighbours matter:

- a BatchNorm that is given exactly the layer's output is solved together with it;
- where the layer's output (behind that norm) is added to a tensor that exists before the layer
  runs, as at the end of a residual branch, that tensor is its **skip**: the layer can make up for
  what the merged model's skip lacks of the expert's.

Tensors are followed by their identity, and by the count that torch keeps of changes in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_merge.correction.layer_trace import LayerTrace, trace_layers
from lit_merge.correction.site import Site
from lit_merge.errors import InputError
from lit_merge.least_squares.embedding_table import EmbeddingTable
from lit_merge.least_squares.linear_layers import (
    LinearLayer,
    effective_affine,
    is_batch_norm,
    linear_layer,
)

_ADDITIONS = frozenset(
    (
        torch.add,
        Tensor.add,
        Tensor.add_,
        Tensor.__add__,
        Tensor.__radd__,
        Tensor.__iadd__,
    )
)


@dataclass(frozen=True)
class Event:
    """Where a tensor can be caught again.

    Attributes:
        module: Qualified name of a module.
        before: Whether it is what the module is given, not what it returns.
    """

    module: str
    before: bool


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that can be solved.

    Attributes:
        layer: How it reads as a linear map.
        norm: The BatchNorm that is solved together with it.
        activates: Whether that norm does more than its affine map (timm's BatchNormAct2d).
        skip: What its output is added to.
    """

    layer: LinearLayer
    norm: str | None = None
    activates: bool = False
    skip: Event | None = None

    @property
    def name(self) -> str:
        """Qualified name of the layer."""
        return self.layer.name

    @property
    def ends(self) -> tuple[str, ...]:
        """Names of the modules whose outputs are those of the layer: itself, and its norm."""
        return (self.name,) if self.norm is None else (self.name, self.norm)


@dataclass(frozen=True)
class LayerPlan:
    """What can be solved, in forward order, and what cannot.

    Attributes:
        layers: Those that can, by name.
        embeddings: Tables of embeddings that can, by name.
        left: Why each other layer that was wanted cannot.
    """

    layers: dict[str, PlannedLayer]
    embeddings: dict[str, EmbeddingTable]
    left: dict[str, str]

    @property
    def modules(self) -> frozenset[str]:
        """Names of all modules that the experts must have, too."""
        ends = {name for layer in self.layers.values() for name in layer.ends}
        skips = {layer.skip.module for layer in self.layers.values() if layer.skip}
        return frozenset({*self.embeddings} | ends | skips)

    def layer_at(self, site: Site) -> PlannedLayer | None:
        """Return the layer whose outputs are at a site, before or behind the norm with it."""
        for planned in self.layers.values():
            behind = not site.before and site.module in planned.ends
            if behind or (site.before and site.module == planned.norm):
                return planned
        return None


def plan_layers(
    model: nn.Module, run: Callable[[], Any], wanted: Callable[[str, nn.Module], bool]
) -> LayerPlan:
    """Run a model twice, without gradients, and return which of its layers can be solved.

    Args:
        model: The network, in evaluation mode and without corrections.
        run: Runs it on a few examples.
        wanted: Takes name and module (linear layer, convolution, norm or embedding) to whether it
            should be solved.

    Returns:
        The plan; empty where nothing is wanted.

    Raises:
        InputError: None of the wanted layers can be solved.
    """
    layers: dict[str, LinearLayer | EmbeddingTable] = {}
    for name, module in model.named_modules():
        table = EmbeddingTable(name, module) if isinstance(module, nn.Embedding) else None
        layer = linear_layer(name, module) or table
        if layer is not None and wanted(name, module):
            layers[name] = layer
    trace = trace_layers(model, list(layers), lambda _: run())
    watch = _Watch(layers, trace, dict(model.named_modules()))
    handles: list[Any] = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(watch.before(name)))
            handles.append(module.register_forward_hook(watch.after(name)))
    try:
        with torch.no_grad(), watch:
            run()
    finally:
        for handle in handles:
            handle.remove()
    plan = watch.plan()
    if layers and not plan.layers and not plan.embeddings:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(plan.left.items())[:3])
        raise InputError(
            f"least_squares: must find a layer of {type(model).__name__} to solve; got none "
            f"({reasons}). Name other layers."
        )
    return plan


@dataclass(frozen=True)
class _Sighting:
    """A tensor at an event, when that was, and how often it had been changed in place by then."""

    event: Event
    time: int
    version: int


class _Watch(TorchFunctionMode):
    """Follows tensors by their identity, so all that it has seen stays alive until it is gone."""

    def __init__(
        self,
        layers: dict[str, LinearLayer | EmbeddingTable],
        trace: LayerTrace,
        modules: dict[str, nn.Module],
    ) -> None:
        super().__init__()
        self._layers = layers
        self._trace = trace
        self._modules = modules
        self._runs: dict[str, int] = {}
        self._started: dict[str, int] = {}
        self._explained: set[str] = set()
        self._affine_norms: set[str] = set()
        self._made_by: dict[int, tuple[str, int]] = {}
        self._sightings: dict[int, list[_Sighting]] = {}
        self._added_to: dict[str, tuple[int, int]] = {}
        self._time = 0
        self._tensors: list[Tensor] = []

    def before(self, name: str) -> Callable[..., None]:
        """Return a hook that remembers what a module is given."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._runs[name] = self._runs.get(name, 0) + 1
            if args and isinstance(args[0], Tensor):
                self._see(args[0], Event(name, before=True))
            self._started[name] = self._time

        return hook

    def after(self, name: str) -> Callable[..., None]:
        """Return a hook that remembers what a module returns, and whether it is what it should."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = args[0] if args else None
            if not isinstance(output, Tensor):
                return
            self._see(output, Event(name, before=False))
            source = self._maker(given)
            layer = self._layers.get(name)
            if source is not None and self._trace.followers.get(source) == name:
                if _only_affine(module, given, output):
                    self._affine_norms.add(name)
                    self._made_by[id(output)] = source, _version(output)
            elif layer is not None and layer.explains(given, output):
                self._explained.add(name)
                if isinstance(layer, LinearLayer):
                    self._made_by[id(output)] = name, _version(output)

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _ADDITIONS and len(args) > 1:
            one, other = args[0], args[1]
            both = isinstance(one, Tensor) and isinstance(other, Tensor)
            if both and one.shape == other.shape:
                self._added(one, other)
        return func(*args, **(kwargs or {}))

    def _see(self, tensor: Tensor, event: Event) -> None:
        self._time += 1
        seen = _Sighting(event, self._time, _version(tensor))
        self._sightings.setdefault(id(tensor), []).append(seen)
        self._tensors.append(tensor)  # or another would get its identity

    def _maker(self, tensor: Any) -> str | None:
        """Return the layer whose output this still is."""
        name, version = self._made_by.get(id(tensor), (None, 0))
        return name if name is not None and version == _version(tensor) else None

    def _added(self, one: Tensor, other: Tensor) -> None:
        made = [self._maker(one), self._maker(other)]
        ages = [-1 if name is None else self._started[name] for name in made]
        late = 0 if ages[0] > ages[1] else 1  # the one that ran last can still make up
        name, skip = made[late], (other, one)[late]
        if name is not None:
            self._added_to[name] = id(skip), _version(skip)

    def _skip(self, name: str) -> Event | None:
        """Return where a layer's skip can be caught, unchanged, before the layer runs."""
        tensor, version = self._added_to.get(name, (0, 0))
        fitting = [
            seen.event
            for seen in self._sightings.get(tensor, ())
            if seen.version == version
            and seen.time <= self._started[name]
            and self._runs[seen.event.module] == 1
        ]
        return fitting[-1] if fitting else None

    def plan(self) -> LayerPlan:
        """Return what was found out."""
        plan = LayerPlan({}, {}, {})
        norms = {
            name: norm
            for name, norm in self._trace.followers.items()
            if name in self._explained and is_batch_norm(self._modules[norm])
        }
        ran = [name for name in self._started if name in self._layers]
        for name in (*ran, *(name for name in self._layers if name not in self._started)):
            layer, runs = self._layers[name], self._runs.get(name, 0)
            if name in norms.values():
                continue
            if runs != 1:
                plan.left[name] = f"it is called {runs} times as a module"
            elif name in self._trace.read_elsewhere:
                plan.left[name] = "its weights are used elsewhere too"
            elif name not in self._explained:
                plan.left[name] = "its output is not its weight times its input"
            elif isinstance(layer, EmbeddingTable):
                plan.embeddings[name] = layer
            else:
                norm = norms.get(name)
                activates = norm is not None and norm not in self._affine_norms
                plan.layers[name] = PlannedLayer(layer, norm, activates, self._skip(name))
        return plan


def _version(tensor: Tensor) -> int:
    """Return how often a tensor has been changed in place; inference tensors are not counted."""
    return 0 if tensor.is_inference() else tensor._version


def _only_affine(norm: Any, given: Any, output: Tensor) -> bool:
    """Return whether a BatchNorm in evaluation mode has done nothing but its affine map."""
    if not is_batch_norm(norm):
        return False
    scale, shift = (part.reshape(-1, *(1,) * (given.ndim - 2)) for part in effective_affine(norm))
    wrong = (given * scale + shift - output).float().abs().max()
    coarse = torch.finfo(output.dtype).eps > 1e-5
    return bool(wrong <= (5e-2 if coarse else 1e-4) * output.float().abs().max())
