"""Hooks that turn one batched backward into sums of squared per-example gradients.

In the forward, every supported module's input is kept and its output watched; when the backward
brings the gradient of the output, the two make the per-example gradient of the module's parameters,
which is squared, summed and forgotten. The parameters themselves are frozen meanwhile, so autograd
does not form their ordinary gradients: this replaces that work instead of coming on top of it.

A parameter that is used several times in one forward (a shared module, tied weights) is summed over
its uses before squaring, when the last of them has arrived.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_merge.curvature.kernels import Contribution, add_squares
from lit_merge.curvature.layers import Layer


@dataclass(frozen=True)
class Site:
    """A supported module and which of its parameters are wanted.

    Attributes:
        module: The module.
        layer: What it contributes.
        weight: The name in the model of its weight, None if that is not wanted.
        bias: The same of its bias.
        without_examples: The module never sees the examples' dimension (positions [T] → [T, D]):
            its output gets one in front.
    """

    module: nn.Module
    layer: Layer
    weight: str | None
    bias: str | None
    without_examples: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the model of the parameters that are wanted."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)


@dataclass
class Use:
    """One call of a module, until its gradient has come.

    Attributes:
        site: Where.
        x: The input, if the weight is wanted.
        version: Of the input, to notice changes in place.
    """

    site: Site
    x: Tensor | None
    version: int


@dataclass
class _Tally:
    """The uses of one parameter in one forward."""

    uses: int = 0
    arrived: list[Contribution] = field(default_factory=list)


class Capture:
    """The hooks of one forward and backward, as a context.

    Attributes:
        totals: By parameter name, what the squares are added to.
        anchor: Every watched output depends on it, so differentiating with respect to it runs the
            backward through all of them.
        failed: Parameters that cannot be covered in this batch, and why; nothing was added to their
            totals.
        reached: Parameters that got a gradient in this batch.
        broadcast: Parameters whose modules were called with one row for the whole batch.
        dtypes: Of the gradients that arrived.
    """

    def __init__(
        self,
        sites: Collection[Site],
        totals: MutableMapping[str, Tensor],
        batch_size: int,
    ) -> None:
        """Set up one batch.

        Args:
            sites: What to watch.
            totals: By parameter name, what to add the squares to.
            batch_size: B.
        """
        self.totals = totals
        self.anchor = torch.zeros((), requires_grad=True)
        self.failed: dict[str, str] = {}
        self.reached: set[str] = set()
        self.broadcast: set[str] = set()
        self.dtypes: set[torch.dtype] = set()
        self._sites = sites
        self._size = batch_size
        self._tallies: dict[str, _Tally] = {}
        self._recording = True
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Capture:
        """Register the hooks, before those that others have registered."""
        for site in self._sites:
            hook = partial(self._after_call, site)
            self._handles.append(
                site.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            )
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def end_forward(self) -> None:
        """Take no more calls: what comes now is recomputation by activation checkpointing."""
        self._recording = False

    def end_backward(self) -> None:
        """Finish parameters of which some uses got no gradient."""
        for name, tally in self._tallies.items():
            self._finish(name, tally)

    def _after_call(
        self,
        site: Site,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> Tensor | None:
        """Watch one call; may replace the output by an equal one that autograd follows."""
        if not torch.is_grad_enabled():
            return None  # the model cuts this part off from the loss itself
        x = next(iter((*args, *kwargs.values())), None)
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            self._fail(site, "its module does not map one tensor to one tensor")
            return None
        y = output
        if site.without_examples:
            x, y = x[None], y[None]
        if not site.layer.fits(x, y):
            self._fail(site, "its module was called with an unusual input or output")
            return None
        if len(x) == 1 < self._size:  # one row for all, later broadcast: give each its own
            self.broadcast.update(site.names)
            x = x.expand(self._size, *x.shape[1:])
            y = y.expand(self._size, *y.shape[1:]).contiguous()
        if len(x) % self._size:
            rows = f"{len(x)} rows for {self._size} examples"
            self._fail(site, f"its module was called with {rows}")
            return None
        if not y.requires_grad:
            y = _Anchored.apply(y, self.anchor)
        if self._recording:
            self._record(site, x, y)
        return None if y is output else y

    def _fail(self, site: Site, reason: str) -> None:
        if self._recording:
            self.failed.update(dict.fromkeys(site.names, reason))

    def _record(self, site: Site, x: Tensor, y: Tensor) -> None:
        for name in site.names:
            self._tallies.setdefault(name, _Tally()).uses += 1
        kept = x.detach() if site.weight is not None else None
        use = Use(site, kept, _version(x))
        y.register_hook(partial(self._arrive, use))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _arrive(self, use: Use, g: Tensor) -> None:
        """Take the gradient of the output of a call."""
        site, x, use.x = use.site, use.x, None
        self.dtypes.add(g.dtype)
        if x is not None and _version(x) != use.version:
            changed = "the input of its module was changed in place after the call"
            self.failed.update(dict.fromkeys(site.names, changed))
        if site.weight is not None and site.weight not in self.failed:
            assert x is not None
            self._add(site.weight, site.layer.weight(x, g, self._size))
        if site.bias is not None and site.bias not in self.failed:
            self._add(site.bias, site.layer.bias(g, self._size))

    def _add(self, name: str, contribution: Contribution) -> None:
        self.reached.add(name)
        tally = self._tallies[name]
        tally.arrived.append(contribution)
        if len(tally.arrived) == tally.uses:
            self._finish(name, tally)

    @torch.no_grad()
    def _finish(self, name: str, tally: _Tally) -> None:
        arrived, tally.arrived = tally.arrived, []
        if arrived and name not in self.failed:
            add_squares(self.totals[name], arrived, self._size)


def _version(tensor: Tensor) -> int:
    """Return how often the tensor was changed in place; what inference mode made does not count."""
    return 0 if tensor.is_inference() else tensor._version


class _Anchored(torch.autograd.Function):
    """A copy of a tensor that depends on the anchor, with a derivative that nobody asks for."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, anchor: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None
