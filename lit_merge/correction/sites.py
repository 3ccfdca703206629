"""Finding sites: by kind, by pattern, or where corrections have done best.

==============  ===================================================================================
``auto``        a default that folds into the weights, see :func:`find_sites`
``linear``      outputs of linear layers
``conv``        outputs of convolutions
``norm``        outputs of norms
``final``       the final feature: what the task's head is given
``branch``      outputs of residual branches before they are added           (needs example inputs)
``block``       outputs of blocks: the residual stream                       (needs example inputs)
``attention``   attention contexts before their output projection            (needs example inputs)
anything else   a shell-style pattern over module names (``*`` also crosses dots), with ``:input``
                at its end for what the modules are given
==============  ===================================================================================

Where to correct matters (measured on small models, per cent of the experts' accuracy kept by the
closed form): convolutional nets after their batch norms 40, at convolution outputs 26, at block
outputs 38, at the final feature 30; vision transformers at every linear output 50, after their
layer norms 40, at block outputs 41, at branches 32, at the final feature 39. ``"auto"`` follows
that.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from lit_merge.correction.forward import Forward, run_model
from lit_merge.correction.site import (
    KINDS,
    Site,
    channel_layout,
    input_layout,
    input_of,
    is_channel_norm,
    is_convolution,
    is_linear,
    is_norm,
)
from lit_merge.correction.site_kinds import TracedRun
from lit_merge.correction.wrappers import bare, bare_name, named_bare_modules
from lit_merge.errors import InputError
from lit_merge.heads import detect_heads

__all__ = ["KINDS", "Site", "channel_layout", "find_sites"]

_TRACED: dict[str, Callable[[TracedRun], tuple[str, ...]]] = {
    "branch": TracedRun.branches,
    "block": TracedRun.blocks,
    "attention": TracedRun.contexts,
}


def find_sites(
    model: nn.Module,
    *,
    where: str | Sequence[str] = "auto",
    exclude: Collection[str] = (),
    example_inputs: Any = None,
    forward: Forward = run_model,
) -> tuple[Site, ...]:
    """Find the sites of a model, in the order in which its modules are registered.

    ``"auto"`` takes the outputs of batch, instance and group norms where a model has them
    (a group norm counts when there are convolutions), else every linear output (transformers,
    MLPs), and in a convolutional net without any norm the convolutions and linear layers. All of
    them fold: a scale and shift there can be taken up by the layer's own weights.

    A pattern may also match containers and layers without parameters (activations, dropout); these
    are passed over as long as the pattern matches a site as well. Where it matches nothing else,
    they are sites if there are example inputs, which show how many channels they have.

    The sites of a model that torch.compile or DistributedDataParallel has wrapped are those of the
    bare model.

    Note:
        The projection inside :class:`torch.nn.MultiheadAttention` is never called as a module
        (its weights are read directly), so it cannot be a site. In layers that end with their own
        activation (timm's ``BatchNormAct2d``) the site is behind the activation.

    Args:
        model: The network.
        where: A kind of site or a pattern, or several of these; see the top of this file.
        exclude: Names of modules or of parameters (the task heads); sites inside are left out.
        example_inputs: Two or more examples, as the network takes them; the model runs on them
            once for the kinds that need it. Their values do not matter.
        forward: Runs the model on the example inputs.

    Returns:
        The sites, each once.

    Raises:
        InputError: Nothing was found, a pattern matched nothing, one matched a layer with
            parameters whose output has no known channel axis, or example inputs are missing.
    """
    names = {name: module for name, module in named_bare_modules(model) if name}

    @cache
    def trace() -> TracedRun | None:
        known = example_inputs is not None
        return TracedRun(model, example_inputs, forward=forward) if known else None

    candidates = _Candidates(model, names, exclude, trace)
    wanted = (where,) if isinstance(where, str) else tuple(where)
    chosen: set[str] = set()
    for entry in wanted:
        chosen |= candidates.of(entry)
    sites = [
        site
        for name in names
        for key in (input_of(name), name)
        if key in chosen and (site := candidates.site(key)) is not None
    ]
    if not sites:
        heads = f" outside {sorted(exclude)}" if exclude else ""
        raise InputError(
            f"where: must lead to at least one site of {type(model).__name__}{heads}; got "
            f"{where!r}, which leads to none. Name the layers by a pattern; known are {KINDS}."
        )
    return tuple(sites)


class _Candidates:
    """The modules of a model that sites can be at."""

    def __init__(
        self,
        model: nn.Module,
        names: dict[str, nn.Module],
        exclude: Collection[str],
        trace: Callable[[], TracedRun | None],
    ) -> None:
        self.model = model
        self.names = names
        self.exclude = [bare_name(name) for name in exclude]
        self.trace = trace
        self.unreachable = _attention_projections(model)

    def of(self, entry: str) -> set[str]:
        """Return the names of the sites of a kind or pattern."""
        if entry in _TRACED:
            return self._traced(entry)
        if entry == "final":
            return {self._final()}
        inside = {name for name in self.names if _inside(name, self.exclude)}
        if entry.endswith(input_of("")):
            matched = self._match(entry.removesuffix(input_of("")), before=True)
            return {input_of(name) for name in matched - inside}
        kinds = {"linear": (is_linear,), "norm": (is_norm,), "conv": (is_convolution,)}
        tests = self._auto(inside) if entry == "auto" else kinds.get(entry)
        if tests is None:
            return self._match(entry) - inside
        usable = set(self.names) - self.unreachable - inside
        return {name for name in usable if any(test(self.names[name]) for test in tests)}

    def site(self, name: str) -> Site | None:
        """Return a site with its channels, None where neither the module nor a run shows them."""
        layout = self._layout(name)
        if layout is not None:
            return Site(name, *layout)
        trace = self.trace()
        return None if trace is None else trace.site(name)

    def _layout(self, name: str) -> tuple[int, int] | None:
        site = Site(name, 0, -1)
        module = self.names[site.module]
        return input_layout(module) if site.before else channel_layout(module)

    def _auto(self, inside: Collection[str]) -> tuple[Callable[[nn.Module], bool], ...]:
        modules = [module for name, module in self.names.items() if name not in inside]
        convolutional = any(map(is_convolution, modules))
        if any(isinstance(m, (_BatchNorm, _InstanceNorm)) for m in modules):
            return (is_channel_norm,)
        if convolutional and any(isinstance(m, nn.GroupNorm) for m in modules):
            return (is_channel_norm,)
        if convolutional and not any(map(is_norm, modules)):
            return is_linear, is_convolution
        return (is_linear,)

    def _traced(self, kind: str) -> set[str]:
        trace = self.trace()
        if trace is None:
            raise InputError(
                f"where: {kind!r} must come with example inputs, because only a run shows where "
                "they are; got none. Give example_inputs, or name the modules by a pattern."
            )
        found = {name for name in _TRACED[kind](trace) if not _inside(name, self.exclude)}
        if not found:
            raise InputError(
                f"where: {kind!r} must lead to sites of {type(self.model).__name__}; got none in a "
                "run on the example inputs. Name the modules by a pattern."
            )
        unknown = [name for name in sorted(found) if self.site(name) is None]
        if unknown:
            raise InputError(
                f"where: {kind!r} must lead to activations whose channel axis can be told; got "
                f"{unknown[0]!r}, whose shape no layer of a known kind has. Name the modules by a "
                f"pattern; known are {KINDS}."
            )
        return found

    def _final(self) -> str:
        heads = tuple(map(bare_name, detect_heads(bare(self.model)))) or tuple(self.exclude)
        owners = {name for name in self.names if _inside(name, heads)}
        for name, module in self.names.items():
            if name in owners and input_layout(module) is not None:
                return input_of(name)
        raise InputError(
            f"where: 'final' must find the head of {type(self.model).__name__}, a linear or "
            f"convolutional layer; got {sorted(heads) or 'no head'}. Name what the feature is "
            "given to by a pattern, as in 'my_head:input'."
        )

    def _match(self, pattern: str, *, before: bool = False) -> set[str]:
        names = self.names
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4) or list(names)[:5]
            raise InputError(
                f"where: must match modules of {type(self.model).__name__}; got {pattern!r}, which "
                f"matches none. Near it are: {', '.join(near) or 'no modules at all'}."
            )
        sites = {name: input_of(name) if before else name for name in matched}
        reachable = [name for name in matched if name not in self.unreachable]
        known = {name for name in reachable if self._layout(sites[name])}
        if not known:
            known = {name for name in reachable if self.site(sites[name])}
        for name in matched:
            module = names[name]
            if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
                raise InputError(
                    f"where: {name!r} must have its shape; got a {type(module).__name__} that has "
                    "not run yet. Run one batch through the model first."
                )
            own_parameters = any(True for _ in module.parameters(recurse=False))
            leaf = next(module.children(), None) is None
            if name not in known and (
                not known or (leaf and own_parameters and name not in self.unreachable)
            ):
                raise InputError(
                    f"where: {name!r} must be a layer with a known channel axis that is called as "
                    f"a module; got a {type(module).__name__}. Narrow {pattern!r} to {KINDS}; for "
                    "others give example_inputs."
                )
        return known


def _inside(name: str, exclude: Collection[str]) -> bool:
    """Return whether a module is, lies in, or owns the parameter of an excluded name."""
    return any(
        name == other or name.startswith(other + ".") or other.rpartition(".")[0] == name
        for other in exclude
    )


def _attention_projections(model: nn.Module) -> frozenset[str]:
    def projections() -> Iterator[str]:
        for name, module in named_bare_modules(model):
            if isinstance(module, nn.MultiheadAttention):
                yield f"{name}.out_proj" if name else "out_proj"

    return frozenset(projections())
